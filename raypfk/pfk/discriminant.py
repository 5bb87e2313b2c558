"""A label estimator that learns from the validation set: linear discriminants of its features, with a temperature.

Shapes: N pool images, M validation images, D classes, L numbers of a feature vector, V classes kept of an image.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from raypfk.pfk.labels import Voted

COLDEST, HOTTEST = 1e-3, 1e3


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
    the other half of the validation set see for the first time: of correlated features they are far too sure. Of n such
    images at least half a one counts as wrong, for n do not show that no error is made. By 1 is divided where the
    halves have no two classes, or no two images of one, to go by.
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
    temperature = _temperature(z_ML, labels_M, num_classes, shrinkage)
    weights_LD, bias_D = _discriminants(z_ML, labels_M, num_classes, shrinkage)
    return Discriminant(weights_LD / temperature, bias_D / temperature)


def _discriminants(z_ML: Tensor, labels_M: Tensor, num_classes: int, shrinkage: float) -> tuple[Tensor, Tensor]:
    """log p(y, z) = z W + b + what no class differs in."""
    length, count_D = z_ML.shape[1], torch.bincount(labels_M, minlength=num_classes).double()
    means_DL = z_ML.new_zeros(num_classes, length).index_add_(0, labels_M, z_ML) / count_D.clamp(min=1)[:, None]
    apart_ML = z_ML - means_DL[labels_M]
    covariance_LL = apart_ML.T @ apart_ML / len(z_ML)
    variance = float(covariance_LL.diagonal().mean())
    covariance_LL.diagonal().add_(shrinkage * variance if variance > 0 else 1.0)
    weights_LD = torch.cholesky_solve(means_DL.T, torch.linalg.cholesky(covariance_LL))
    return weights_LD, (count_D / len(z_ML)).log() - (means_DL.T * weights_LD).sum(0) / 2


def _temperature(z_ML: Tensor, labels_M: Tensor, num_classes: int, shrinkage: float) -> float:
    """What to divide by for the least cross-entropy of each half's images by the other half's discriminants.

    Of each of the n images' labels 1 / 2n is spread over the classes that the other half knows, lest a few images that
    are all told right make it COLDEST.
    """
    halves, found = torch.arange(len(z_ML), device=z_ML.device) % 2 == 0, []
    for half_M in (halves, ~halves):
        count_D = torch.bincount(labels_M[half_M], minlength=num_classes)
        if count_D.max() < 2 or count_D.count_nonzero() < 2:
            continue
        weights_LD, bias_D = _discriminants(z_ML[half_M], labels_M[half_M], num_classes, shrinkage)
        seen_M = ~half_M & (count_D > 0)[labels_M]
        logits_nD = (z_ML[seen_M] @ weights_LD + bias_D).where(count_D > 0, -torch.inf)
        own_n = logits_nD.gather(1, labels_M[seen_M, None])[:, 0]
        found.append((logits_nD, own_n, logits_nD[:, count_D > 0].mean(1)))
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
