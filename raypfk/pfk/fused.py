"""The pairs of a block of images that can be among a center's best, by one kernel on an NVIDIA GPU (Triton).

`Kernel.block` writes M x N scores to the GPU's memory and reads them back to compare them with each center's floor.
Here a program scores a tile of centers and images in registers, compares it there, and writes only what is not below
the floor, which is next to nothing: about K ln(N / K) images of N for each center once the floors follow the K-th best
score.

- `_packed` lays the scales' vectors side by side, z and g of a scale next to each other, each padded by zeros to whole
  chunks: whatever the lengths, the kernel is one loop over chunks with one matrix product in each. The hardware's
  copies and products overlap only within a loop, and two products in a step, a loop for each scale, or a loop over
  tiles around it, made some version of Triton or ptxas wait for each product or spill registers. It costs a copy of
  the block, by estimate 4 ms for the one below: much beside few centers, little beside thousands.
- At the end of a vector the accumulator is used: `pcc` and `pfk-sum` multiply it by w_j / w_j+1, so that one
  accumulator serves all scales and a tile may be 128 x 256; scales are in ascending order of weight, so that no factor
  is above 1. `pfk` holds w_j rz_j, then adds its product with rg_j to the score: three accumulators, 192 registers a
  thread at 128 x 128, the largest tile that Hopper's register file holds.
- A tile's survivors become bits, 32 images a word; only where a word is not zero are slots of the centers' lists taken,
  by one atomic addition a center, and filled. The order in a list is that of the atomics: any.

Not yet run on a GPU, so not measured. With Triton 3.6 and 3.8 it compiles for Hopper (sm_90a) to warp-group matrix
products of which one stays in flight while the next is issued, without spilled registers (tests/pfk/test_fused.py). An
estimate for 64,000 centers and 1,280,000 images of 768 + 768 numbers: `pfk` is 2.5e14 operations, 0.25 s at the 989
TFLOP/s of an H100's data sheet; tiles of 128 x 128 do 64 operations a byte read from the L2 cache, so that at 600
TFLOP/s it must give 9.4 TB/s, and it rather than the tensor cores may be the limit (128 x 256: 7 TB/s); from device
memory 0.1 TB, 0.04 s.

Shapes: M centers, B pool images, C capacity, L = sum of L_j descriptor length, P the same padded; in a tile m centers,
n images, k numbers, w words of bits.
"""

import importlib.util
from itertools import accumulate
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from raypfk.pfk.kernel import LENGTH_SLACK, Descriptors, Kernel

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    jit = triton.jit
else:  # survivors_torch alone
    triton, tl = None, SimpleNamespace(constexpr=None)

    def jit(function):
        """Stands in for triton.jit."""
        return function


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUP = 16  # tiles of centers that go through the pool together: they and the pool tiles in work stay in the L2 cache
TORCH_TILE = (1024, 4096)  # centers, images


class Tile(NamedTuple):
    """What one program scores, and how: m centers, n images, k numbers at a time."""

    m: int
    n: int
    k: int
    warps: int = 8
    stages: int = 4
    """Chunks that are being copied or multiplied at once."""


TILES = {  # the first is the default; in the last of each, two programs share a multiprocessor
    "pfk": (Tile(128, 128, 64), Tile(128, 128, 128, stages=3), Tile(64, 128, 64, warps=4)),
    "linear": (Tile(128, 256, 64), Tile(128, 256, 64, stages=3), Tile(128, 128, 64, stages=3)),
    "float32": (Tile(32, 32, 32, warps=4, stages=2),),  # exact products, no tensor cores: for tests
}


def available(device: torch.device | str) -> bool:
    """Whether `survivors` is for it: a Hopper GPU of NVIDIA, and Triton installed. Others it may suit, unproven."""
    device = torch.device(device)
    if triton is None or device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def error_bound(kernel: Kernel) -> float:
    """A bound on |score in `survivors` - exact score, rounded to float32| for standardised descriptors.

    As `Kernel.error_bound`, with two more roundings a scale, and 2^-22 for each instead of 2^-24: tensor cores add
    exact products, aligned to the largest, and cut off what is below float32 (M. Fasi et al., Numerical behavior of
    NVIDIA tensor cores, PeerJ CS 2021). That is measured, not promised by the vendor. Holds for scales no longer than
    1.0024, as unit vectors rounded to bfloat16 are.
    """
    lengths, scales = kernel.lengths, len(kernel.lengths)
    terms = {"pcc": sum(lengths), "pfk": 2 * max(lengths), "pfk-sum": 2 * sum(lengths)}[kernel.name] + 2 * scales + 8
    nu = terms * 2.0**-22
    if nu >= 0.5:
        raise ValueError(f"descriptors of {sum(lengths)} numbers are too long for a float32 kernel")
    size = sum(kernel.weights) * (2 if kernel.name == "pfk-sum" else 1) * LENGTH_SLACK
    return size * nu / (1 - nu) + terms * 2.0**-120


def survivors(
    kernel: Kernel, centers: Descriptors, pool: Descriptors, floor_M: Tensor, capacity: int, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Of each center, how many images do not score below its floor, (M,) int32, and which, (M, capacity) int32.

    `centers` (M, L) and `pool` (B, L) are in bfloat16, float16 or float32, alike; scores are summed in float32, within
    `error_bound` of the exact ones; `floor_M` is float32. A score that is NaN is not below the floor. Of a center with
    more than `capacity` images any `capacity` are listed, and the count says how many there are; fewer are followed by
    -1. The order is any. Memory: a copy of both descriptors, and the result.
    Raises ValueError for shapes, dtypes or devices that do not fit, RuntimeError without Triton.
    """
    _check(kernel, centers, pool, floor_M, capacity)
    if triton is None:
        raise RuntimeError("raypfk.pfk.fused.survivors needs the package triton")
    count_M, cols_MC = _empty_lists(floor_M, capacity)
    if not len(centers.z) or not len(pool.z):
        return count_M, cols_MC
    tile = tile or _tiles(kernel, pool.z.dtype)[0]
    with torch.cuda.device_of(count_M):
        _launch(kernel, centers, pool, floor_M.contiguous(), count_M, cols_MC, tile)
    return count_M, cols_MC


def fastest_tile(kernel: Kernel, centers: Descriptors, pool: Descriptors) -> Tile:
    """The tile in `TILES` that is fastest for blocks of this size on this GPU, measured. Not for the interpreter."""
    floor_M = torch.full((len(centers.z),), torch.inf, device=centers.z.device)
    tiles = _tiles(kernel, pool.z.dtype)
    return min(tiles, key=lambda t: triton.testing.do_bench(lambda: survivors(kernel, centers, pool, floor_M, 1, t)))


def survivors_torch(
    kernel: Kernel, centers: Descriptors, pool: Descriptors, floor_M: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    """What `survivors` returns, on any device by `Kernel.block` in tiles; within `Kernel.error_bound`."""
    _check(kernel, centers, pool, floor_M, capacity)
    count_M, cols_MC = _empty_lists(floor_M, capacity)
    m, n = TORCH_TILE
    for r in range(0, len(centers.z), m):
        center_tile, rows = centers.rows(slice(r, r + m)).to(torch.float32), slice(r, r + m)
        for c in range(0, len(pool.z), n):
            scores_mn = kernel.block(center_tile, pool.rows(slice(c, c + n)).to(torch.float32))
            hit_mn = ~(scores_mn < floor_M[rows, None])
            place_mn = count_M[rows, None] + hit_mn.cumsum(1, dtype=torch.int32) - 1
            row, col = (hit_mn & (place_mn < capacity)).nonzero(as_tuple=True)
            cols_MC[row + r, place_mn[row, col].long()] = (col + c).int()
            count_M[rows] += hit_mn.sum(1, dtype=torch.int32)
    return count_M, cols_MC


def _check(kernel: Kernel, centers: Descriptors, pool: Descriptors, floor_M: Tensor, capacity: int) -> None:
    length, like = sum(kernel.lengths), centers.z
    for name, part in (("centers", centers), ("pool", pool)):
        used = part[:1] if kernel.name == "pcc" else part
        if any(x.shape != (len(part.z), length) for x in used):
            raise ValueError(f"expected {name} (N, {length}), got {[tuple(x.shape) for x in used]}")
        if any(x.dtype != like.dtype or x.device != like.device or x.dtype not in DTYPES for x in used):
            got = [f"{x.dtype} on {x.device}" for x in used]
            raise ValueError(f"expected {name} in one of {DTYPES}, as the centers' z on {like.device}, got {got}")
    if floor_M.shape != like.shape[:1] or floor_M.dtype != torch.float32 or floor_M.device != like.device:
        expected, got = f"({len(like)},) float32 on {like.device}", f"{tuple(floor_M.shape)} {floor_M.dtype}"
        raise ValueError(f"expected floors {expected}, got {got} on {floor_M.device}")
    if capacity < 1:
        raise ValueError(f"expected a capacity >= 1, got {capacity}")


def _empty_lists(floor_M: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    count_M = torch.zeros_like(floor_M, dtype=torch.int32)
    return count_M, count_M.new_full((len(floor_M), capacity), -1)


def _tiles(kernel: Kernel, dtype: torch.dtype) -> tuple[Tile, ...]:
    return TILES["float32" if dtype == torch.float32 else "pfk" if kernel.name == "pfk" else "linear"]


def _launch(kernel, centers, pool, floor_M, count_M, cols_MC, tile: Tile) -> None:
    rows, cols = len(centers.z), len(pool.z)
    _scan[(triton.cdiv(rows, tile.m) * triton.cdiv(cols, tile.n),)](
        TensorDescriptor.from_tensor(_packed(kernel, centers, tile.k), [tile.m, tile.k]),
        TensorDescriptor.from_tensor(_packed(kernel, pool, tile.k), [tile.n, tile.k]),
        *(floor_M, count_M, cols_MC, rows, cols, cols_MC.shape[1]),
        **_constants(kernel, tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _constants(kernel: Kernel, tile: Tile) -> dict:
    """What the kernel is compiled for: chunks at which a vector ends, and the factor that the accumulator gets there.

    `pfk` holds w_j rz_j and, after the product with rg_j, 0; the others go from units of w_j to units of the next.
    """
    vectors = _vectors(kernel)
    weights = [kernel.weights[j] for j, _ in vectors]
    if kernel.name == "pfk":
        factors = [0.0 if is_g else w for w, (_, is_g) in zip(weights, vectors, strict=True)]
    else:
        factors = [w / after if after else 1.0 for w, after in zip(weights, [*weights[1:], 1.0], strict=True)]
    ends = accumulate(-(-kernel.lengths[j] // tile.k) for j, _ in vectors)
    return {
        "PRODUCT": kernel.name == "pfk",
        "LASTS": tuple(end - 1 for end in ends),
        "FACTORS": tuple(factors),
        "TILE_M": tile.m,
        "TILE_N": tile.n,
        "TILE_K": tile.k,
        "GROUP": GROUP,
        "RAISE": not isinstance(_scan, triton.JITFunction),  # Triton's interpreter multiplies bfloat16's bits
    }


def _vectors(kernel: Kernel) -> list[tuple[int, bool]]:
    """The scale, and whether it is g, of each vector in the kernel's order: ascending weight."""
    order = sorted(range(len(kernel.lengths)), key=lambda j: kernel.weights[j])
    return [(j, is_g) for j in order for is_g in ((False,) if kernel.name == "pcc" else (False, True))]


def _packed(kernel: Kernel, part: Descriptors, k: int) -> Tensor:
    """(N, P): the vectors side by side in the kernel's order, each padded by zeros to whole chunks of k numbers."""
    vectors = _vectors(kernel)
    widths = [-(-kernel.lengths[j] // k) * k for j, _ in vectors]
    if widths == list(kernel.lengths) and vectors == [(j, False) for j in range(len(widths))]:  # pcc: as it is
        z_NL = part.z.contiguous()
        return z_NL if z_NL.data_ptr() % 16 == 0 else z_NL.clone()
    packed_NP = part.z.new_empty(len(part.z), sum(widths))
    for (j, is_g), part_Np in zip(vectors, packed_NP.split(widths, dim=1), strict=True):
        part_Np[:, : kernel.lengths[j]] = part[is_g][:, kernel.spans[j]]
        part_Np[:, kernel.lengths[j] :] = 0
    return packed_NP


@jit
def _scan(
    centers_MP,  # descriptors, in the sense of the hardware's tensor copies, of blocks (m, k) and (n, k)
    pool_BP,
    floor_M,
    count_M,
    cols_MC,
    num_centers,
    num_pool,
    capacity,
    PRODUCT: tl.constexpr,
    LASTS: tl.constexpr,
    FACTORS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    RAISE: tl.constexpr,
):
    """One tile: scores, then the rare rest."""
    tile_row, tile_col = _tile_of(tl.program_id(0), tl.cdiv(num_centers, TILE_M), tl.cdiv(num_pool, TILE_N), GROUP)
    row, col = tile_row * TILE_M, tile_col * TILE_N
    score_mn = _scores(centers_MP, pool_BP, row, col, PRODUCT, LASTS, FACTORS, TILE_M, TILE_N, TILE_K, RAISE)
    rows_m, cols_n = row + tl.arange(0, TILE_M), col + tl.arange(0, TILE_N)
    floor_m = tl.load(floor_M + rows_m, mask=rows_m < num_centers, other=float("inf"))
    hit_mn = ~(score_mn < floor_m[:, None]) & (rows_m < num_centers)[:, None] & (cols_n < num_pool)[None, :]
    BITS: tl.constexpr = min(TILE_N, 32)
    hit_mwb = tl.reshape(hit_mn.to(tl.int32), (TILE_M, TILE_N // BITS, BITS))
    word_mw = tl.sum(hit_mwb << tl.arange(0, BITS)[None, None, :], axis=2)
    if tl.max(tl.max((word_mw != 0).to(tl.int32), axis=1), axis=0) > 0:
        _append(word_mw, rows_m, col, count_M, cols_MC, capacity, TILE_M, TILE_N // BITS, BITS)


@jit
def _tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Down GROUP tiles of centers, then the next tile of the pool; at the pool's end the next GROUP."""
    first = program // (GROUP * tiles_n) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    rest = program % (GROUP * tiles_n)
    return first + rest % size, rest // size


@jit
def _scores(
    centers_MP,
    pool_BP,
    row,
    col,
    PRODUCT: tl.constexpr,
    LASTS: tl.constexpr,
    FACTORS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    RAISE: tl.constexpr,
):
    """(m, n): one loop over all chunks of all vectors; rows past the end are zeros."""
    sum_mn = tl.zeros((TILE_M, TILE_N), tl.float32)
    if PRODUCT:
        held_mn = tl.zeros((TILE_M, TILE_N), tl.float32)
        score_mn = tl.zeros((TILE_M, TILE_N), tl.float32)
    for step in range(0, LASTS[len(LASTS) - 1] + 1):
        a_mk = centers_MP.load([row, step * TILE_K])
        b_nk = pool_BP.load([col, step * TILE_K])
        if RAISE:
            a_mk, b_nk = a_mk.to(tl.float32), b_nk.to(tl.float32)
        sum_mn = tl.dot(a_mk, b_nk.T, sum_mn, input_precision="ieee")
        is_last = step == LASTS[0]
        factor = FACTORS[0]
        for v in tl.static_range(1, len(LASTS)):
            is_last = is_last | (step == LASTS[v])
            factor = tl.where(step == LASTS[v], FACTORS[v], factor)
        if is_last:
            if PRODUCT:
                score_mn += held_mn * sum_mn
                held_mn = factor * sum_mn
                sum_mn = tl.zeros((TILE_M, TILE_N), tl.float32)
            else:
                sum_mn = factor * sum_mn
    if PRODUCT:
        return score_mn
    else:  # noqa: RET505 - a branch that is compiled, or not
        return sum_mn


@jit
def _append(
    word_mw, rows_m, col, count_M, cols_MC, capacity, TILE_M: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr
):
    """Takes slots for the bits that are set, one atomic addition a center, and writes their columns."""
    number_mw = tl.zeros((TILE_M, WORDS), tl.int32)
    for bit in range(0, BITS):
        number_mw += (word_mw >> bit) & 1
    number_m = tl.sum(number_mw, axis=1)
    first_m = tl.atomic_add(count_M + rows_m, number_m, mask=number_m > 0, sem="relaxed")
    slot_mw = first_m[:, None] + tl.cumsum(number_mw, axis=1) - number_mw
    list_m = cols_MC + rows_m.to(tl.int64) * capacity  # M C is above 2^31 for large lists
    col_mw = tl.zeros((TILE_M, WORDS), tl.int32) + (col + BITS * tl.arange(0, WORDS))[None, :]
    for bit in range(0, BITS):
        one_mw = (word_mw >> bit) & 1
        tl.store(list_m[:, None] + slot_mw, col_mw + bit, mask=(one_mw > 0) & (slot_mw < capacity))
        slot_mw += one_mw
