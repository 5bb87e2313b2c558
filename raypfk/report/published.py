"""The paper's curves, as numbers (Gudovskiy et al., CVPR 2020, figures 4 and 5): the best epoch on the test set.

published.csv says of each point whether it was read off the plot, and how exactly, or published as an array.
"""

import csv
import importlib.resources
from typing import NamedTuple


class Published(NamedTuple):
    """A method's curve. labels: bought, ascending. accuracy: fractions."""

    method: str
    labels: list[float]
    accuracy: list[float]


class Figure(NamedTuple):
    """A figure's curves. percent: of the pool before it was imbalanced, which were a round's labels.

    limits: accuracies of networks that were trained on the whole pool, by their name.
    """

    name: str
    dataset: str
    imbalance: int
    percent: float
    curves: list[Published]
    limits: dict[str, float]


def figure(name: str, budget: int) -> Figure | None:
    """The figure's curves for a budget of labels a round; None if it is not among them.

    The paper counts labels in percent of the pool before its imbalance; its first point is one round, as MNIST's 0.25 %
    of 50,000 images are 125 labels. So a fraction stands for fraction / first fraction rounds, of `budget` labels each.
    """
    rows = [row for row in _rows() if row["figure"] == name]
    if not rows:
        return None
    percent = min(float(row["fraction_percent"]) for row in rows if row["fraction_percent"])
    curves: dict[str, Published] = {}
    limits = {}
    for row in rows:
        method, accuracy = row["method"], float(row["top1_percent"]) / 100
        if not row["fraction_percent"]:
            limits[method] = accuracy
            continue
        curve = curves.setdefault(method, Published(method, [], []))
        curve.labels.append(float(row["fraction_percent"]) / percent * budget)
        curve.accuracy.append(accuracy)
    return Figure(name, rows[0]["dataset"], int(rows[0]["imbalance"]), percent, list(curves.values()), limits)


def figures() -> list[str]:
    """Names of the figures that are there."""
    return [*dict.fromkeys(row["figure"] for row in _rows())]


def methods(figure: str) -> list[str]:
    """Names of a figure's curves."""
    return [*dict.fromkeys(row["method"] for row in _rows() if row["figure"] == figure and row["fraction_percent"])]


def _rows() -> list[dict[str, str]]:
    text = (importlib.resources.files(__package__) / "published.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
