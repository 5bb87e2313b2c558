"""The scan: which pairs of centers and pool images can score as high as a floor? Blocked, in low precision, proven.

Descriptors are rounded to `int8` or `bfloat16` (or left `float32`), multiplied in tiles that stay in a core's cache,
and each score is compared with its center's floor less a bound on what the rounding did to it (`Rounded.errors`). No
pair that reaches its floor is missed, whatever the precision; the few others that come along are told apart by exact
scores later (topk.py). Nothing of size M x B is kept: one block of scores at a time.

Shapes: M centers, B pool images, l = L_j numbers of a scale, S pairs that survive.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from raypfk.pfk import fused
from raypfk.pfk.kernel import MAX_LENGTH, Descriptors, Kernel

Precision = Literal["float32", "bfloat16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")

TILE_CENTERS = 512  # with TILE_POOL: by trial the best of a core with 1.25 MiB of its own cache
TILE_POOL = 256
BLOCK_POOL = 4096  # survivors are looked for once in so many images
GROUP = 16  # images whose largest score is compared first
CLIPS = (1.25, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the largest number of any center: tried as the largest of int8
SAMPLE = 256  # centers that they are tried on
NEARLY_ALL = 0.99  # of these
OUTLIER = 2.0  # a pool image that rounding moves this much farther than the median one is scanned in float32
FUSED_CAPACITY = 256  # survivors of one center that the fused kernel lists
U_BFLOAT16 = 2.0**-9


@dataclass(frozen=True)
class Rounded:
    """Descriptors as a scan reads them: of each used scale a matrix (N, l) of z and, but for `pcc`, one of g.

    steps: the number that one unit of a matrix stands for. errors: per matrix (N,) float32, an upper bound on the
    distance between a vector and what was kept of it. whole: the descriptors that the matrices are slices of, if they
    are.
    """

    precision: Precision
    matrices: tuple[Tensor, ...]
    steps: tuple[float, ...]
    errors: tuple[Tensor, ...]
    whole: Descriptors | None = None

    @cached_property
    def tiles(self) -> list[tuple[Tensor, ...]]:
        """Each matrix in tiles of the pool."""
        return [x.split(TILE_POOL) for x in self.matrices]

    def rows(self, index: slice | Tensor) -> "Rounded":
        matrices, errors = (tuple(x[index] for x in part) for part in (self.matrices, self.errors))
        return Rounded(self.precision, matrices, self.steps, errors, self.whole and self.whole.rows(index))


class Survivors(NamedTuple):
    """Pairs (S,) of a block, int64."""

    images: slice
    """The images that were looked at."""
    rows: Tensor
    """The centers."""
    cols: Tensor
    """The images."""


def used_scales(kernel: Kernel) -> list[tuple[slice, float]]:
    """Columns and weight of the scales that count (a single number has weight 0 by `length`), at least one."""
    scales = list(zip(kernel.spans, kernel.weights, strict=True))
    return [(span, w) for span, w in scales if w] or scales[:1]


def round_to(
    kernel: Kernel, precision: Precision, part: Descriptors, steps: tuple[float, ...] | None = None
) -> Rounded:
    """Finite standardised float32 descriptors (N, L) in `precision`; int8 in `steps`, by default from the data itself.

    int8 is symmetric and has one step per matrix, so that scores of a whole tile share their unit; what lies beyond
    127 steps is clipped, and the vector's error says so.
    """
    sources = _slices(kernel, part)
    if precision == "int8":
        return _round_to_int8(sources, steps or tuple(_step(x) for x in sources))
    whole, errors = part, tuple(x.new_zeros(len(x)) for x in sources)
    if precision == "bfloat16":
        whole = part.to(torch.bfloat16)
        errors = tuple(_length(x - y) for x, y in zip(sources, _slices(kernel, whole), strict=True))
    return Rounded(precision, _slices(kernel, whole), (1.0,) * len(sources), errors, whole)


def _slices(kernel: Kernel, part: Descriptors) -> tuple[Tensor, ...]:
    return tuple(x[:, span] for span, _ in used_scales(kernel) for x in (part if kernel.name != "pcc" else part[:1]))


def _length(x_Nl: Tensor) -> Tensor:
    return x_Nl.norm(dim=1).mul_(1.0001)  # the norm is rounded, too


def _round_to_int8(sources: tuple[Tensor, ...], steps: tuple[float, ...]) -> Rounded:
    codes = tuple(torch.empty(x.shape, dtype=torch.int8, device=x.device) for x in sources)
    errors = tuple(x.new_zeros(len(x)) for x in sources)
    for start in range(0, len(sources[0]), TILE_POOL):  # in pieces that stay in cache between the passes
        piece = slice(start, start + TILE_POOL)
        for x, step, code, error in zip(sources, steps, codes, errors, strict=True):
            y = (x[piece] * (1 / step)).round_().clamp_(-127, 127)
            code[piece].copy_(y)
            error[piece].copy_(_length(torch.sub(x[piece], y, alpha=step)))
    return Rounded("int8", codes, steps, errors)


def _step(x_Nl: Tensor) -> float:
    """The int8 step that moves nearly all vectors of a sample least: a long one rounds more, a short one clips some."""
    x_Nl = x_Nl[:: max(1, len(x_Nl) // SAMPLE)]
    largest = float(x_Nl.abs().max()) if x_Nl.numel() else 0.0
    steps = [largest * clip / 127 for clip in CLIPS] if largest else [1.0]
    codes = ((x_Nl / step).round_().clamp_(-127, 127) * step for step in steps)
    moved = [float((x_Nl - code).norm(dim=1).quantile(NEARLY_ALL)) if len(x_Nl) else 0.0 for code in codes]
    return steps[moved.index(min(moved))]


def drop_outliers(pool: Rounded) -> Tensor:
    """Rows (int64, few) that rounding moved much more than most: emptied here, so that they do not widen all bounds."""
    far = torch.zeros_like(pool.errors[0], dtype=torch.bool)
    for error in pool.errors:
        moved = error[error > 0]
        if len(moved):
            far |= error > OUTLIER * moved.median()
    index = far.nonzero().squeeze(1)
    for x in (*pool.matrices, *pool.errors):
        x.index_fill_(0, index, 0)
    return index


def survivors(
    kernel: Kernel, centers: Rounded, pool: Rounded, floor_M: Tensor, factor_B: Tensor | None = None, tight=False
) -> Iterator[Survivors]:
    """Block by block of the pool, all pairs whose score (times `factor_B`) reaches `floor_M`.

    Centers are one tile's at most. Pairs that just fail to reach it may come along.
    `floor_M` is read anew for every block. `factor_B` (B,) is in 0..1. `tight` bounds the correlations, which `pfk`
    multiplies a rounding error by, by what the block holds and not by 1: worth its cost where all of them are small.
    """
    if factor_B is None and pool.whole and fused.available(floor_M.device):
        yield from _fused_survivors(kernel, centers, pool, floor_M)
        return
    yield from _block_survivors(_Tile(kernel, centers, pool, factor_B, tight), floor_M)


def _block_survivors(tile: "_Tile", floor_M: Tensor) -> Iterator[Survivors]:
    tile.allocate()
    for start in range(0, tile.num_images, BLOCK_POOL):
        piece = slice(start, min(start + BLOCK_POOL, tile.num_images))
        tile.score(piece)
        limit_M = tile.limit(floor_M, piece) / tile.unit
        group, row = (tile.tops[: -(-(piece.stop - start) // GROUP)] >= limit_M).nonzero(as_tuple=True)
        scores_HG = tile.scores.view(-1, GROUP, tile.num_centers)[group, :, row]
        hit, place = (scores_HG >= limit_M[row, None]).nonzero(as_tuple=True)
        cols = start + group[hit] * GROUP + place
        real = cols < piece.stop  # and not padding, where the limit is -inf
        yield Survivors(piece, row[hit][real], cols[real])


class _Tile:
    """Scores of one tile of centers with blocks of the pool, in units of the first term's weight.

    A term is a scale (`pfk`), or a matrix of one. unit: what 1 of a product of codes stands for.
    """

    def __init__(self, kernel: Kernel, centers: Rounded, pool: Rounded, factor_B: Tensor | None, tight: bool):
        self.kernel, self.centers, self.pool, self.factor_B, self.tight = kernel, centers, pool, factor_B, tight
        self.num_centers, self.num_images = len(centers.errors[0]), len(pool.errors[0])
        self.units = [a * b for a, b in zip(centers.steps, pool.steps, strict=True)]
        self.factors = 2 if kernel.name == "pfk" else 1  # correlations that are multiplied in a term
        weights = [w for _, w in used_scales(kernel)]
        self.weights = [w for w in weights for _ in range(2 if kernel.name == "pfk-sum" else 1)]
        per = self.factors
        self.terms = [w * prod(self.units[i * per : (i + 1) * per]) for i, w in enumerate(self.weights)]
        self.unit = self.terms[0] or 1.0

    def allocate(self) -> None:
        """Makes the buffers that `score` works in, and the views: making one costs as much as a small product."""
        codes, m, rows = (
            self.centers.matrices[0],
            self.num_centers,
            -(-min(BLOCK_POOL, self.num_images) // GROUP) * GROUP,
        )
        device, dtype = codes.device, torch.int32 if codes.dtype == torch.int8 else codes.dtype
        self.multiply = torch._int_mm if codes.dtype == torch.int8 else torch.mm
        self.transposed = [x.T for x in self.centers.matrices]
        self.products = [torch.empty(TILE_POOL, m, dtype=dtype, device=device) for _ in range(self.factors)]
        self.floats = [torch.empty(TILE_POOL, m, device=device) for _ in range(self.factors)]
        self.scores, self.tops = torch.empty(rows, m, device=device), torch.empty(rows // GROUP, m, device=device)

    def score(self, piece: slice) -> None:
        """Leaves the scores of a piece of the pool in `scores`, (rows, M), and each group's largest in `tops`."""
        self.reach = [0.0] * len(self.units)
        n = piece.stop - piece.start
        self.scores[n:] = -torch.inf
        whole = -(-n // GROUP) * GROUP
        tiles = self.scores[:whole].split(TILE_POOL), self.tops[: whole // GROUP].split(TILE_POOL // GROUP)
        for i, (scores_bM, tops_GM) in enumerate(zip(*tiles, strict=True)):
            number = piece.start // TILE_POOL + i
            out_bM = scores_bM[: min(TILE_POOL, n - i * TILE_POOL)]
            self._score_tile(out_bM, number)
            if self.factor_B is not None:
                out_bM.mul_(self.factor_B[number * TILE_POOL :][: len(out_bM), None])
            # The largest now, while the tile is in cache.
            torch.amax(scores_bM.view(-1, GROUP, self.num_centers), 1, out=tops_GM)

    def _score_tile(self, out_bM: Tensor, number: int) -> None:
        if not self.terms[0]:
            out_bM.zero_()
            return
        for i, term in enumerate(self.terms):
            r = [self._correlations(i * self.factors + k, number, k) for k in range(self.factors)]
            if i == 0:
                torch.mul(*r, out=out_bM) if len(r) == 2 else out_bM.copy_(r[0])
            elif len(r) == 2:
                out_bM.addcmul_(*r, value=term / self.unit)
            else:
                out_bM.add_(r[0], alpha=term / self.unit)

    def _correlations(self, i: int, number: int, slot: int) -> Tensor:
        """Of matrix i and a tile of the pool, in the matrix's unit: (rows, M) float32, in the buffer `slot`."""
        pool_bl, out, real = self.pool.tiles[i][number], self.products[slot], self.floats[slot]
        if len(pool_bl) < TILE_POOL:
            out, real = out[: len(pool_bl)], real[: len(pool_bl)]
        self.multiply(pool_bl, self.transposed[i], out=out)
        if self.tight:
            low, high = (float(x) * self.units[i] for x in out.aminmax())
            self.reach[i] = max(self.reach[i], -low, high)
        return out if out.dtype == torch.float32 else real.copy_(out)

    def limit(self, floor_M: Tensor, piece: slice) -> Tensor:
        """(M,) what a score must reach: its floor, less all that rounding may have taken from it."""
        errors = [self._error(i, piece) for i in range(len(self.units))]
        if self.factors == 2:  # (r + a)(s + b) - r s = r b + s a + a b
            reach = [self._reach(i, piece) for i in range(len(self.units))]
            pairs = zip(errors[::2], errors[1::2], reach[::2], reach[1::2], strict=True)
            errors = [r * b + s * a + a * b for a, b, r, s in pairs]
        margin_M = sum(w * error for w, error in zip(self.weights, errors, strict=True))
        return floor_M - margin_M - 2 * self.kernel.error_bound()

    def _error(self, i: int, piece: slice) -> Tensor:
        """A bound on how far rounding moved a correlation: |z_m - ẑ_m| |z_n| + |ẑ_m| |z_n - ẑ_n| (Cauchy-Schwarz)."""
        center_M, image = self.centers.errors[i], self.pool.errors[i][piece].max()
        error_M = center_M * MAX_LENGTH + (MAX_LENGTH + center_M) * image
        if self.centers.precision == "bfloat16":  # and products come out in bfloat16
            error_M = error_M + 1.01 * U_BFLOAT16 * self._reach(i, piece)
        return error_M

    def _reach(self, i: int, piece: slice) -> Tensor | float:
        """A bound on the size of the correlations of matrix i, as computed or before."""
        if self.tight:
            return self.reach[i] * (1 + 2 * U_BFLOAT16)
        return (MAX_LENGTH + self.centers.errors[i]) * (MAX_LENGTH + self.pool.errors[i][piece].max())


def _fused_survivors(kernel: Kernel, centers: Rounded, pool: Rounded, floor_M: Tensor) -> Iterator[Survivors]:
    """`survivors` by the fused kernel; centers with more of them than it lists go on in blocks."""
    all_images = slice(0, len(pool.errors[0]))
    limit_M = _Tile(kernel, centers, pool, None, False).limit(floor_M, all_images) - fused.error_bound(kernel)
    count_M, cols_MC = fused.survivors(kernel, centers.whole, pool.whole, limit_M, FUSED_CAPACITY)
    fits_M = count_M <= FUSED_CAPACITY
    rows, slots = ((cols_MC >= 0) & fits_M[:, None]).nonzero(as_tuple=True)
    yield Survivors(all_images, rows, cols_MC[rows, slots].long())
    more = (~fits_M).nonzero().squeeze(1)
    for few in more.split(TILE_CENTERS) if len(more) else ():
        tile = _Tile(kernel, centers.rows(few), pool, None, False)
        for found in _block_survivors(tile, floor_M[few]):
            yield found._replace(rows=few[found.rows])


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
    return min(PRECISIONS, key=lambda precision: _seconds(kernel, precision, part))


def _seconds(kernel: Kernel, precision: Precision, part: Descriptors) -> float:
    """The best of a few scans of a small pool; infinite where this torch cannot multiply in `precision`."""
    try:
        centers = round_to(kernel, precision, part.rows(slice(0, TILE_CENTERS)))
        pool, best = round_to(kernel, precision, part, centers.steps), float("inf")
        for _ in range(5):
            start = time.perf_counter()
            for _ in survivors(kernel, centers, pool, torch.full_like(centers.errors[0], torch.inf)):
                pass
            best = min(best, time.perf_counter() - start)
        return best
    except (RuntimeError, AttributeError):
        return float("inf")
