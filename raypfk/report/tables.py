"""The report's tables: results in, text out. What is not known is said to be so."""

import itertools
import math
from typing import NamedTuple

import numpy as np

from raypfk import trust
from raypfk.report import published, statistics
from raypfk.report.gather import Curves
from raypfk.report.statistics import Paired, Saved
from raypfk.run import Run

UNKNOWN = "not known"


class Table(NamedTuple):
    """words: columns from the left that hold words; the others hold numbers."""

    head: list[str]
    rows: list[list[str]]
    words: int = 1


def percent(share: float | None, digits: int = 1) -> str:
    return UNKNOWN if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f} %"


def points(share: float) -> str:
    """A difference of accuracies, in percentage points."""
    return UNKNOWN if not math.isfinite(share) else f"{100 * share:+.1f}".replace("-", "\N{MINUS SIGN}")


def with_deviation(mean: float, deviation: float) -> str:
    """A mean in percent and its deviation over seeds, if there is one."""
    return f"{100 * mean:.1f} ± {100 * deviation:.1f} %" if math.isfinite(deviation) else percent(mean)


def probability(p: float | None) -> str:
    return UNKNOWN if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def count(number: float | None) -> str:
    return UNKNOWN if number is None or not math.isfinite(number) else f"{number:,.0f}"


def saved(found: Saved | None, at: bool = False) -> str:
    """The share of the baseline's labels that is saved, of how many; and at which accuracy."""
    if found is None:
        return UNKNOWN
    share = f"{100 * found.share:.0f} %".replace("-", "\N{MINUS SIGN}")
    bound = {"curve": "at least ", "baseline": "at most ", None: ""}[found.earlier]
    text = f"{bound}{share}: {found.labels:,.0f} for {found.baseline:,.0f}"
    return f"{text}, at {percent(found.accuracy)}" if at else text


def headline(cells: list[Curves], rounds: int, baseline: Curves | None, validation: dict[str, str]) -> Table:
    """What it came to after the last common round. validation: what each cell did with its validation labels."""
    head = ["cell", "accuracy, last epoch", "best on test (as published)", "minority classes", "area under curve"]
    if baseline:
        head += [f"labels saved at the accuracy of {baseline.name}", f"most labels saved against {baseline.name}"]
    head += ["seeds", "labels bought", "validation labels"]
    rows = []
    for cell in cells:
        at = rounds - 1
        accuracies = ("test_accuracy", "best_epoch_accuracy", "minority_accuracy")
        row = [cell.name, *(with_deviation(*(y_B[at] for y_B in cell.summary(name))) for name in accuracies)]
        areas_S1 = np.array([list(cell.areas(rounds).values())]).T
        row.append(with_deviation(*(y_1[0] for y_1 in statistics.mean_and_deviation(areas_S1))))
        if baseline:
            row += ["the baseline"] * 2 if cell is baseline else _saved(cell, baseline, rounds)
        seeds = int(np.isfinite(cell.values["test_accuracy"][:, at]).sum())
        rows.append([*row, f"{seeds}", count(cell.bought_B[at]), validation[cell.name]])
    return Table(head, rows)


def _saved(cell: Curves, baseline: Curves, rounds: int) -> list[str]:
    """Over the seeds that both have, n of them where one has others beside."""
    seeds = [seed for seed in cell.seeds_until(rounds) if seed in baseline.seeds_until(rounds)]
    if not seeds:
        return [UNKNOWN] * 2
    both = [*cell.until(rounds, seeds), *baseline.until(rounds, seeds)]
    n = "" if set(cell.seeds) == set(baseline.seeds) == set(seeds) else f" (n {len(seeds)})"
    found = saved(statistics.saved_at(both[-1][-1], *both)), saved(statistics.most_saved(*both), at=True)
    return [text if text == UNKNOWN else text + n for text in found]


def significance(cells: list[Curves], rounds: int) -> Table | None:
    """Pairs of cells by area and by round, over the seeds that both have; None of one cell. Differences in points."""
    pairs = list(itertools.combinations(cells, 2))
    if not pairs:
        return None
    areas = [_paired(a.areas(rounds), b.areas(rounds)) for a, b in pairs]
    by_round = [[_paired(_at(a, number), _at(b, number)) for a, b in pairs] for number in range(rounds)]
    head = ["pair", "area: difference", "p", "p, Holm", "n", *(f"round {n}" for n in range(1, rounds + 1))]
    columns = [
        [f"{a.name} \N{MINUS SIGN} {b.name}" for a, b in pairs],
        [points(test.difference) for test in areas],
        [probability(test.p) for test in areas],
        [probability(p) for p in statistics.holm([test.p for test in areas])],
        [f"{test.n}" for test in areas],
        *(_corrected(tests) for tests in by_round),
    ]
    return Table(head, [list(row) for row in zip(*columns, strict=True)])


def _corrected(tests: list[Paired]) -> list[str]:
    corrected = statistics.holm([test.p for test in tests])
    return [
        f"{points(test.difference)} (p {probability(p)}, n {test.n})" for test, p in zip(tests, corrected, strict=True)
    ]


def _paired(a: dict[int, float], b: dict[int, float]) -> Paired:
    """By seed: of those that both have."""
    seeds = [seed for seed in a if seed in b]
    return statistics.paired(*(np.array([values[seed] for seed in seeds]) for values in (a, b)))


def _at(cell: Curves, index: int) -> dict[int, float]:
    return dict(zip(cell.seeds, cell.values["test_accuracy"][:, index].tolist(), strict=True))


def by_round(cells: list[Curves], column: str) -> Table:
    """A column of results: a row for each round, the cells side by side; how many seeds, where not all are there."""
    longest = max(cells, key=lambda cell: cell.rounds)
    rows = [
        [f"{i + 1}", count(bought), *(_with_seeds(cell, column, i) for cell in cells)]
        for i, bought in enumerate(longest.bought_B)
    ]
    return Table(["round", "labels bought", *(cell.name for cell in cells)], rows, words=0)


def _with_seeds(cell: Curves, column: str, index: int) -> str:
    if index >= cell.rounds:
        return "not done"
    y_S = cell.values[column][:, index : index + 1]
    mean, deviation = (y[0] for y in statistics.mean_and_deviation(y_S))
    known = int(np.isfinite(y_S).sum())
    return with_deviation(mean, deviation) + (f" (n {known})" if 0 < known < len(cell.seeds) else "")


def beside_published(cells: list[Curves], figure: published.Figure) -> Table | None:
    """Of cells that have a curve among the paper's, each of its points that they have got to; None if there is none.

    The paper's points are the best epoch on the test set: the difference is of ours in that reading.
    """
    head = ["cell", "its curve", "labels bought", "last epoch", "best on test", "published", "difference, points"]
    curves, rows = {curve.method: curve for curve in figure.curves}, []
    for cell in cells:
        curve = curves.get(cell.published)
        for labels, accuracy in zip(curve.labels, curve.accuracy, strict=True) if curve else ():
            at = np.flatnonzero(np.isclose(cell.bought_B, labels))
            if len(at):
                last, best = (_with_seeds(cell, name, at[0]) for name in ("test_accuracy", "best_epoch_accuracy"))
                (mean_1,) = cell.summary("best_epoch_accuracy")[0][at]
                rows.append(
                    [cell.name, curve.method, count(labels), last, best, percent(accuracy), points(mean_1 - accuracy)]
                )
    return Table(head, rows, words=2) if rows else None


_ESTIMATES = {
    "selected_estimates": "right, of the selection",
    "pool_estimates": "right, of the pool",
    "minority_precision": "minority precision",
    "minority_recall": "minority recall",
}


def estimates(cells: list[Curves]) -> Table | None:
    """What the label estimators were worth, by cell and round; None if no cell has one."""
    rows = [
        [cell.name, f"{i + 1}", *(_with_seeds(cell, name, i) for name in _ESTIMATES)]
        for cell in cells
        if cell.known("selected_estimates")
        for i in range(cell.rounds)
    ]
    return Table(["cell", "round", *_ESTIMATES.values()], rows) if rows else None


def passes(runs: dict[str, tuple[int, Run]], cells: list[Curves], rounds: int) -> Table:
    """The paper's Table 1, counted: passes through a network in the last common round, and what its formulas give.

    runs: the seed and run that stand for each cell. M validation images; N pool images not labelled before the round.
    """
    head = ["cell", "forward", "backward", "after dropout", "M + N", "2 (M + N)", "training: forward", "backward"]
    head += ["seconds a round: acquiring", "training"]
    rows = []
    for cell in cells:
        seed, run = runs[cell.name]
        at = cell.seeds.index(seed), rounds - 1
        before = cell.values["bought"][at[0], rounds - 2] if rounds > 1 else 0
        described = run.pool.rows("validation") + run.pool.rows("pool") - before
        names = ("forward", "backward", "after_dropout")
        counted = [count(cell.values[name][at]) for name in names]
        training = [count(cell.values[name][at]) for name in ("train_forward", "train_backward")]
        seconds = [f"{np.nanmean(cell.values[name]):,.1f}" for name in ("acquire_seconds", "train_seconds")]
        rows.append([cell.name, *counted, count(described), count(2 * described), *training, *seconds])
    return Table(head, rows)


def outlook(runs: dict[str, tuple[int, Run]]) -> Table:
    """What the validation set says of each cell's run (`trust.TRUST`), round by round."""
    head = ["cell", "round", "labels before", "validation accuracy", "plateau, p", "expected gain of a round"]
    head += ["labels worth buying", "shift", "shift, p"]
    rows = [
        [
            name,
            f"{row['round']}",
            count(row["bought"]),
            percent(row["validation_accuracy"]),
            probability(row["plateau"]),
            UNKNOWN if row["expected_gain"] is None else f"{points(row['expected_gain'])} points",
            count(row["worth_buying"]),
            UNKNOWN if row["shift"] is None else f"{row['shift']:.3f}",
            probability(row["shift_p"]),
        ]
        for name, (_, run) in runs.items()
        for row in trust.of(run).to_pylist()
        if row["validation_accuracy"] is not None
    ]
    return Table(head, rows)
