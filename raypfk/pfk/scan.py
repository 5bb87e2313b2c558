"""The scan: which pairs of centers and pool images can score as high as a floor? Blocked, in low precision, proven.

Descriptors are rounded to `int8` or `bfloat16` (or left `float32`) and multiplied in tiles that stay in a core's cache.
From the products and the distance that rounding moved each vector follows what each pair's score can be at most; no
pair that reaches its center's floor is missed, whatever the precision, and the few others that come along are told
apart by exact scores later (topk.py). Nothing of size M x B is kept: one tile of scores at a time.

Shapes: M centers, B pool images, T matrices (of each scale that counts z and, but for `pcc`, g), l = L_j numbers of
one, S terms of the kernel's sum.
"""

import time
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raypfk.pfk import fused, loops
from raypfk.pfk.kernel import MAX_LENGTH, Descriptors, Kernel

Precision = Literal["float32", "bfloat16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")

TILE_CENTERS, TILE_POOL = 512, 256  # by trial the best of a core with 1.25 MiB of its own cache
DENSE_CENTERS, DENSE_POOL = 8192, 4096  # where torch scores whole tiles: memory, and calls
FUSED_CAPACITY = 256  # survivors of one center that the fused kernel lists
Z, G = 0, 1  # in a scale's pair of matrices
ONE_BY_ONE = 1 / 32  # of a tile's pairs whose second factor may be computed one by one
U_BFLOAT16 = 2.0**-8
LONGEST_INT8 = (2**31 - 1) // 127**2  # numbers of a scale: their products' sum fits int32

Pairs = tuple[Tensor, Tensor]
"""Rows of centers and of pool images (Q,), int64."""


@dataclass(frozen=True)
class Rounded:
    """Descriptors as a scan reads them, one matrix (N, l) for each of the T.

    steps_TN: float32, what 1 in a row of a matrix stands for. errors_TN: float32, an upper bound on the distance
    between a vector and what was kept of it. lengths_TN: float32, of the vectors, NaN where one holds a NaN; where they
    were found on the way. whole: the descriptors that the matrices are slices of, if they are.
    """

    precision: Precision
    matrices: tuple[Tensor, ...]
    steps_TN: Tensor
    errors_TN: Tensor
    lengths_TN: Tensor | None = None
    whole: Descriptors | None = None

    def rows(self, index: slice | Tensor) -> "Rounded":
        matrices = tuple(x[index] for x in self.matrices)
        steps_TN, errors_TN = self.steps_TN[:, index], self.errors_TN[:, index]
        return Rounded(self.precision, matrices, steps_TN, errors_TN, whole=self.whole and self.whole.rows(index))


def supported(kernel: Kernel, device: torch.device) -> tuple[Precision, ...]:
    """The precisions that give right products for a kernel here, float32 among them."""
    fits = max(kernel.lengths) <= LONGEST_INT8 and (device.type != "cpu" or _int8_products_are_exact())
    return PRECISIONS if fits else PRECISIONS[:-1]


@lru_cache(maxsize=1)
def _int8_products_are_exact() -> bool:
    """Whether sums of int8 products are whole: without VNNI instructions, oneDNN adds pairs of them up to 32,767."""
    codes = torch.randint(-127, 128, (TILE_POOL, 513), generator=torch.Generator().manual_seed(0))
    codes[:64], codes[64:128] = 127, codes[64:128].sign() * 127
    low, exact = codes.to(torch.int8), codes.double() @ codes.double().T
    try:
        return torch.equal(torch._int_mm(low, low.T).double(), exact) and torch.equal(
            torch._int_mm(low[:1], low.T).double(), exact[:1]
        )
    except (RuntimeError, AttributeError):
        return False


def round_to(kernel: Kernel, precision: Precision, part: Descriptors) -> Rounded:
    """Standardised float32 descriptors (N, L) in `precision`; int8 is symmetric, with one step per vector."""
    if precision == "int8":
        return _round_to_int8(kernel, part)
    whole = part.to(torch.bfloat16) if precision == "bfloat16" else part
    matrices = kernel.matrices(whole)
    errors_TN = part.z.new_zeros(len(matrices), len(part.z))
    if precision == "bfloat16":
        for error, x, y in zip(errors_TN, kernel.matrices(part), matrices, strict=True):
            error.copy_(_upper((x - y).norm(dim=1)))
    return Rounded(precision, matrices, torch.ones_like(errors_TN), errors_TN, whole=whole)


def _upper(length_N: Tensor) -> Tensor:
    return length_N * float(loops.SLACK) + float(loops.LEAST)  # computed in float32, it is itself rounded


def _round_to_int8(kernel: Kernel, part: Descriptors) -> Rounded:
    vectors = kernel.vectors(part)
    matrices = tuple(x[:, span].new_empty(x[:, span].shape, dtype=torch.int8) for x, span in vectors)
    facts_3TN = part.z.new_empty(3, len(vectors), len(part.z))
    for i, (x_NL, span) in enumerate(vectors):
        if x_NL.device.type == "cpu":
            arrays = (x.numpy() for x in (matrices[i], *facts_3TN[:, i]))
            loops.round_to_int8(x_NL.contiguous().numpy(), span.start, *arrays)
        else:
            _round_rows(x_NL[:, span], matrices[i], *facts_3TN[:, i])
    return Rounded("int8", matrices, *facts_3TN)


def _round_rows(x_Nl: Tensor, codes_Nl: Tensor, step_N: Tensor, error_N: Tensor, length_N: Tensor) -> None:
    torch.div(x_Nl.abs().amax(1), 127, out=step_N).clamp_(min=float(loops.SMALLEST_STEP))
    codes_Nl.copy_((x_Nl / step_N[:, None]).round_().clamp_(-127, 127))
    error_N.copy_(_upper((x_Nl - codes_Nl * step_N[:, None]).norm(dim=1)))
    length_N.copy_(x_Nl.norm(dim=1))


class Bounds(NamedTuple):
    """What makes of products the largest possible scores, and what these must reach; float32."""

    weights_S: Tensor
    center_steps_TM: Tensor
    center_errors_TM: Tensor
    pool_steps_TB: Tensor
    pool_errors_TB: Tensor
    factor_B: Tensor
    limit_M: Tensor


def _bounds(kernel: Kernel, centers: Rounded, pool: Rounded, floor_M: Tensor, factor_B: Tensor | None) -> Bounds:
    """A correlation is off by |z_m - ẑ_m| |z_n| + |ẑ_m| |z_n - ẑ_n| at most (Cauchy-Schwarz): one part of it is the
    center's, the other, with the largest |ẑ_m|, the image's."""
    error_TM, error_TB = centers.errors_TN * MAX_LENGTH, pool.errors_TN
    if error_TM.numel():
        error_TB = error_TB * (MAX_LENGTH + centers.errors_TN.amax(1, keepdim=True))
    if centers.precision == "bfloat16":  # and products come out in bfloat16
        error_TB = error_TB + 1.02 * U_BFLOAT16
    weights = [w for _, w in kernel.used_scales for _ in range(2 if kernel.name == "pfk-sum" else 1)]
    factor_B = torch.ones_like(error_TB[0]) if factor_B is None else factor_B
    limit_M = floor_M - 2 * kernel.error_bound()
    parts = centers.steps_TN, error_TM, pool.steps_TN, error_TB, factor_B, limit_M
    return Bounds(error_TB.new_tensor(weights), *(x.contiguous() for x in parts))


def survivors(
    kernel: Kernel,
    centers: Rounded,
    pool: Rounded,
    floor_M: Tensor,
    factor_B: Tensor | None = None,
    capacity: int | None = None,
) -> Pairs | None:
    """All pairs whose score (times `factor_B` (B,) float32 in 0..1) reaches `floor_M` (M,) float32, in any order.

    Pairs that just fail to reach it may come along. None where there are more than `capacity`. A product of r and s
    that were rounded by a and e is at most r s + |s| a + |r| e + a e: where both are small, as of nearly all pairs,
    so is the margin.
    """
    capacity = len(floor_M) * pool.errors_TN.shape[1] if capacity is None else capacity
    bounds = _bounds(kernel, centers, pool, floor_M, factor_B)
    if floor_M.device.type == "cpu":
        return _by_tiles(kernel, centers, pool, bounds, capacity)
    if factor_B is None and pool.whole and fused.available(floor_M.device):
        return _by_fused_kernel(kernel, centers, pool, bounds, capacity)
    return _by_torch(kernel, centers, pool, bounds, capacity)


def _by_tiles(kernel: Kernel, centers: Rounded, pool: Rounded, bounds: Bounds, capacity: int) -> Pairs | None:
    """On a CPU: products of a tile by a library, all else in one pass over them while they are in cache."""
    pairs, found, m = torch.empty(2, capacity, dtype=torch.int32), 0, len(bounds.limit_M)
    search = _Search(kernel, centers, pool, bounds, pairs.numpy())
    memory = _Products.memory(centers, min(TILE_CENTERS, m))
    tiles = [_Products(centers, row, min(TILE_CENTERS, m - row), memory) for row in range(0, m, TILE_CENTERS)]
    for i, images in enumerate(zip(*(x.split(TILE_POOL) for x in pool.matrices), strict=True)):
        for tile in tiles:
            found = search.tile(tile, images, i * TILE_POOL, found)
            if found < 0:
                return None
    rows, cols = pairs[:, :found].long()
    return rows, cols


class _Search:
    """Finds the survivors of tiles; of a `pfk` score by one of its factors first, as long as that leaves few."""

    def __init__(self, kernel: Kernel, centers: Rounded, pool: Rounded, bounds: Bounds, pairs_2C: np.ndarray):
        self._paired, self._pairs_2C, self._bounds = kernel.name == "pfk", pairs_2C, tuple(x.numpy() for x in bounds)
        self._firsts = [Z, G] if self._paired and centers.precision == "int8" else []
        self._codes = [tuple(x.numpy() for x in part.matrices) for part in (centers, pool)] if self._firsts else []

    def tile(self, tile: "_Products", images: tuple[Tensor, ...], col: int, found: int) -> int:
        """Appends to the pairs; the number of all, or -1 when they do not fit."""
        count = len(images[0])
        while self._firsts:
            first = self._firsts[0]
            products, most = tile.of(images, slice(first, None, 2)), int(count * tile.num_centers * ONE_BY_ONE)
            place = (self._bounds, tile.row, col, self._pairs_2C, found)
            now = loops.survivors_by_one(products, count, first, *self._codes, *place, most)
            if now != loops.TOO_MANY:
                return now
            self._firsts = self._firsts[1:]
        products = tile.of(images)
        return loops.survivors(products, count, self._paired, self._bounds, tile.row, col, self._pairs_2C, found)


class _Products:
    """Products of one tile of centers with tiles of the pool; all share their memory, for it to stay in cache."""

    @staticmethod
    def memory(centers: Rounded, m: int) -> tuple[Tensor, Tensor]:
        """Where products go, and where they are read."""
        dtype = torch.int32 if centers.precision == "int8" else centers.matrices[0].dtype
        products = torch.empty(len(centers.matrices) * TILE_POOL * m, dtype=dtype)
        return products, products.float() if dtype == torch.bfloat16 else products

    def __init__(self, centers: Rounded, row: int, m: int, memory: tuple[Tensor, Tensor]):
        self.row, self.num_centers, self._transposed = row, m, [x[row : row + m].T for x in centers.matrices]
        shape = (len(self._transposed), TILE_POOL, m)
        self._products, self._result = (x[: prod(shape)].view(shape) for x in memory)
        self._multiply = torch._int_mm if self._products.dtype == torch.int32 else torch.mm
        self._outs, self._array = list(self._products), self._result.numpy()

    def of(self, images: tuple[Tensor, ...], which: slice = slice(None)) -> np.ndarray:
        """(T, TILE_POOL, m) int32 or float32, of which as many rows count as there are images, and some matrices."""
        outs = self._outs if len(images[0]) == TILE_POOL else self._products[:, : len(images[0])]
        for x, centers_lm, out_bm in zip(images[which], self._transposed[which], outs[which], strict=True):
            self._multiply(x, centers_lm, out=out_bm)
        if self._products.dtype == torch.bfloat16:
            self._result.copy_(self._products)
        return self._array


def _by_torch(kernel: Kernel, centers: Rounded, pool: Rounded, bounds: Bounds, capacity: int) -> Pairs | None:
    """On any device: what the tiles do, in whole torch operations."""
    m, n, found, total = len(bounds.limit_M), len(bounds.factor_B), [], 0
    for row in range(0, m, DENSE_CENTERS):
        for col in range(0, n, DENSE_POOL):
            some, images = slice(row, row + DENSE_CENTERS), slice(col, col + DENSE_POOL)
            bound_mb = _upper_bounds(kernel, centers.rows(some), pool.rows(images), bounds, some, images)
            hit_mb = bound_mb * bounds.factor_B[images] >= bounds.limit_M[some, None]
            rows, cols = hit_mb.nonzero(as_tuple=True)
            found.append((rows + row, cols + col))
            total += len(rows)
            if total > capacity:
                return None
    rows, cols = (torch.cat(x) for x in zip(*found, strict=True)) if found else bounds.limit_M.new_empty(2, 0).long()
    return rows, cols


def _upper_bounds(kernel, centers: Rounded, pool: Rounded, bounds: Bounds, some: slice, images: slice) -> Tensor:
    """(m, b) what the scores of a tile can be at most, without the factor."""
    r, a = [], bounds.center_errors_TM[:, some, None] + bounds.pool_errors_TB[:, None, images]
    for i, (x_ml, y_bl) in enumerate(zip(centers.matrices, pool.matrices, strict=True)):
        product_mb = (torch._int_mm if x_ml.dtype == torch.int8 else torch.mm)(x_ml, y_bl.T).float()
        r.append(product_mb.mul_(centers.steps_TN[i][:, None]).mul_(pool.steps_TN[i]))
    if kernel.name == "pfk":
        pairs = zip(r[::2], r[1::2], a[::2], a[1::2], strict=True)
        terms = [rz * rg + rg.abs() * az + (rz.abs() + az) * ag for rz, rg, az, ag in pairs]
    else:
        terms = [x + y for x, y in zip(r, a, strict=True)]
    return sum(w * term for w, term in zip(bounds.weights_S.tolist(), terms, strict=True))


def _by_fused_kernel(kernel: Kernel, centers: Rounded, pool: Rounded, bounds: Bounds, capacity: int) -> Pairs | None:
    """On Hopper: one margin per center, no matter the image; centers with more survivors than are listed go apart."""
    limit_M = bounds.limit_M - _largest_margin(kernel, bounds) - fused.error_bound(kernel)
    count_M, cols_MC = fused.survivors(kernel, centers.whole, pool.whole, limit_M, FUSED_CAPACITY)
    fits_M = count_M <= FUSED_CAPACITY
    if int(count_M[fits_M].sum()) > capacity:
        return None
    rows, slots = ((cols_MC >= 0) & fits_M[:, None]).nonzero(as_tuple=True)
    cols, more = cols_MC[rows, slots].long(), (~fits_M).nonzero().squeeze(1)
    if not len(more):
        return rows, cols
    of_center = ("center_steps_TM", "center_errors_TM", "limit_M")
    few = bounds._replace(**{name: getattr(bounds, name)[..., more] for name in of_center})
    others = _by_torch(kernel, centers.rows(more), pool, few, capacity - len(rows))
    return others and (torch.cat([rows, more[others[0]]]), torch.cat([cols, others[1]]))


def _largest_margin(kernel: Kernel, bounds: Bounds) -> Tensor:
    """(M,) how much rounding may take from a center's score, for any image: correlations are at most of size 1."""
    a_TM = bounds.center_errors_TM + bounds.pool_errors_TB.amax(1, keepdim=True)
    if kernel.name == "pfk":
        z, g = a_TM[::2], a_TM[1::2]
        a_TM = (z + g) * MAX_LENGTH**2 + z * g
    return bounds.weights_S @ a_TM


def fastest(kernel: Kernel, device: torch.device) -> Precision:
    """The precision in which a device scans fastest. The result does not depend on the choice."""
    if device.type == "cpu":
        return _fastest_on_cpu(kernel, torch.get_num_threads())
    return "bfloat16" if fused.available(device) else "float32"


@lru_cache(maxsize=64)
def _fastest_on_cpu(kernel: Kernel, threads: int) -> Precision:
    """By trial: some milliseconds, once per kernel and process."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * TILE_POOL, sum(kernel.lengths), generator=generator)
    part = Descriptors(x / x.norm(dim=1, keepdim=True), x / x.norm(dim=1, keepdim=True))
    return min(supported(kernel, x.device), key=lambda precision: _seconds(kernel, precision, part))


def _seconds(kernel: Kernel, precision: Precision, part: Descriptors) -> float:
    """The best of a few scans of a small pool; infinite where this torch cannot multiply in `precision`."""
    try:
        pool, best = round_to(kernel, precision, part), float("inf")
        centers = pool.rows(slice(0, TILE_CENTERS))
        floor_M = torch.full_like(centers.errors_TN[0], torch.inf)
        for _ in range(5):
            start = time.perf_counter()
            survivors(kernel, centers, pool, floor_M)
            best = min(best, time.perf_counter() - start)
        return best
    except (RuntimeError, AttributeError):
        return float("inf")
