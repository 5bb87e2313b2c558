"""What a scan needs on an NVIDIA GPU, in Triton: which pairs of a block are not out, and exact products of those.

torch would write M x N products to the GPU's memory and read them back to compare them with each center's floor. Here
a program multiplies a tile of centers and images, compares in registers, and writes one bit a pair.

- One loop over all chunks of all groups, with one matrix product in each step: the hardware's copies and products
  overlap only within a loop, and two products in a step, or a loop for each group, made some version of Triton or
  ptxas wait for each product or spill registers.
- At the end of a group (`pfk`: of a scale) the squares of its products are added up. They are held as bfloat16, two in
  a register: so 128 threads hold a tile of 128 x 128 without spilling, two programs share a multiprocessor, and while
  one compares and writes the other multiplies.
- Bits, 32 images a word, in place of lists: 1/32 of the scores in float32, no atomic operations, the same cost however
  many pairs are found. torch finds the words that are not zero.

What was measured, and what was tried: docs/scoring.md.

Shapes: M centers, B pool images, P codes of a descriptor, L numbers of it, W words, S scales, Q pairs; in a tile m
centers, n images, k codes, w words of bits.
"""

import importlib.util
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    jit = triton.jit
else:
    triton, tl = None, SimpleNamespace(constexpr=None)

    def jit(function):
        """Stands in for triton.jit."""
        return function


DTYPES = (torch.int8, torch.bfloat16)
CHUNK = 128  # codes; groups are padded to multiples of it
GROUP = 16  # tiles of centers that go through the pool together: they and the pool tiles in work stay in the L2 cache
HELD_ERROR = 2.0**-8  # relative, of a root of squares that were held once as bfloat16
PAIRS, NUMBERS = 4, 256  # of one program of `pair_products`


class Tile(NamedTuple):
    """What one program multiplies, and how: m centers, n images, k bytes of codes at a time."""

    m: int = 128
    n: int = 128
    k: int = 128
    warps: int = 4
    stages: int = 3
    """Chunks that are being copied or multiplied at once."""


def available(device: torch.device | str) -> bool:
    """Whether `survivors` is for it: a Hopper GPU of NVIDIA, and Triton installed. Others it may suit, unproven."""
    device = torch.device(device)
    if triton is None or device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def survivors(
    codes_MP: Tensor,
    codes_BP: Tensor,
    ends: tuple[int, ...],
    squared: bool,
    alpha_M: Tensor,
    shift_M: Tensor,
    unit_B: Tensor,
    tile: Tile | None = None,
) -> Tensor:
    """(M, W) int32: bit i of word w is 1 unless S < alpha_m unit_n - shift_m, where n = 32 w + i is an image.

    S is the inner product of codes, or, `squared`, the root of the sum of the groups' squared products; groups end at
    columns `ends`, multiples of `CHUNK`. Codes are int8, whose products are exact, or bfloat16, summed in float32 to
    within 2^-22 of the sum of sizes for each term: tensor cores add exact products, aligned to the largest, and cut off
    what is below float32 (M. Fasi et al., Numerical behavior of NVIDIA tensor cores, PeerJ CS 2021); that is measured,
    not promised by the vendor. Of several groups, S may come out too small by `HELD_ERROR` of itself for each but one;
    edges are lowered by that here. A NaN is not out. alpha_M, shift_M, unit_B: float32.
    Raises ValueError for shapes, dtypes or devices that do not fit, RuntimeError without Triton.
    """
    _check(codes_MP, codes_BP, ends, squared, alpha_M, shift_M, unit_B)
    if triton is None:
        raise RuntimeError("raypfk.pfk.fused.survivors needs the package triton")
    tile, rows, cols = tile or Tile(), len(codes_MP), len(codes_BP)
    k = tile.k // codes_MP.element_size()
    words_MW = torch.zeros(rows, -(-cols // tile.n) * (tile.n // 32), dtype=torch.int32, device=codes_MP.device)
    if not words_MW.numel():
        return words_MW
    held = max(0.0, 1 - HELD_ERROR * (len(ends) - 1))
    bounds = (alpha_M.clamp(max=3e38) * held, shift_M * held, unit_B.contiguous())  # inf times 0 would be a NaN
    with torch.cuda.device_of(codes_MP):
        _scan[(triton.cdiv(rows, tile.m) * triton.cdiv(cols, tile.n),)](
            TensorDescriptor.from_tensor(_aligned(codes_MP), [tile.m, k]),
            TensorDescriptor.from_tensor(_aligned(codes_BP), [tile.n, k]),
            *(*bounds, words_MW, rows, cols, words_MW.shape[1]),
            **_constants(ends, squared, codes_MP.dtype, tile),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return words_MW


def pairs_of(words_MW: Tensor, capacity: int) -> tuple[Tensor, Tensor] | None:
    """Rows and columns (Q,) int64 of the bits that are 1, in ascending order; None where more than `capacity`."""
    row, word = words_MW.nonzero(as_tuple=True)
    if len(row) > capacity:
        return None
    bits = torch.arange(32, device=words_MW.device, dtype=torch.int32)
    which, bit = ((words_MW[row, word, None] >> bits) & 1).nonzero(as_tuple=True)
    return None if len(which) > capacity else (row[which], word[which] * 32 + bit)


def pair_products(a_ML: Tensor, b_BL: Tensor, spans: list[slice], rows: Tensor, cols: Tensor) -> Tensor:
    """(S, Q) float64: the products of each scale of a[rows[q]] and b[cols[q]]; descriptors float32."""
    out_SQ = a_ML.new_empty(len(spans), len(rows), dtype=torch.float64)
    if out_SQ.numel():
        with torch.cuda.device_of(a_ML):
            _pair_products[(triton.cdiv(len(rows), PAIRS),)](
                *(a_ML.contiguous(), b_BL.contiguous(), rows, cols, out_SQ, len(rows), a_ML.shape[1]),
                STARTS=(*(span.start for span in spans), spans[-1].stop),
                PAIRS=PAIRS,
                NUMBERS=NUMBERS,
            )
    return out_SQ


def _check(codes_MP, codes_BP, ends, squared, alpha_M, shift_M, unit_B) -> None:
    width = ends[-1]
    for name, codes in (("centers", codes_MP), ("pool", codes_BP)):
        if codes.ndim != 2 or codes.shape[1] != width or codes.dtype != codes_MP.dtype or codes.dtype not in DTYPES:
            raise ValueError(f"expected {name} (N, {width}) in one of {DTYPES}, got {tuple(codes.shape)} {codes.dtype}")
    if any(end % CHUNK for end in ends) or (len(ends) > 1 and not squared):
        raise ValueError(f"expected groups that end at multiples of {CHUNK}, one if not squared, got {ends}")
    for name, x, n in (("alpha", alpha_M, codes_MP), ("shift", shift_M, codes_MP), ("unit", unit_B, codes_BP)):
        if x.shape != n.shape[:1] or x.dtype != torch.float32 or x.device != codes_MP.device:
            got = f"{tuple(x.shape)} {x.dtype} on {x.device}"
            raise ValueError(f"expected {name} ({len(n)},) float32 on {codes_MP.device}, got {got}")


def _aligned(codes_NP: Tensor) -> Tensor:
    codes_NP = codes_NP.contiguous()
    return codes_NP if codes_NP.data_ptr() % 16 == 0 else codes_NP.clone()


def _constants(ends: tuple[int, ...], squared: bool, dtype: torch.dtype, tile: Tile) -> dict:
    """What the kernel is compiled for."""
    chunk = tile.k // dtype.itemsize
    return {
        "LASTS": tuple(end // chunk - 1 for end in ends),
        "SQUARED": squared,
        "INTEGER": dtype == torch.int8,
        "TILE_M": tile.m,
        "TILE_N": tile.n,
        "TILE_K": chunk,
        "GROUP": GROUP,
        # Triton's interpreter multiplies bfloat16's bits.
        "RAISE": dtype == torch.bfloat16 and not isinstance(_scan, triton.JITFunction),
    }


@jit
def _scan(
    centers_MP,  # descriptors, in the sense of the hardware's tensor copies, of blocks (m, k) and (n, k)
    pool_BP,
    alpha_M,
    shift_M,
    unit_B,
    words_MW,
    num_centers,
    num_pool,
    num_words,
    LASTS: tl.constexpr,
    SQUARED: tl.constexpr,
    INTEGER: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    RAISE: tl.constexpr,
):
    """One tile: products, edges, bits."""
    tile_row, tile_col = _tile_of(tl.program_id(0), tl.cdiv(num_centers, TILE_M), tl.cdiv(num_pool, TILE_N), GROUP)
    row, col = tile_row * TILE_M, tile_col * TILE_N
    sum_mn = _sums(centers_MP, pool_BP, row, col, LASTS, SQUARED, INTEGER, TILE_M, TILE_N, TILE_K, RAISE)
    rows_m, cols_n = row + tl.arange(0, TILE_M), col + tl.arange(0, TILE_N)
    alpha_m = tl.load(alpha_M + rows_m, mask=rows_m < num_centers, other=0.0)
    shift_m = tl.load(shift_M + rows_m, mask=rows_m < num_centers, other=0.0)
    unit_n = tl.load(unit_B + cols_n, mask=cols_n < num_pool, other=0.0)
    edge_mn = alpha_m[:, None] * unit_n[None, :] - shift_m[:, None]
    if SQUARED:
        edge_mn = edge_mn * tl.abs(edge_mn)
    hit_mn = ~(sum_mn < edge_mn) & (cols_n < num_pool)[None, :]
    hit_mwb = tl.reshape(hit_mn.to(tl.int32), (TILE_M, TILE_N // 32, 32))
    word_mw = tl.sum(hit_mwb << tl.arange(0, 32)[None, None, :], axis=2)
    word_w = tile_col * (TILE_N // 32) + tl.arange(0, TILE_N // 32)
    place_mw = words_MW + rows_m.to(tl.int64)[:, None] * num_words + word_w[None, :]  # M W may be above 2^31
    tl.store(place_mw, word_mw, mask=(rows_m < num_centers)[:, None])


@jit
def _tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Down GROUP tiles of centers, then the next tile of the pool; at the pool's end the next GROUP."""
    first = program // (GROUP * tiles_n) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    rest = program % (GROUP * tiles_n)
    return first + rest % size, rest // size


@jit
def _sums(
    centers_MP,
    pool_BP,
    row,
    col,
    LASTS: tl.constexpr,
    SQUARED: tl.constexpr,
    INTEGER: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    RAISE: tl.constexpr,
):
    """(m, n) float32: the product, or the sum of the groups' squared products; rows past the end are zeros."""
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    sum_mn = tl.zeros((TILE_M, TILE_N), SUM)
    held = tl.zeros((TILE_M, TILE_N // 2), tl.int32)
    for step in range(0, LASTS[len(LASTS) - 1] + 1):
        a_mk = centers_MP.load([row, step * TILE_K])
        b_nk = pool_BP.load([col, step * TILE_K])
        if RAISE:
            a_mk, b_nk = a_mk.to(tl.float32), b_nk.to(tl.float32)
        sum_mn = tl.dot(a_mk, b_nk.T, sum_mn, out_dtype=SUM)
        if len(LASTS) > 1:
            is_last = step == LASTS[0]
            for v in tl.static_range(1, len(LASTS) - 1):
                is_last = is_last | (step == LASTS[v])
            if is_last:
                number_mn = sum_mn.to(tl.float32)
                held = _pack(_unpack(held, TILE_M, TILE_N) + number_mn * number_mn, TILE_M, TILE_N)
                sum_mn = tl.zeros((TILE_M, TILE_N), SUM)
    number_mn = sum_mn.to(tl.float32)
    if not SQUARED:
        return number_mn
    elif len(LASTS) > 1:  # noqa: RET505 - branches that are compiled, or not
        return number_mn * number_mn + _unpack(held, TILE_M, TILE_N)
    else:
        return number_mn * number_mn


@jit
def _pack(x_mn, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    """Neighbours, which one thread has, as two bfloat16 in 32 bits."""
    low, high = tl.split(tl.reshape(x_mn, (TILE_M, TILE_N // 2, 2)))
    low = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@jit
def _unpack(held, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    low = (held << 16).to(tl.float32, bitcast=True)
    high = ((held >> 16) << 16).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(low, high), (TILE_M, TILE_N))


@jit
def _pair_products(
    a_ML, b_BL, rows, cols, out_SQ, num_pairs, length, STARTS: tl.constexpr, PAIRS: tl.constexpr, NUMBERS: tl.constexpr
):
    """A few pairs, of which one after the other most often has the same center: its numbers come from the cache."""
    q_p = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    some = q_p < num_pairs
    a_p = a_ML + tl.load(rows + q_p, mask=some, other=0) * length
    b_p = b_BL + tl.load(cols + q_p, mask=some, other=0) * length
    out_p = out_SQ + q_p
    for j in tl.static_range(0, len(STARTS) - 1):
        sum_pk = tl.zeros((PAIRS, NUMBERS), tl.float64)
        for start in range(STARTS[j], STARTS[j + 1], NUMBERS):
            k = start + tl.arange(0, NUMBERS)
            mask = some[:, None] & (k < STARTS[j + 1])[None, :]
            a_pk = tl.load(a_p[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float64)
            sum_pk += a_pk * tl.load(b_p[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float64)
        tl.store(out_p, tl.sum(sum_pk, axis=1), mask=some)
        out_p += num_pairs  # S Q may be above 2^31
