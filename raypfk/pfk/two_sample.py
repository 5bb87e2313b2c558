"""The kernel two-sample test: could two sets of images be drawn from one distribution?

Gretton, Borgwardt, Rasch, Schölkopf and Smola, A Kernel Two-Sample Test, JMLR 13, 2012.
Shapes: N and M images of the two sets, T = N + M of both, L numbers of an image's features, B splits of the T images.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from raypfk.pfk import draws

EQUAL = 1e-12  # of the largest squared distance: what rounding may leave between equal rows
ROUNDING = 1e-12  # what the order of a sum may change of a statistic, whose terms are at most 1


class TwoSample(NamedTuple):
    """mmd2: the squared distance of the two distributions as estimated, -2..2, and around 0 where they are one.
    p: the chance of so large a value if they are one, 1 / (permutations + 1)..1."""

    mmd2: float
    p: float


def kernel_two_sample(x_NL: Tensor, y_ML: Tensor, seed: int, permutations: int = 1000) -> TwoSample:
    """The unbiased MMD^2 (eq. 3) between two sets of features, standardised and of one L, and its permutation test.

    The kernel is Gaussian, exp(-d^2 / (2 s^2)), s the median distance of the pairs of different images (section 8: the
    median heuristic); float64. The statistic does not depend on the order of the rows, nor on which set is named first,
    but for rounding. p is the share of splits of all T images into N and M, the given one among them, that are at least
    as far apart. `seed` draws the others, the same on every device.

    Rows that are constant in a scale (zeros, once they are standardised) are images like others; where all rows are
    equal, mmd2 is 0 and p is 1. O(T^2 (L + permutations)) time, O(T (T + permutations)) memory.
    Raises ValueError for fewer than 2 rows in either set, where eq. 3 is not defined, other shapes, NaN or infinity.
    """
    for x in (x_NL, y_ML):
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != x_NL.shape[1] or not x.isfinite().all():
            shapes = f"{tuple(x_NL.shape)} and {tuple(y_ML.shape)}"
            raise ValueError(f"expected finite features (N, L) and (M, L) with N and M at least 2, got {shapes}")
    k_TT = _gaussian(torch.cat([x_NL, y_ML]).detach().double())
    mmd2_B = _mmd2(k_TT, _splits(len(x_NL), len(k_TT), permutations, seed).to(k_TT))
    return TwoSample(float(mmd2_B[0]), float((mmd2_B >= mmd2_B[0] - ROUNDING).double().mean()))


def _gaussian(x_TL: Tensor) -> Tensor:
    """The kernel (T, T), its diagonal 0: eq. 3 leaves it out."""
    x_TL = x_TL - x_TL[0]  # distances stay; what products round is then small beside the largest of them
    square_T = (x_TL * x_TL).sum(1)
    d2_TT = (square_T[:, None] + square_T - 2 * x_TL @ x_TL.T).clamp_(min=0)
    apart = d2_TT[d2_TT > EQUAL * d2_TT.amax()]  # each pair twice
    s2 = apart.median() if len(apart) else 1.0
    return (d2_TT / (-2 * s2)).exp_().fill_diagonal_(0)


def _splits(n: int, total: int, permutations: int, seed: int) -> Tensor:
    """(B, T) bool: the images of the first set, as given in row 0, and in each row after it n drawn at random."""
    salts_T = draws.bits(torch.tensor([seed]), torch.arange(total))
    order = draws.uniform(salts_T, torch.arange(permutations)[:, None]).argsort(dim=1, stable=True)
    given_1T = (torch.arange(total) < n)[None]
    return torch.cat([given_1T, given_1T.expand_as(order).gather(1, order)])


def _mmd2(k_TT: Tensor, first_BT: Tensor) -> Tensor:
    """Eq. 3 of each split (B,). A set's sum over its pairs is s^T K s, s its indicator: one product for all splits."""
    n_B = first_BT.sum(1)
    m_B = len(k_TT) - n_B
    with_all_B = first_BT @ k_TT.sum(1)
    within_B = ((first_BT @ k_TT) * first_BT).sum(1)
    across_B = with_all_B - within_B
    rest_B = k_TT.sum() - with_all_B - across_B
    return within_B / (n_B * (n_B - 1)) + rest_B / (m_B * (m_B - 1)) - 2 * across_B / (n_B * m_B)
