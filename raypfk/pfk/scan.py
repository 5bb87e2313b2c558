"""The scan: which pairs of centers and pool images can score as high as a floor? Blocked, in low precision, proven.

A score is never more than a function of few inner products. With r_j = sqrt(w_j) (rz_j + rg_j),

    pfk = sum_j w_j rz_j rg_j <= sum_j r_j^2 / 4      as 4 x y <= (x + y)^2, with equality where x = y,

and `pcc` and `pfk-sum` are one inner product themselves. So a descriptor is laid out as one row of numbers, its vectors
times powers of their weights, in groups, one for each r_j; rounded to int8 (one step per descriptor) or bfloat16 (or
left float32); and multiplied in tiles that stay in a core's cache. From the products and the distance that rounding
moved each vector follows what a pair's score can be at most: no pair that reaches its center's floor is missed,
whatever the precision, and the others that come along are told apart by exact scores later (topk.py).

Shapes: M centers, B pool images, G groups, P numbers of a row, T vectors (of each scale that counts z and, but for
`pcc`, g), l = L_j numbers of one.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod, sqrt
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raypfk.pfk import fused, loops
from raypfk.pfk.kernel import MAX_LENGTH, Descriptors, Kernel, products_may_round_inputs

Precision = Literal["float32", "bfloat16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")

TILE_CENTERS, TILE_POOL = 512, 256  # by trial the best of a core with 1.25 MiB of its own cache
DENSE_CENTERS, DENSE_POOL = 8192, 4096  # where torch scores whole tiles: memory, and calls
ROWS = 1 << 14  # rounded at once by torch: memory
ONE_BY_ONE = 1 / 32  # of a tile's pairs whose second factor may be computed one by one
U_BFLOAT16 = 2.0**-8
TRIALS = ((TILE_POOL, 2.0), (4 * TILE_POOL, 1.0))  # of precisions: images, and how much slower than the best may stay
TURNS = 3
LONGEST_INT8 = (2**31 - 1) // 127**2  # numbers of a group: their products' sum fits int32
LARGEST = 1e37  # of a floor: infinity less infinity is none
SLACK = 2.0**-18  # relative; of what is itself computed in float32

Pairs = tuple[Tensor, Tensor]
"""Rows of centers and of pool images (Q,), int64."""


class Vector(NamedTuple):
    """One scale of z (`which` 0) or g (1), and its place in a row: times `factor` from `column` on."""

    which: int
    span: slice
    column: int
    factor: float

    @property
    def columns(self) -> slice:
        return slice(self.column, self.column + self.span.stop - self.span.start)


@dataclass(frozen=True)
class Layout:
    """What of a descriptor is where in a row. `groups` (columns) may end in zeros."""

    vectors: tuple[Vector, ...]
    groups: tuple[slice, ...]
    lengths_G: tuple[float, ...]
    """How long a group's vector can be."""
    roots: tuple[float, ...]
    """`pfk`: sqrt(w_j) of each group; else none."""

    @property
    def squared(self) -> bool:
        """`pfk`: 4 score <= sum of the groups' squared products; else score = the only group's product."""
        return bool(self.roots)

    @property
    def least_step(self) -> float:
        """Of int8, for vectors that are next to 0: so that their error counts little beside the others'."""
        return max(self.lengths_G) * 2.0**-22 or 1.0

    def columns(self, which: int) -> list[slice]:
        """The columns of each group; for `pfk` also those of its z (0) or of its g (1) alone."""
        return list(self.groups) if which == loops.BOTH else [v.columns for v in self.vectors if v.which == which]


@lru_cache(maxsize=64)
def layout(kernel: Kernel, on_gpu: bool) -> Layout:
    """Of a kernel; on a GPU groups are padded to whole chunks of the fused kernel."""
    paired, parts = kernel.name == "pfk", (0,) if kernel.name == "pcc" else (0, 1)
    scales = [[(which, span, w) for which in parts] for span, w in kernel.used_scales]
    grouped = scales if paired else [[one for scale in scales for one in scale]]
    vectors, groups, column = [], [], 0
    for group in grouped:
        start = column
        for which, span, w in group:
            vectors.append(Vector(which, span, column, w**0.25 if paired else sqrt(w)))
            column += span.stop - span.start
        column = start + -(-(column - start) // fused.CHUNK) * fused.CHUNK if on_gpu else column
        groups.append(slice(start, column))
    lengths_G = [MAX_LENGTH * sqrt(sum(sqrt(w) if paired else w for *_, w in group)) for group in grouped]
    roots = tuple(sqrt(w) for _, w in kernel.used_scales) if paired else ()
    return Layout(tuple(vectors), tuple(groups), tuple(lengths_G), roots)


@dataclass(frozen=True)
class Rounded:
    """Descriptors as a scan reads them: rows of codes.

    codes_NP: in the precision. steps_N: float32, what 1 in a row of codes stands for. errors_TN: float32, an upper
    bound on the distance between a vector, times its factor, and what was kept of it. lengths_TN: float32, of the
    vectors, NaN where one holds a NaN; where they were found on the way.
    """

    precision: Precision
    codes_NP: Tensor
    steps_N: Tensor
    errors_TN: Tensor
    lengths_TN: Tensor | None = None

    def rows(self, index: slice | Tensor) -> "Rounded":
        return Rounded(self.precision, self.codes_NP[index], self.steps_N[index], self.errors_TN[:, index])


def supported(kernel: Kernel, device: torch.device) -> tuple[Precision, ...]:
    """The precisions that give right products for a kernel here, float32 among them."""
    if device.type != "cpu" and not fused.available(device):
        return PRECISIONS[:1]
    groups = layout(kernel, on_gpu=False).groups
    fits = max(group.stop - group.start for group in groups) <= LONGEST_INT8
    return PRECISIONS if fits and (device.type != "cpu" or _int8_products_are_exact()) else PRECISIONS[:-1]


@lru_cache(maxsize=1)
def _int8_products_are_exact() -> bool:
    """Whether sums of int8 products are whole: without VNNI instructions, oneDNN adds pairs of them up to 32,767."""
    codes = torch.randint(-127, 128, (TILE_POOL, 513), generator=torch.Generator().manual_seed(0))
    codes[:64], codes[64:128] = 127, codes[64:128].sign() * 127
    try:
        return all(_is_exact(codes[:b, :length], codes[:, :length]) for b in (1, TILE_POOL) for length in (1, 2, 513))
    except (RuntimeError, AttributeError):
        return False


def _is_exact(x_bl: Tensor, y_ml: Tensor) -> bool:
    exact_bm = x_bl.double() @ y_ml.double().T
    out_bm = torch.full(exact_bm.shape, -1, dtype=torch.int32)
    torch._int_mm(x_bl.to(torch.int8), _transposed(y_ml.to(torch.int8)), out=out_bm)
    return torch.equal(out_bm.double(), exact_bm)


def _transposed(codes_ml: Tensor) -> Tensor:
    """(l, m), to multiply by. Of one column with strides (1, 1), oneDNN's int8 products are never written."""
    codes_lm = codes_ml.contiguous().T
    if len(codes_lm) > 1:
        return codes_lm
    return torch.empty_like(codes_lm, memory_format=torch.contiguous_format).copy_(codes_lm)


def round_to(kernel: Kernel, precision: Precision, part: Descriptors) -> Rounded:
    """Standardised float32 descriptors (N, L) in `precision`; int8 is symmetric, with one step per descriptor."""
    of, n = layout(kernel, part.z.is_cuda), len(part.z)
    codes_NP = torch.empty(n, of.groups[-1].stop, dtype=getattr(torch, precision), device=part.z.device)
    steps_N, errors_TN, lengths_TN = part.z.new_ones(n), part.z.new_empty(len(of.vectors), n), None
    if precision == "int8" and part.z.device.type == "cpu":
        lengths_TN = torch.empty_like(errors_TN)
        places = np.array([(v.which, v.span.start, v.span.stop, v.column) for v in of.vectors])
        factors = np.array([v.factor for v in of.vectors], dtype=np.float32)
        floats = (x.numpy() for x in (steps_N, errors_TN, lengths_TN))
        z, g = (x.contiguous().numpy() for x in part)
        loops.round_to_int8(z, g, places, factors, np.float32(of.least_step), codes_NP.numpy(), *floats)
    else:
        for start in range(0, n, ROWS):
            some = slice(start, start + ROWS)
            _round_rows(of, part.rows(some), codes_NP[some], steps_N[some], errors_TN[:, some])
    reach_T = errors_TN.new_tensor([MAX_LENGTH * v.factor for v in of.vectors])  # of rounded factors, and products
    return Rounded(precision, codes_NP, steps_N, errors_TN * (1 + SLACK) + reach_T[:, None] * 2.0**-20, lengths_TN)


def _round_rows(of: Layout, part: Descriptors, codes_NP: Tensor, steps_N: Tensor, errors_TN: Tensor) -> None:
    x_NP = part.z.new_zeros(codes_NP.shape)
    for v in of.vectors:
        torch.mul(part[v.which][:, v.span], v.factor, out=x_NP[:, v.columns])
    if codes_NP.dtype == torch.int8:
        torch.div(x_NP.abs().amax(1), 127, out=steps_N).clamp_(min=of.least_step)
        codes_NP.copy_((x_NP / steps_N[:, None]).round_().clamp_(-127, 127))
        x_NP.addcmul_(codes_NP, steps_N[:, None], value=-1)
    else:
        codes_NP.copy_(x_NP)
        x_NP -= codes_NP
    for error_N, v in zip(errors_TN, of.vectors, strict=True):
        error_N.copy_(x_NP[:, v.columns].norm(dim=1))


class Bounds(NamedTuple):
    """A pair is out if S < alpha_m unit_n - beta_m shift_n, S the sum (`pfk`: root of the sum of squares) of its
    products of codes; float32."""

    alpha_M: Tensor
    beta_M: Tensor
    unit_B: Tensor
    shift_B: Tensor


def _bounds(kernel: Kernel, centers: Rounded, pool: Rounded, floor_M: Tensor, factor_B: Tensor | None) -> Bounds:
    """With d_j the error of r_j, | |r| - |r + d| | <= |d|, and |d_j| <= |e_m| |v_n| + |v_m + e_m| |e_n| in each group
    (Cauchy-Schwarz): one part of it is the center's, the other, with the largest |e_m|, the image's."""
    of = layout(kernel, floor_M.is_cuda)
    reach_G, reached_G = _reach(of, centers)
    of_center_M = _length(_of_groups(of, centers) * reach_G[:, None]) + _products_error(kernel, of, centers)
    of_image_B = _length(_of_groups(of, pool) * reached_G[:, None])
    limit_M = _limit(kernel, floor_M)
    if of.squared:  # 4 score <= |r|^2
        limit_M = 2 * limit_M.clamp(min=0).sqrt()
        factor_B = None if factor_B is None else factor_B.sqrt()
    return _in_codes(centers, pool, limit_M, of_center_M, of_image_B, factor_B)


def _bounds_by_one(kernel: Kernel, centers: Rounded, pool: Rounded, floor_M: Tensor, factor_B: Tensor | None) -> Bounds:
    """Where S is the sum of sqrt(w_j) |q_j|, q_j the products of z alone, or of g: pfk <= sum_j w_j |rz_j|."""
    of = layout(kernel, floor_M.is_cuda)
    (reach_G, reached_G), root_G = _reach(of, centers), floor_M.new_tensor(of.roots)
    of_center_M = ((root_G * reach_G)[:, None] * _of_groups(of, centers)).sum(0)
    of_image_B = ((root_G * reached_G)[:, None] * _of_groups(of, pool)).sum(0)
    limit_M = _limit(kernel, floor_M) / MAX_LENGTH**2
    return _in_codes(centers, pool, limit_M, of_center_M, of_image_B, factor_B)


class Parts(NamedTuple):
    """What says of a pair, from the products q and r of z and g in each scale, that it is out: sqrt(w_j) rz_j is known
    to within a = |e_m| |z_n| + |z_m + e_m| |e_n|, sqrt(w_j) rg_j likewise to within b, and their product to within
    |r| a + |q| b + a b. It tells more than (q + r)^2 where they differ."""

    lengths_T: Tensor
    reached_T: Tensor
    errors_TM: Tensor
    errors_TB: Tensor
    steps_M: Tensor
    steps_B: Tensor
    factor_B: Tensor
    limit_M: Tensor


def _parts(kernel: Kernel, centers: Rounded, pool: Rounded, floor_M: Tensor, factor_B: Tensor | None) -> Parts:
    factors = [v.factor for v in layout(kernel, floor_M.is_cuda).vectors]
    lengths_T = floor_M.new_tensor(factors) * (MAX_LENGTH * (1 + SLACK))
    reached_T = lengths_T + centers.errors_TN.amax(1) if centers.errors_TN.numel() else lengths_T
    factor_B = torch.ones_like(pool.steps_N) if factor_B is None else factor_B * (1 + SLACK)
    limit_M = _limit(kernel, floor_M) - sum(kernel.weights) * SLACK
    errors = centers.errors_TN, pool.errors_TN
    return Parts(lengths_T, reached_T, *errors, centers.steps_N, pool.steps_N, factor_B, limit_M)


def _of_groups(of: Layout, part: Rounded) -> Tensor:
    """(G, N) bounds on the error of each group's vector: of all vectors, or for `pfk` of two each."""
    return torch.stack([_length(x_tN) for x_tN in part.errors_TN.chunk(len(of.groups))])


def _length(x_GN: Tensor) -> Tensor:
    return x_GN.double().square().sum(0).sqrt().float()  # small weights' squares are too small for float32


def _reach(of: Layout, centers: Rounded) -> tuple[Tensor, Tensor]:
    """How long a group's vector can be, as it is and as rounded in `centers`."""
    reach_G = centers.errors_TN.new_tensor(of.lengths_G) * (1 + SLACK)
    return reach_G, reach_G + _of_groups(of, centers).amax(1) if centers.errors_TN.numel() else reach_G


def _limit(kernel: Kernel, floor_M: Tensor) -> Tensor:
    """What a score must reach before it is rounded to float32, and before the factor is."""
    absolute = sum(kernel.weights) * (2 if kernel.name == "pfk-sum" else 1) * 2.0**-40 + 2.0**-120
    floor_M = floor_M.clamp(max=LARGEST)
    return floor_M - floor_M.abs() * SLACK - absolute


def _products_error(kernel: Kernel, of: Layout, centers: Rounded) -> float:
    """A bound on the length of the vector of errors of products, as they are computed."""
    if centers.precision == "int8":
        return 0.0
    unit = 2.0**-22 if fused.available(centers.codes_NP.device) else 2.0**-24  # see fused.py
    worst = [min(0.5, 1.01 * (group.stop - group.start + 4) * unit) for group in of.groups]
    if centers.precision == "bfloat16" and centers.codes_NP.device.type == "cpu":  # products come out in bfloat16
        worst = [x + 1.02 * U_BFLOAT16 for x in worst]
    if centers.precision == "float32" and products_may_round_inputs():
        worst = [x + 2.02 * U_BFLOAT16 for x in worst]
    return 1.05 * sqrt(sum((x * length**2) ** 2 for x, length in zip(worst, of.lengths_G, strict=True)))


def _in_codes(centers: Rounded, pool: Rounded, limit_M, of_center_M, of_image_B, factor_B: Tensor | None) -> Bounds:
    """factor (c_m c_n S + a_m + a_n) >= limit, for S; a_m counts whole, which only lets more pairs in."""
    limit_M = limit_M - limit_M.abs() * SLACK
    alpha_M = (limit_M - of_center_M * (1 + SLACK)) / centers.steps_N
    steps_B = pool.steps_N if factor_B is None else pool.steps_N * factor_B
    return Bounds(alpha_M, 1 / centers.steps_N, 1 / steps_B, of_image_B * (1 + SLACK) / pool.steps_N)


def survivors(
    kernel: Kernel,
    centers: Rounded,
    pool: Rounded,
    floor_M: Tensor,
    factor_B: Tensor | None = None,
    capacity: int | None = None,
) -> Pairs | None:
    """All pairs whose score (times `factor_B` (B,) float32 in 0..1) reaches `floor_M` (M,) float32, in any order.

    Pairs that just fail to reach it may come along. None where there are more than `capacity`.
    """
    capacity = len(floor_M) * len(pool.steps_N) if capacity is None else capacity
    given = kernel, centers, pool, floor_M, factor_B
    with torch.autocast(floor_M.device.type, enabled=False):  # half precision would break the bounds
        if floor_M.device.type == "cpu":
            return _by_tiles(*given, capacity)
        of, bounds = layout(kernel, floor_M.is_cuda), _bounds(*given)
        if centers.precision != "float32" and fused.available(floor_M.device):
            return _by_fused_kernel(of, centers, pool, bounds, capacity)
        return _by_torch(of, centers, pool, bounds, capacity)


def _by_tiles(kernel, centers: Rounded, pool: Rounded, floor_M, factor_B, capacity: int) -> Pairs | None:
    """On a CPU: products of a tile by a library, all else in one pass over them while they are in cache."""
    pairs, found, m = torch.empty(2, capacity, dtype=torch.int32), 0, len(floor_M)
    search = _Search(kernel, centers, pool, floor_M, factor_B, pairs.numpy())
    of = layout(kernel, on_gpu=False)
    memory = _Products.memory(of, centers, min(TILE_CENTERS, m))
    tiles = [_Products(of, centers, row, min(TILE_CENTERS, m - row), memory) for row in range(0, m, TILE_CENTERS)]
    for col in range(0, len(pool.steps_N), TILE_POOL):
        images = _Images(of, pool.codes_NP[col : col + TILE_POOL], col)
        for tile in tiles:
            found = search.tile(tile, images, found)
            if found < 0:
                return None
    rows, cols = pairs[:, :found].long()
    return rows, cols


class _Search:
    """Finds the survivors of tiles; of a `pfk` score by one of its factors first, as long as that leaves few."""

    def __init__(self, kernel, centers: Rounded, pool: Rounded, floor_M, factor_B, pairs_2C: np.ndarray):
        given, self._pairs_2C = (kernel, centers, pool, floor_M, factor_B), pairs_2C
        self._layout, self._firsts = layout(kernel, on_gpu=False), []
        self._bounds = _arrays(_bounds(*given))
        if not self._layout.squared:
            return
        self._roots, self._parts = np.array(self._layout.roots, dtype=np.float32), _arrays(_parts(*given))
        self._codes, self._again = _arrays((centers.codes_NP, pool.codes_NP)), np.empty((0, 2), dtype=np.int64)
        if centers.precision == "int8":
            self._firsts, self._by_one = [0, 1], _arrays(_bounds_by_one(*given))
            self._halves = [np.array([(x.start, x.stop) for x in self._layout.columns(which)]) for which in (0, 1)]
            self._again = self._halves[0]

    def tile(self, tile: "_Products", images: "_Images", found: int) -> int:
        """Appends to the pairs; the number of all, or -1 when they do not fit."""
        place, few = (tile.row, images.col, self._pairs_2C, found), int(images.count * tile.num_centers * ONE_BY_ONE)
        if not self._layout.squared:
            return loops.survivors(tile.of(images)[0], images.count, self._bounds, *place)
        while self._firsts:
            first = self._firsts[0]
            others = self._halves[1 - first]
            now = self._squares(tile.of(images, first), images.count, first, self._by_one, others, *place, few)
            if now != loops.TOO_MANY:
                return now
            self._firsts = self._firsts[1:]
        return self._squares(tile.of(images), images.count, loops.BOTH, self._bounds, self._again, *place, 1 << 62)

    def _squares(self, products, count: int, which: int, bounds, columns, *place) -> int:
        given = self._roots, bounds, self._parts, columns, *self._codes
        return loops.survivors_of_squares(products, count, which, *given, *place)


def _arrays(tensors: Iterable[Tensor]) -> tuple[np.ndarray, ...]:
    return tuple((x if x.dtype != torch.bfloat16 else x.float()).contiguous().numpy() for x in tensors)


class _Images:
    """A tile of the pool, whose columns are cut out once for all centers."""

    def __init__(self, of: Layout, codes_bP: Tensor, col: int):
        self.col, self.count, self._layout, self._codes_bP, self._cut = col, len(codes_bP), of, codes_bP, {}

    def columns(self, which: int) -> list[Tensor]:
        if which not in self._cut:
            self._cut[which] = [self._codes_bP[:, span] for span in self._layout.columns(which)]
        return self._cut[which]


class _Products:
    """Products of one tile of centers with tiles of the pool; all share their memory, for it to stay in cache."""

    @staticmethod
    def memory(of: Layout, centers: Rounded, m: int) -> tuple[Tensor, Tensor]:
        """Where products go, and where they are read."""
        dtype = torch.int32 if centers.precision == "int8" else centers.codes_NP.dtype
        products = torch.empty(len(of.groups) * TILE_POOL * m, dtype=dtype)
        return products, products.float() if dtype == torch.bfloat16 else products

    def __init__(self, of: Layout, centers: Rounded, row: int, m: int, memory: tuple[Tensor, Tensor]):
        self.row, self.num_centers, self._layout = row, m, of
        self._codes_mP, self._transposed = centers.codes_NP[row : row + m], {}
        shape = (len(of.groups), TILE_POOL, m)
        self._products, self._result = (x[: prod(shape)].view(shape) for x in memory)
        self._multiply = torch._int_mm if self._products.dtype == torch.int32 else torch.mm
        self._outs, self._array = list(self._products), self._result.numpy()

    def of(self, images: _Images, which: int = loops.BOTH) -> np.ndarray:
        """(G, TILE_POOL, m) int32 or float32, of which as many rows count as there are images; of whole groups, or of
        z or g alone (0, 1)."""
        if which not in self._transposed:
            self._transposed[which] = [_transposed(self._codes_mP[:, x]) for x in self._layout.columns(which)]
        outs = self._outs if images.count == TILE_POOL else self._products[:, : images.count]
        for images_bl, centers_lm, out_bm in zip(images.columns(which), self._transposed[which], outs, strict=True):
            self._multiply(images_bl, centers_lm, out=out_bm)
        if self._products.dtype == torch.bfloat16:
            self._result.copy_(self._products)
        return self._array


def _by_torch(of: Layout, centers: Rounded, pool: Rounded, bounds: Bounds, capacity: int) -> Pairs | None:
    """On any device: what the tiles do, in whole torch operations."""
    m, n, found, total = len(bounds.alpha_M), len(bounds.unit_B), [], 0
    for row in range(0, m, DENSE_CENTERS):
        for col in range(0, n, DENSE_POOL):
            some, images = slice(row, row + DENSE_CENTERS), slice(col, col + DENSE_POOL)
            rows, cols = _hits(of, centers.rows(some), pool.rows(images), bounds, some, images).nonzero(as_tuple=True)
            found.append((rows + row, cols + col))
            total += len(rows)
            if total > capacity:
                return None
    rows, cols = (torch.cat(x) for x in zip(*found, strict=True)) if found else bounds.alpha_M.new_empty(2, 0).long()
    return rows, cols


def _hits(of: Layout, centers: Rounded, pool: Rounded, bounds: Bounds, some: slice, images: slice) -> Tensor:
    """Mask (m, b) of the pairs of a tile that are not out."""
    dtype = torch.float64 if centers.precision == "int8" else torch.float32
    products = [centers.codes_NP[:, x].to(dtype) @ pool.codes_NP[:, x].to(dtype).T for x in of.groups]
    sum_mb = torch.stack(products).norm(dim=0) if of.squared else products[0]
    edge_mb = bounds.alpha_M[some, None] * bounds.unit_B[images] - bounds.beta_M[some, None] * bounds.shift_B[images]
    return ~(sum_mb < edge_mb)


def _by_fused_kernel(of: Layout, centers: Rounded, pool: Rounded, bounds: Bounds, capacity: int) -> Pairs | None:
    """On Hopper: one shift for all images, the largest."""
    shift_M = bounds.beta_M * bounds.shift_B.amax() if len(bounds.shift_B) else bounds.beta_M
    ends = tuple(group.stop for group in of.groups)
    words = fused.survivors(centers.codes_NP, pool.codes_NP, ends, of.squared, bounds.alpha_M, shift_M, bounds.unit_B)
    return fused.pairs_of(words, capacity)


def fastest(kernel: Kernel, device: torch.device) -> Precision:
    """The precision in which a device scans fastest. The result does not depend on the choice."""
    if device.type == "cpu":
        return _fastest_on_cpu(kernel, torch.get_num_threads())
    return supported(kernel, device)[-1]


def fallback(device: torch.device) -> Precision:
    """The precision for blocks of which low precision leaves too many pairs."""
    return "bfloat16" if fused.available(device) else "float32"


@lru_cache(maxsize=64)
def _fastest_on_cpu(kernel: Kernel, threads: int) -> Precision:
    """By trial: some milliseconds, once per kernel and process."""
    near = list(supported(kernel, torch.device("cpu")))
    for images, slower in TRIALS:
        x = torch.randn(images, sum(kernel.lengths), generator=torch.Generator().manual_seed(0))
        part = Descriptors(x / x.norm(dim=1, keepdim=True), x / x.norm(dim=1, keepdim=True))
        turns = [[_seconds(kernel, precision, part) for precision in near] for _ in range(TURNS)]
        seconds = [min(of_one) for of_one in zip(*turns, strict=True)]
        near = [p for p, took in zip(near, seconds, strict=True) if took <= slower * min(seconds)]
        if len(near) == 1:
            break
    return near[0]


def _seconds(kernel: Kernel, precision: Precision, part: Descriptors) -> float:
    """Of a scan of a small pool; infinite where this torch cannot multiply in `precision`."""
    try:
        pool = round_to(kernel, precision, part)
        centers = pool.rows(slice(0, TILE_CENTERS))
        floor_M = torch.full_like(centers.steps_N, torch.inf)
        start = time.perf_counter()
        survivors(kernel, centers, pool, floor_M)
        return time.perf_counter() - start
    except (RuntimeError, AttributeError):
        return float("inf")
