"""Mathematics of comparing strategies over seeds, on plain arrays. NaN is a value that is not known.

Shapes: S seeds, B points of a curve (rounds). x: labels bought, ascending; y: accuracies as fractions.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

LEAST_DEVIATION = 1e-12
"""Of differences of accuracies: what is less is rounding."""


class Saved(NamedTuple):
    """What a curve and a baseline need for the same accuracy, in labels.

    earlier: which of them was better at its first point already, and may have been that good before: with the curve the
    share is at least what it says, with the baseline at most.
    """

    accuracy: float
    labels: float
    baseline: float
    earlier: Literal["curve", "baseline"] | None

    @property
    def share(self) -> float:
        """Of the baseline's labels, saved; negative where it needs fewer."""
        return 1 - self.labels / self.baseline


class Paired(NamedTuple):
    """difference: the mean of n pairs, NaN of none. p: two-sided; None where the test says nothing."""

    difference: float
    p: float | None
    n: int


def mean_and_deviation(y_SB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation (B,) over the seeds that are known: NaN of none, and a deviation of one."""
    known_SB = np.isfinite(y_SB)
    n_B = known_SB.sum(0)
    mean_B = np.divide(np.where(known_SB, y_SB, 0).sum(0), n_B, out=np.full(len(n_B), np.nan), where=n_B > 0)
    square_B = np.square(np.where(known_SB, y_SB - mean_B, 0)).sum(0)
    return mean_B, np.sqrt(np.divide(square_B, n_B - 1, out=np.full(len(n_B), np.nan), where=n_B > 1))


def area(x_B: np.ndarray, y_SB: np.ndarray) -> np.ndarray:
    """Area under each curve (S,) by trapezoids over the labels, divided by their range: a mean accuracy.

    B is at least 1; of one point it is that point's accuracy.
    """
    if len(x_B) == 1:
        return y_SB[:, 0]
    return ((y_SB[:, 1:] + y_SB[:, :-1]) / 2 * np.diff(x_B)).sum(1) / (x_B[-1] - x_B[0])


def labels_needed(x_B: np.ndarray, y_B: np.ndarray, accuracy: float) -> float | None:
    """Labels at which the curve first has this accuracy, straight between its points; None if it never has.

    Where its first point has it, that point's labels: the curve says nothing of fewer.
    """
    reached = np.flatnonzero(y_B >= accuracy)
    if not len(reached):
        return None
    i = reached[0]
    if i == 0:
        return float(x_B[0])
    return float(x_B[i - 1] + (accuracy - y_B[i - 1]) / (y_B[i] - y_B[i - 1]) * (x_B[i] - x_B[i - 1]))


def saved_at(
    accuracy: float, x_B: np.ndarray, y_B: np.ndarray, x_base_B: np.ndarray, y_base_B: np.ndarray
) -> Saved | None:
    """Labels saved at this accuracy; None unless both curves reach it, and where both were better all along."""
    labels, baseline = labels_needed(x_B, y_B, accuracy), labels_needed(x_base_B, y_base_B, accuracy)
    if labels is None or baseline is None or min(y_B[0], y_base_B[0]) > accuracy:
        return None
    earlier = "curve" if y_B[0] > accuracy else "baseline" if y_base_B[0] > accuracy else None
    return Saved(float(accuracy), labels, baseline, earlier)


def most_saved(x_B: np.ndarray, y_B: np.ndarray, x_base_B: np.ndarray, y_base_B: np.ndarray) -> Saved | None:
    """The largest share saved at any of the curve's points; None if the baseline gets to none of them.

    The paper's "40 % less labels for the same accuracy" (sections 5.1 and 5.2) is such a number.
    """
    found = [saved_at(accuracy, x_B, y_B, x_base_B, y_base_B) for accuracy in y_B]
    return max((saved for saved in found if saved), key=lambda saved: saved.share, default=None)


def paired(a_S: np.ndarray, b_S: np.ndarray) -> Paired:
    """Two-sided paired t test of a - b over the seeds that are known of both.

    p is None of fewer than 2 pairs, and where all differences are the same: there is no deviation to hold them against.
    """
    difference_S = a_S - b_S
    difference_S = difference_S[np.isfinite(difference_S)]
    n = len(difference_S)
    mean = float(difference_S.mean()) if n else float("nan")
    if n < 2 or difference_S.std(ddof=1) < LEAST_DEVIATION:
        return Paired(mean, None, n)
    return Paired(mean, float(stats.ttest_1samp(difference_S, 0.0).pvalue), n)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number (Holm, A simple sequentially rejective multiple test procedure, 1979).

    None is no test, and stays None.
    """
    tests = sorted((i for i, value in enumerate(p) if value is not None), key=lambda i: p[i])
    corrected: list[float | None] = [None] * len(p)
    largest = 0.0
    for done, i in enumerate(tests):
        largest = max(largest, min(1.0, (len(tests) - done) * p[i]))
        corrected[i] = largest
    return corrected
