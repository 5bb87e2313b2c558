"""What the page needs of a study's files: results as arrays, and what a round of a run looks like.

Shapes: S seeds, B rounds, D classes, N images, L numbers of a descriptor.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from sklearn.manifold import TSNE

from raypfk import descriptor_files, loop, results, store
from raypfk.pfk import LastLayer
from raypfk.report import statistics
from raypfk.run import Run
from raypfk.salts import salts
from raypfk.schema import LABELS
from raypfk.study import Cell, Study

MOST_POINTS = 1000
PERPLEXITY = 30


@dataclass(frozen=True)
class Curves:
    """A cell's results. published: the name of its curve among the paper's. seeds: those that it is to be run on, (S,).

    bought_B: labels after each round, a mean where seeds differ. values: a column of `results.RESULTS` -> (S, B), NaN
    where a run has not got to, and where it is not known.
    """

    name: str
    strategy: str
    published: str | None
    seeds: list[int]
    bought_B: np.ndarray
    values: dict[str, np.ndarray]

    @property
    def rounds(self) -> int:
        return len(self.bought_B)

    def known(self, column: str) -> bool:
        return bool(np.isfinite(self.values[column]).any())

    def summary(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and sample deviation over the seeds, (B,) each."""
        return statistics.mean_and_deviation(self.values[column])

    def seeds_until(self, rounds: int) -> list[int]:
        """Those that have got so far."""
        whole_S = np.isfinite(self.values["test_accuracy"][:, :rounds]).all(1)
        return [seed for seed, whole in zip(self.seeds, whole_S, strict=True) if whole]

    def until(self, rounds: int, seeds: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Labels and mean accuracies of the first rounds, of these seeds."""
        y_SB = self.values["test_accuracy"][[self.seeds.index(seed) for seed in seeds], :rounds]
        return self.bought_B[:rounds], statistics.mean_and_deviation(y_SB)[0]

    def areas(self, rounds: int) -> dict[int, float]:
        """By seed, the area under the curve of the first rounds: NaN if the seed has not got so far."""
        areas = statistics.area(self.bought_B[:rounds], self.values["test_accuracy"][:, :rounds])
        return dict(zip(self.seeds, areas.tolist(), strict=True))


def curves(study: Study, table: pa.Table) -> list[Curves]:
    """Of each cell that has a round, in their order. table: `study.table`."""
    rows, found = table.to_pylist(), []
    for cell in study.cells:
        own = [[r for r in rows if (r["cell"], r["seed"]) == (cell.name, seed)] for seed in cell.seeds]
        if any(own):
            values = {name: _values(own, name) for name in _NUMBERS}
            strategy = next(iter(cell.runs.values())).config.strategy
            bought_B, _ = statistics.mean_and_deviation(values["bought"])
            found.append(Curves(cell.name, strategy, cell.published, cell.seeds, bought_B, values))
    return found


_NUMBERS = [field.name for field in results.RESULTS if not pa.types.is_list(field.type)]


def _values(runs: list[list[dict]], name: str) -> np.ndarray:
    y_SB = np.full((len(runs), max(map(len, runs))), np.nan)
    for y_B, rows in zip(y_SB, runs, strict=True):
        y_B[: len(rows)] = [np.nan if row[name] is None else row[name] for row in rows]
    return y_SB


def common_rounds(found: list[Curves]) -> int:
    """The last round that a run of every cell has finished: what is compared is compared until there."""
    return min((cell.rounds for cell in found), default=0)


def baseline(found: list[Curves], rounds: int) -> Curves | None:
    """The cell of the strategy `random`, else that of the smallest area; None where there is nothing to compare."""
    if len(found) < 2:
        return None
    chance = next((cell for cell in found if cell.strategy == "random"), None)
    return chance or min(found, key=lambda cell: np.nanmean(list(cell.areas(rounds).values())))


def unfinished(study: Study) -> list[str]:
    """A sentence for each run that is not begun, or has not done its rounds."""
    sentences = [f"{cell}, seed {seed}: not begun" for cell, seed in study.missing]
    for cell, seed, run in study.runs():
        done = rounds_done(run)
        if done < run.config.rounds and (done == 0 or loop.images_left(run, done + 1)):
            sentences.append(f"{cell.name}, seed {seed}: {done} of {run.config.rounds} rounds are evaluated")
    return sentences


def rounds_done(run: Run) -> int:
    done = 0
    while run.done(done + 1, "evaluate"):
        done += 1
    return done


def first(cell: Cell) -> tuple[int, Run] | None:
    """The seed and run that stand for a cell where one must: the first that has a round."""
    return next(((seed, run) for seed, run in cell.runs.items() if rounds_done(run)), None)


# ----------------------------------------------------------------------------------------------- a round of one run


def class_names(run: Run) -> list[str]:
    return [str(name) for name in run.pool.classes or range(run.classes)]


def asks_validation(run: Run) -> bool:
    """Whether the strategy looks at the validation set: then a round describes it."""
    return store.exists(run.round(1).validation)


def confusion(run: Run, round: int) -> np.ndarray:
    """(D, D) counts of test images: row the true class, column the predicted one."""
    return np.array(store.read_record(run.round(round).metrics, {"confusion": list})["confusion"])


def split_counts(run: Run, split: str) -> np.ndarray | None:
    """Images (D,) of each class in a split; None if its labels are not known."""
    histogram = run.pool.manifest["splits"][split]["label_histogram"]
    return None if histogram is None else np.array([histogram.get(name, 0) for name in class_names(run)])


def bought_counts(run: Run) -> np.ndarray:
    """Labels (B, D) of each class that each round bought."""
    rounds = range(1, rounds_done(run) + 1)
    labels = [run.read(run.round(number).labels, LABELS)["label"].to_numpy() for number in rounds]
    return np.array([np.bincount(label, minlength=run.classes) for label in labels])


class Embedding(NamedTuple):
    """Validation images in the plane. trained: the round whose network described them."""

    points_N2: np.ndarray
    label_N: np.ndarray
    missed_N: np.ndarray
    trained: int


def embedding(run: Run, round: int) -> Embedding | None:
    """t-SNE (van der Maaten and Hinton 2008) of the validation set's features under the network of `round`.

    They are written by the next round; where that is not begun, the network is the one before. None if the strategy's
    files have no features, or of too few images, or all the same. At most `MOST_POINTS`, drawn by the images' ids.
    """
    number = next(
        (n for n in (round + 1, round) if run.done(n, "extract") and store.exists(run.round(n).validation)), None
    )
    if number is None:
        return None
    table, described, _ = descriptor_files.read_validation(run, number)
    x_NL = (described.hidden if isinstance(described, LastLayer) else described.z).numpy()
    drawn = np.sort(np.argsort(salts(table["image_id"].to_pylist(), run.seed("report")))[:MOST_POINTS])
    if len(drawn) <= PERPLEXITY:
        return None
    if not np.ptp(x_NL[drawn], axis=0).any():  # of a network that has died; scikit-learn divides by zero there
        return None
    tsne = TSNE(perplexity=PERPLEXITY, init="pca", random_state=run.seed("report") % 2**32)
    label_N, missed_N = (table[name].to_numpy()[drawn] for name in ("label", "missed"))
    return Embedding(tsne.fit_transform(x_NL[drawn]), label_N, missed_N, number - 1)
