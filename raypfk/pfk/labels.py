"""Label estimators S that stand in for the unknown label of a pool image (section 4.3).

Shapes: N pool images, M validation images, D classes, L descriptor length.
"""

from dataclasses import replace

import torch
from torch import Tensor

from raypfk.pfk.kernel import Descriptors, Kernel
from raypfk.pfk.topk import TopK


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
    if not len(zref_ML) or len(labels_M) != len(zref_ML):
        got = f"{len(zref_ML)} and {len(labels_M)}"
        raise ValueError(f"expected one or more validation images and as many labels, got {got}")
    top = TopK(len(z_NL), 1, device=z_NL.device)
    keys_M = torch.arange(len(zref_ML), device=zref_ML.device)
    top.add(replace(kernel, name="pcc"), Descriptors(z_NL, z_NL), Descriptors(zref_ML, zref_ML), keys_M)
    index_N = top.result()[1][:, 0]
    if (index_N < 0).any():
        raise ValueError(f"{int((index_N < 0).sum())} of {len(index_N)} feature rows match nothing: not finite")
    return labels_M[index_N], index_N
