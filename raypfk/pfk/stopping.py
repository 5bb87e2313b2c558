"""When to stop: is the network still getting better, and what would more labels bring?

Shapes: M validation images, R rounds.
"""

import math
from bisect import bisect_left
from typing import NamedTuple

import torch
from torch import Tensor

FEWEST = 3  # rounds: two points fit any law


def mcnemar(missed_a_M: Tensor, missed_b_M: Tensor) -> float:
    """The exact p of two networks missing the same images equally often, from their misses of the same M images.

    Where only one of the two is wrong, either is with chance 1/2: two-sided binomial, min(1, 2 P(X <= the smaller
    count)) (McNemar, Psychometrika 1947; exact as of Fay, The R Journal 2010). 1 where they miss the same images; 0
    where float64 has nothing smaller. Raises ValueError unless both are bool (M,).
    """
    given = (missed_a_M, missed_b_M)
    if any(x.dtype != torch.bool or x.ndim != 1 or len(x) != len(missed_a_M) for x in given):
        got = " and ".join(f"{tuple(x.shape)} {x.dtype}" for x in given)
        raise ValueError(f"expected the misses (M,) of two networks, bool, got {got}")
    a, b = int((missed_a_M & ~missed_b_M).sum()), int((missed_b_M & ~missed_a_M).sum())
    i = torch.arange(min(a, b) + 1, dtype=torch.float64)
    log_ways = math.lgamma(a + b + 1) - torch.lgamma(i + 1) - torch.lgamma(a + b - i + 1)
    return min(1.0, 2 * math.exp(log_ways.logsumexp(0) - (a + b) * math.log(2)))


def error_rate(misses: float, images: int) -> float:
    """misses / images, but no nearer to 0 or 1 than half an image: who misses none of so few may miss some of more.

    Raises ValueError without images.
    """
    if images < 1:
        raise ValueError(f"expected at least 1 image, got {images}")
    return min(max(misses, 0.5), images - 0.5) / images


def standard_error(misses: int, images: int) -> float:
    """Of an accuracy measured on so many images: sqrt(p (1 - p) / images), p the `error_rate`."""
    p = error_rate(misses, images)
    return math.sqrt(p * (1 - p) / images)


class PowerLaw(NamedTuple):
    """err(n) = a n^-b of n labels, b > 0: error falls, and by less and less (Hestness et al. 2017).

    It is a law of the labels that were fitted and more; it says nothing of fewer.
    """

    log_a: float
    b: float

    def error(self, labels: float) -> float:
        return math.exp(self.log_a - self.b * math.log(labels))

    def gain(self, labels: float, more: float) -> float:
        """By how much the error falls, 0..1, with `more` labels beside those there are."""
        return -self.error(labels) * math.expm1(-self.b * math.log1p(more / labels))

    def worth(self, labels: int, more: int, threshold: float) -> int:
        """How many labels to buy still, until `more` beyond them would gain less than `threshold` > 0."""
        # gain(n) is at most `more` times the slope a b n^-(b + 1): where that falls to the threshold, all are bought.
        most = math.exp((math.log(more * self.b / threshold) + self.log_a) / (self.b + 1))
        buyable = range(labels, max(labels, math.ceil(most)) + 1)
        return bisect_left(buyable, True, key=lambda n: self.gain(n, more) < threshold)


def fit_power_law(labels_R: list[int], misses_R: list[float], images_R: list[int]) -> PowerLaw | None:
    """The law through R networks: labels bought (at least 1), validation images that it misses, and of how many.

    Least squares on log err = log a - b log n, err the `error_rate`; float64. None where that says nothing: fewer than
    3 different numbers of labels, or an error that does not fall.
    """
    if len(set(labels_R)) < FEWEST:
        return None
    log_n = torch.tensor(labels_R, dtype=torch.float64).log()
    log_e = torch.tensor([error_rate(*x) for x in zip(misses_R, images_R, strict=True)], dtype=torch.float64).log()
    x, y = log_n - log_n.mean(), log_e - log_e[0]  # equal errors leave zeros: a slope of exactly 0
    b = -float(x @ y / (x @ x))
    return PowerLaw(float(log_e.mean() + b * log_n.mean()), b) if b > 0 else None
