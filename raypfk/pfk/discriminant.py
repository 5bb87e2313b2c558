"""A label estimator that learns from the validation set: linear discriminants of its features, with a temperature.

Shapes: N pool images, M validation images, D classes, L numbers of a feature vector, V classes kept of an image.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from raypfk.pfk.labels import Voted

COLDEST, HOTTEST = 1e-3, 1e6
FOLDS = 10
ROUNDING = 1e-12
"""Of the scatter of all images: what is left less by taking some away is nothing."""


class Discriminant(NamedTuple):
    """p(y | z) = softmax(z W + b): Gaussian classes of one covariance (linear discriminant analysis, Fisher 1936)."""

    weights: Tensor
    """W (L, D) float64."""
    bias: Tensor
    """b (D,) float64; -inf for a class without a validation image."""

    def posterior(self, z_NL: Tensor) -> Tensor:
        """Probabilities of the classes (N, D) float64. `z_NL` as the validation set's."""
        return (z_NL.double() @ self.weights + self.bias).softmax(1)

    def vote(self, z_NL: Tensor, most: int) -> Voted:
        """The `most` likeliest classes of each image and their probabilities, as if so many votes were for them; of
        equals the first class."""
        shares_NV, classes_NV = self.posterior(z_NL).sort(dim=1, descending=True, stable=True)
        shares_NV, classes_NV = shares_NV[:, :most].float(), classes_NV[:, :most]
        return Voted(classes_NV[:, 0], classes_NV.masked_fill(shares_NV == 0, -1), shares_NV)


def fit_discriminant(z_ML: Tensor, labels_M: Tensor, num_classes: int, shrinkage: float) -> Discriminant:
    """The discriminants of validation features `z_ML`, standardised, and their labels (M,) int64.

    `shrinkage` times the mean variance is added to each variance of the covariance that all classes share (Friedman,
    Regularized discriminant analysis, 1989), and classes are as likely as among the labels. All is divided by the
    temperature (Guo et al., On calibration of modern neural networks, 2017) that suits images which discriminants of
    the others see for the first time, a tenth of each class at a time, neighbours together (of a video's frames some
    would otherwise be on either side): of correlated features they are far too sure. Of n such images at least half a
    one counts as wrong, for n do not show that no error is made. By 1 is divided where the others are not of two
    classes, or no two of one.
    O(M L^2 + L^3). Raises ValueError for labels that do not fit, a shrinkage that is not positive, or features that are
    not finite.
    """
    if len(labels_M) != len(z_ML) or not len(z_ML) or labels_M.dtype != torch.int64:
        raise ValueError(f"expected features (M, L) and M >= 1 labels int64, got {len(z_ML)} and {len(labels_M)}")
    if not 0 <= int(labels_M.min()) <= int(labels_M.max()) < num_classes:
        raise ValueError(f"expected classes 0..{num_classes - 1}, got {int(labels_M.min())}..{int(labels_M.max())}")
    if not shrinkage > 0 or not z_ML.isfinite().all():
        raise ValueError(f"expected a shrinkage > 0 and finite features, got {shrinkage}")
    z_ML = z_ML.double()
    whole = _classes(z_ML, labels_M, num_classes)
    temperature = _temperature(whole, z_ML, labels_M, shrinkage)
    weights_LD, bias_D = _discriminants(whole, shrinkage)
    return Discriminant(weights_LD / temperature, bias_D / temperature)


class _Classes(NamedTuple):
    """Images of each class, the means of their features, and the products of what lies between images and means."""

    count_D: Tensor
    means_DL: Tensor
    scatter_LL: Tensor

    def without(self, z_nL: Tensor, labels_n: Tensor) -> "_Classes":
        """The same of all images but these."""
        apart_nL = z_nL - self.means_DL[labels_n]
        count_D = self.count_D - torch.bincount(labels_n, minlength=len(self.count_D))
        shift_DL = -_sums(apart_nL, labels_n, len(count_D)) / count_D.clamp(min=1)[:, None]
        scatter_LL = self.scatter_LL - apart_nL.T @ apart_nL - (shift_DL.T * count_D) @ shift_DL
        if scatter_LL.trace() < ROUNDING * self.scatter_LL.trace():
            scatter_LL.zero_()
        return _Classes(count_D, self.means_DL + shift_DL, scatter_LL)


def _classes(z_ML: Tensor, labels_M: Tensor, num_classes: int) -> _Classes:
    count_D = torch.bincount(labels_M, minlength=num_classes).double()
    means_DL = _sums(z_ML, labels_M, num_classes) / count_D.clamp(min=1)[:, None]
    apart_ML = z_ML - means_DL[labels_M]
    return _Classes(count_D, means_DL, apart_ML.T @ apart_ML)


def _sums(x_ML: Tensor, labels_M: Tensor, num_classes: int) -> Tensor:
    return x_ML.new_zeros(num_classes, x_ML.shape[1]).index_add_(0, labels_M, x_ML)


def _discriminants(classes: _Classes, shrinkage: float) -> tuple[Tensor, Tensor]:
    """log p(y, z) = z W + b + what no class differs in."""
    count_D, means_DL, scatter_LL = classes
    covariance_LL = scatter_LL / count_D.sum()
    variance = float(covariance_LL.diagonal().mean())
    covariance_LL.diagonal().add_(shrinkage * variance if variance > 0 else 1.0)
    weights_LD = torch.cholesky_solve(means_DL.T, torch.linalg.cholesky(covariance_LL))
    return weights_LD, (count_D / count_D.sum()).log() - (means_DL.T * weights_LD).sum(0) / 2


def folds(labels_M: Tensor) -> Tensor:
    """Which of `FOLDS` each image is in (M,): of each class about as many in each, neighbours together."""
    fold_M = torch.empty_like(labels_M)
    for label in labels_M.unique():
        own_M = labels_M == label
        count = int(own_M.sum())
        fold_M[own_M] = torch.arange(count, device=labels_M.device) * FOLDS // count
    return fold_M


def _temperature(whole: _Classes, z_ML: Tensor, labels_M: Tensor, shrinkage: float) -> float:
    """What to divide by for the least cross-entropy of each fold's images by the discriminants of the others.

    Of each of the n images' labels 1 / 2n is spread over the classes that the others know, lest a few images that are
    all told right make it COLDEST.
    """
    fold_M, found = folds(labels_M), []
    for fold in range(FOLDS):
        held_M = fold_M == fold
        others = whole.without(z_ML[held_M], labels_M[held_M])
        known_D = others.count_D > 0
        if others.count_D.max() < 2 or known_D.sum() < 2:
            continue
        weights_LD, bias_D = _discriminants(others, shrinkage)
        seen_M = held_M & known_D[labels_M]
        logits_nD = (z_ML[seen_M] @ weights_LD + bias_D).where(known_D, -torch.inf)
        own_n = logits_nD.gather(1, labels_M[seen_M, None])[:, 0]
        found.append((logits_nD, own_n, logits_nD[:, known_D].mean(1)))
    if not any(len(own_n) for _, own_n, _ in found):
        return 1.0
    logits_nD, own_n, mean_n = (torch.cat(parts) for parts in zip(*found, strict=True))
    finite_nD, target_n = logits_nD.where(logits_nD > -torch.inf, 0.0), torch.lerp(own_n, mean_n, 0.5 / len(own_n))
    low, high = math.log(1 / HOTTEST), math.log(1 / COLDEST)
    for _ in range(50):  # the cross-entropy is convex in 1 / T: bisect its slope
        middle = (low + high) / 2
        expected_n = ((logits_nD * math.exp(middle)).softmax(1) * finite_nD).sum(1)
        low, high = (low, middle) if float((expected_n - target_n).mean()) > 0 else (middle, high)
    return math.exp(-low)
