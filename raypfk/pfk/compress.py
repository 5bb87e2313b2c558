"""Descriptors made smaller (section 4.1: "can be further compressed using PCA, quantization"), and read back.

Every scale of a standardised vector has length 1 or is zero. Both ways keep that: a narrow number is read back as a
direction, so int8 needs no scale stored beside it (it is 1 / the length of the integers), and a projection is rescaled.
Shapes: N images, L = sum of L_j descriptor length, d_j directions kept of scale j.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from raypfk.pfk.descriptors import CONSTANT, check_lengths

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""What a descriptor's numbers can be stored as."""

LEVELS = 127  # of int8 to either side of zero


def quantise(x_NL: Tensor, lengths: Sequence[int], dtype: str) -> Tensor:
    """Standardised float32 (N, L) as `dtype`, one of `DTYPES`; `dequantise` reads it back.

    int8: symmetric, a scale of a vector by its own largest number, q = round(127 x / max|x|).
    Raises ValueError for another dtype, lengths that do not add up to L, and for NaN or infinity, which names the row.
    """
    if dtype not in DTYPES:
        raise ValueError(f"expected dtype {', '.join(DTYPES)}, got {dtype!r}")
    parts = _split(x_NL, lengths)
    bad_N = ~x_NL.isfinite().all(1)
    if bad_N.any():
        raise ValueError(f"expected finite descriptors, got NaN or infinity in row {int(bad_N.nonzero()[0])}")
    if dtype != "int8":
        return x_NL.to(DTYPES[dtype])
    return torch.cat([_levels(x_Nl) for x_Nl in parts], dim=1)


def dequantise(stored_NL: Tensor, lengths: Sequence[int]) -> Tensor:
    """What `quantise` made, as float32 (N, L): float32 itself, not copied; else each scale at unit length or zero.

    A row's numbers do not depend on the rows beside it. NaN stays NaN, in its whole scale; so becomes infinity.
    Raises ValueError for another dtype or lengths that do not add up to L.
    """
    if stored_NL.dtype not in DTYPES.values():
        raise ValueError(f"expected descriptors of {', '.join(DTYPES)}, got {stored_NL.dtype}")
    x_NL = stored_NL.float()
    parts = _split(x_NL, lengths)
    if stored_NL.dtype == torch.float32:
        return x_NL
    for x_Nl in parts:
        norm_N1 = _exact_norm(x_Nl)
        x_Nl.div_(norm_N1.where(norm_N1 != 0, 1.0))
    return x_NL


def principal_directions(x_NL: Tensor, lengths: Sequence[int], dims: int) -> tuple[Tensor, ...]:
    """Of each scale, the orthonormal float32 (L_j, d_j) that keeps most of the vectors; d_j = min(dims, L_j).

    The top eigenvectors of the second moment, not of the covariance: a correlation is a dot product of the vectors as
    they are, without another mean taken off. Of a direction's two signs, its largest number's is positive.
    Raises ValueError for dims < 1 or lengths that do not add up to L.
    """
    if dims < 1:
        raise ValueError(f"expected at least 1 direction, got {dims}")
    return tuple(_directions(x_Nl.double(), dims) for x_Nl in _split(x_NL, lengths))


def project(x_NL: Tensor, directions: Sequence[Tensor]) -> Tensor:
    """Standardised (N, L) on `directions`, one (L_j, d_j) a scale, each at unit length again: float32 (N, sum of d_j).

    A scale that is zero, or that the directions keep nothing of but rounding, becomes zeros. Without the rescaling an
    image would match the less, the more of it was cut off. Raises ValueError where the L_j do not add up to L.
    """
    parts = _split(x_NL, [len(b_ld) for b_ld in directions])
    return torch.cat([_project_scale(x_Nl, b_ld) for x_Nl, b_ld in zip(parts, directions, strict=True)], dim=1)


def _levels(x_Nl: Tensor) -> Tensor:
    most_N1 = x_Nl.abs().amax(1, keepdim=True)
    return (x_Nl.double() * LEVELS / most_N1.where(most_N1 > 0, 1.0)).round().to(torch.int8)


def _exact_norm(x_Nl: Tensor) -> Tensor:
    """Lengths (N, 1) float32 of rows of narrow numbers, the same in whatever order a library sums them.

    Without the numbers up to 2^-19, squares of 8 to 11 significant bits are whole multiples of 2^-52: float64 adds
    those up to 2 without rounding, and int8 are whole. (What is left out changes a length by less than 1e-11 L_j.)
    """
    return torch.linalg.vector_norm(F.hardshrink(x_Nl, 2.0**-19), dim=1, keepdim=True, dtype=torch.float64).float()


def _directions(x_Nl: Tensor, dims: int) -> Tensor:
    _, vectors_ll = torch.linalg.eigh(x_Nl.T @ x_Nl)  # eigenvalues ascend
    b_ld = vectors_ll.flip(1)[:, :dims]
    largest_1d = b_ld.gather(0, b_ld.abs().argmax(0, keepdim=True))
    return (b_ld * largest_1d.sign()).float().contiguous()


def _project_scale(x_Nl: Tensor, b_ld: Tensor) -> Tensor:
    y_Nd = x_Nl.double() @ b_ld.to(x_Nl.device).double()
    norm_N1 = y_Nd.norm(dim=1, keepdim=True)
    kept_N1 = norm_N1 > CONSTANT
    return (y_Nd / norm_N1.where(kept_N1, 1.0)).where(kept_N1, 0.0).float()


def _split(x_NL: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    check_lengths(lengths)
    if x_NL.ndim != 2 or x_NL.shape[1] != sum(lengths):
        raise ValueError(f"expected (N, {sum(lengths)}) for scales of {tuple(lengths)}, got {tuple(x_NL.shape)}")
    return x_NL.split(list(lengths), dim=1)
