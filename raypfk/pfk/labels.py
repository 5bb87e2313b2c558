"""Label estimators S that stand in for the unknown label of a pool image (section 4.3).

Shapes: N pool images, M validation images, D classes, L descriptor length, V voters, K augmented samples of an image.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from raypfk.pfk.descriptors import CONSTANT
from raypfk.pfk.kernel import Descriptors, Kernel
from raypfk.pfk.topk import TopK

# What `mc_information` adds to each variance, as a share of their mean: K samples span at most K - 1 of L directions.
RIDGE = 1e-3


def predicted(logits: Tensor) -> Tensor:
    """S = y-hat (section 4.3 b): the class (N,) int64 of the largest of the logits (N, D); the first of equals."""
    return logits.argmax(1)


def neighbour(z_NL: Tensor, zref_ML: Tensor, labels_M: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """S = p(y, z) (section 4.3 e): the label of the validation image with the largest `pcc` (eq. 6).

    `z_NL` and `zref_ML` are standardised features, `labels_M` the validation labels. Of `kernel` only the scales and
    their weights are used: neighbours are found by pcc whatever its name. Returns (labels (N,), index (N,) int64 into
    the validation set); exact, the smallest index among equals.
    Raises ValueError without validation images, and for a row that no finite score reaches (a NaN).
    """
    index_N = _nearest(z_NL, zref_ML, labels_M, kernel, 1)[:, 0]
    return labels_M[index_N], index_N


class Voted(NamedTuple):
    """What the nearest validation images, or discriminants, say of N pool images; `classes` and `shares` are as `Votes`
    takes them."""

    labels: Tensor
    """(N,) int64, the class of most votes; of equals the one whose nearest voter is nearest."""
    classes: Tensor
    """(N, V) int64, the classes voted for, each once: by votes descending, then by their nearest voter; -1 for none."""
    shares: Tensor
    """(N, V) float32, the classes' shares of the votes, 0 for none."""

    def soft(self, num_classes: int) -> Tensor:
        """Soft labels (N, D) float64: each class's share in its place. Raises ValueError for a class beyond D - 1."""
        if (self.classes >= num_classes).any():
            raise ValueError(f"expected classes 0..{num_classes - 1}, got {int(self.classes.max())}")
        zeros_ND = self.shares.new_zeros(len(self.shares), num_classes, dtype=torch.float64)
        return zeros_ND.scatter_add_(1, self.classes.clamp(min=0), self.shares.double())


def vote(z_NL: Tensor, zref_ML: Tensor, labels_M: Tensor, kernel: Kernel, k: int) -> Voted:
    """The votes of the k nearest validation images, as `neighbour` finds one: p(y | z) by k of them (section 4.3 e).

    Takes what `neighbour` takes, `labels_M` int64 >= 0. V = min(k, M) vote; a validation image with a NaN does not.
    Raises ValueError as `neighbour` does, for k < 1 and for other labels.
    """
    if labels_M.dtype != torch.int64 or (labels_M < 0).any():
        raise ValueError(f"expected validation labels (M,) int64 >= 0, got {labels_M.dtype} or a negative one")
    index_NV = _nearest(z_NL, zref_ML, labels_M, kernel, k)
    class_NV, rank_NV = labels_M[index_NV], torch.arange(index_NV.shape[1], device=z_NL.device).expand_as(index_NV)
    zeros_ND = index_NV.new_zeros(len(index_NV), int(labels_M.max()) + 1)
    count_ND = zeros_ND.scatter_add(1, class_NV, (index_NV >= 0).long())
    first_ND = zeros_ND.scatter_reduce(1, class_NV, rank_NV, "amin", include_self=False)
    votes_NV = count_ND.gather(1, class_NV) * (first_ND.gather(1, class_NV) == rank_NV)  # a class's first voter has all
    votes_NV, order_NV = votes_NV.sort(dim=1, descending=True, stable=True)
    classes_NV = class_NV.gather(1, order_NV).masked_fill(votes_NV == 0, -1)
    return Voted(classes_NV[:, 0], classes_NV, (votes_NV / votes_NV.sum(1, keepdim=True)).float())


def _nearest(z_NL: Tensor, zref_ML: Tensor, labels_M: Tensor, kernel: Kernel, k: int) -> Tensor:
    """Nearest validation images by pcc, (N, min(k, M)) int64, of equals the smallest index; -1 for one with a NaN."""
    if not len(zref_ML) or len(labels_M) != len(zref_ML):
        got = f"{len(zref_ML)} and {len(labels_M)}"
        raise ValueError(f"expected one or more validation images and as many labels, got {got}")
    top = TopK(len(z_NL), min(k, len(zref_ML)), device=z_NL.device)
    keys_M = torch.arange(len(zref_ML), device=zref_ML.device)
    top.add(replace(kernel, name="pcc"), Descriptors(z_NL, z_NL), Descriptors(zref_ML, zref_ML), keys_M)
    index_NV = top.result()[1]
    lost_N = index_NV[:, 0] < 0
    if lost_N.any():
        raise ValueError(f"{int(lost_N.sum())} of {len(lost_N)} feature rows match nothing: not finite")
    return index_NV


def mc_trace(z_KNL: Tensor, g_KNDL: Tensor) -> Tensor:
    """S = tr(C_zg) (section 4.3 c), (N, D) float64: how features and Fisher scores vary together over K samples.

    `z_KNL` are the features of K augmented samples of each image, `g_KNDL` their Fisher scores of all classes, both
    raw (not standardised) and taken as float32. The estimated label is `argmax(1)`. A channel that is constant up to
    float32 rounding counts as constant. -inf for an image and class with a NaN or an infinity.
    Raises ValueError for K < 2 and for shapes that do not fit.
    """
    _check_samples(z_KNL, g_KNDL)
    z_KNL, finite_N = _centred(z_KNL)
    g_KNDL, finite_ND = _centred(g_KNDL)
    trace_ND = torch.einsum("knl,kndl->nd", z_KNL, g_KNDL) / (len(z_KNL) - 1)
    return trace_ND.where(finite_ND & finite_N[:, None], -torch.inf)


def mc_information(z_KNL: Tensor, g_KNDL: Tensor) -> Tensor:
    """S = I(z; g) of Gaussian vectors (section 4.3 d), (N, D) float64 in nats: 0.5 log(|C_zz| |C_gg| / |C_zg,zg|).

    Takes and raises what `mc_trace` does, with the same -inf. z of an image, and g of an image and class, are scaled to
    a mean variance of 1 over their channels, as their units differ; then `RIDGE` is added to every variance. 0 where z
    or g is constant. O(K^3): |r I_L + X^T X| = r^L |I_K + X X^T / r| for X (K, L), and the powers of r cancel.
    """
    _check_samples(z_KNL, g_KNDL)
    z_KNL, finite_N = _centred(z_KNL)
    g_KNDL, finite_ND = _centred(g_KNDL)
    z_NKK, g_NDKK = _relative_gram(z_KNL), _relative_gram(g_KNDL)
    joint_NDKK = z_NKK[:, None] + g_NDKK
    information_ND = _half_log_det(z_NKK)[:, None] + _half_log_det(g_NDKK) - _half_log_det(joint_NDKK)
    varies_ND = z_NKK.any(-1).any(-1)[:, None] & g_NDKK.any(-1).any(-1)  # 0 also where a GPU rounds by batch
    return information_ND.where(varies_ND, 0.0).where(finite_ND & finite_N[:, None], -torch.inf)


def _check_samples(z_KNL: Tensor, g_KNDL: Tensor) -> None:
    z, g = tuple(z_KNL.shape), tuple(g_KNDL.shape)
    if len(z) != 3 or len(g) != 4 or z != (*g[:2], g[3]) or len(z_KNL) < 2:
        raise ValueError(f"expected features (K, N, L) and Fisher scores (K, N, D, L) for K >= 2, got {z} and {g}")


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Samples (K, ..., L) less their mean, zeros where constant or not finite, float64; mask (...) of the finite."""
    x = x.detach().float().double()
    finite = x.isfinite().all(-1).all(0)
    x = x.where(finite[..., None], 0.0)
    low, high = x.aminmax(dim=0)
    varies = high - low > CONSTANT * torch.maximum(-low, high)
    return (x - x.mean(0)).where(varies, 0.0), finite


def _relative_gram(x: Tensor) -> Tensor:
    """X X^T / (K - 1), (..., K, K), of centred samples (K, ..., L) at a mean variance of 1 / RIDGE; zeros of zeros."""
    gram = torch.einsum("k...l,j...l->...kj", x, x)
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]  # (K - 1) L times the mean variance
    return gram * (x.shape[-1] / RIDGE / total.where(total > 0, 1.0))


def _half_log_det(gram: Tensor) -> Tensor:
    """0.5 log |I + gram|, (...), by Cholesky."""
    factor = torch.linalg.cholesky(gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
