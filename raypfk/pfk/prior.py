"""Class shares of the pool, from what a label estimator says of its images, and what it then would have said.

Shapes: N pool images, D classes, V classes kept of an image, -1 for none.
"""

import torch
from torch import Tensor

STEPS = 200
"""Of EM: more change the fourth digit of a rare class's share."""


def class_shares(classes_NV: Tensor, shares_NV: Tensor, prior_D: Tensor, least: float) -> Tensor:
    """Shares (D,) float64 of the classes among N images whose posteriors are of images with the shares `prior_D`.

    EM (Saerens et al., Adjusting the outputs of a classifier to new a priori probabilities, 2002, eq. 9), but for this:
    no class that `prior_D` has is taken to be rarer than `least` (before all are made to sum to 1), as EM makes a rare
    class ever rarer where posteriors are less sure than they could be. `classes_NV` int64 and `shares_NV` float, 0..1,
    are as `Votes` takes them.
    Raises ValueError for shapes that do not fit, or a `least` that is not in 0..1/D.
    """
    if classes_NV.shape != shares_NV.shape or not 0 <= least <= 1 / len(prior_D):
        got = f"{tuple(classes_NV.shape)}, {tuple(shares_NV.shape)} and {least}"
        raise ValueError(f"expected classes and shares (N, V) and a least share of 0..1/{len(prior_D)}, got {got}")
    prior_D = prior_D.double()
    found_D, there_D = prior_D.clone(), prior_D > 0
    for _ in range(STEPS if len(classes_NV) else 0):
        posterior_NV = reweighted(classes_NV, shares_NV, _ratio(found_D, prior_D))
        sums_D = torch.zeros_like(prior_D).scatter_add_(0, classes_NV.clamp(min=0).flatten(), posterior_NV.flatten())
        found_D = (sums_D / sums_D.sum()).clamp(min=least).where(there_D, 0.0)
        found_D = found_D / found_D.sum()
    return found_D


def reweighted(classes_NV: Tensor, shares_NV: Tensor, ratio_D: Tensor) -> Tensor:
    """The posteriors (N, V) float64 where class d is `ratio_D`[d] times as frequent; they sum to what they did."""
    weighted_NV = shares_NV.double() * ratio_D.double()[classes_NV.clamp(min=0)] * (classes_NV >= 0)
    before_N1, after_N1 = shares_NV.double().sum(1, keepdim=True), weighted_NV.sum(1, keepdim=True)
    return weighted_NV * (before_N1 / after_N1.where(after_N1 > 0, 1.0))


def _ratio(shares_D: Tensor, prior_D: Tensor) -> Tensor:
    return (shares_D / prior_D).where(prior_D > 0, 0.0)


def prior_ratio(classes_NV: Tensor, shares_NV: Tensor, labels_M: Tensor, num_classes: int, least: float) -> Tensor:
    """How many times as frequent (D,) float64 each class is among the images as among the labels (M,) int64."""
    prior_D = torch.bincount(labels_M, minlength=num_classes).double() / len(labels_M)
    return _ratio(class_shares(classes_NV, shares_NV, prior_D, least), prior_D)
