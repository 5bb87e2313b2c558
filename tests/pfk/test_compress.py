"""Narrow storage and PCA against loops, and what they promise the kernel."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypfk.pfk import compress
from raypfk.pfk.kernel import MAX_LENGTH

from .strategies import lengths, quick, seeds, vectors

dtypes = st.sampled_from(list(compress.DTYPES))


def scales(row: list[float], lengths: tuple[int, ...]) -> list[list[float]]:
    ends = [sum(lengths[: j + 1]) for j in range(len(lengths))]
    return [row[end - n : end] for n, end in zip(lengths, ends, strict=True)]


def unit(numbers: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in numbers))
    return [x / length for x in numbers] if length else numbers


@quick
@given(lengths, st.integers(0, 6), seeds)
def test_int8_is_the_loop(lengths, n, seed):
    """q = round(127 x / max|x|) in each scale of each row, zeros for zeros; read back, q at unit length."""
    x = vectors(n, lengths, seed)
    stored = compress.quantise(x, lengths, "int8")
    assert stored.dtype == torch.int8 and stored.shape == x.shape
    for row, q_row, back in zip(
        x.tolist(), stored.tolist(), compress.dequantise(stored, lengths).tolist(), strict=True
    ):
        loop = []
        for numbers in scales(row, lengths):
            most = max(map(abs, numbers))
            loop.append([round(x * 127 / most) if most else 0 for x in numbers])
        assert q_row == [q for part in loop for q in part]
        assert back == pytest.approx([x for part in loop for x in unit(part)], abs=1e-7)


@quick
@given(lengths, st.integers(0, 6), seeds, dtypes)
def test_what_is_read_back_is_standardised_and_near(lengths, n, seed, dtype):
    """Every dtype: float32 out, scales of unit length or zero, each number within the dtype's step."""
    x = vectors(n, lengths, seed)
    stored = compress.quantise(x, lengths, dtype)
    back = compress.dequantise(stored, lengths)
    assert stored.dtype == compress.DTYPES[dtype] and back.dtype == torch.float32 and back.shape == x.shape
    for part, was in zip(back.split(list(lengths), 1), x.split(list(lengths), 1), strict=True):
        norm = part.norm(dim=1)
        assert (norm <= MAX_LENGTH).all()
        assert ((norm - 1).abs() < 1e-6)[was.norm(dim=1) > 0].all() and (part[was.norm(dim=1) == 0] == 0).all()
    step = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7, "int8": 2.0 / 127}[dtype]
    assert ((back - x).abs() <= step * max(1, max(lengths) ** 0.5)).all()


@quick
@given(lengths, st.integers(1, 6), seeds, dtypes)
def test_a_row_read_back_alone_is_the_same_to_the_last_bit(lengths, n, seed, dtype):
    """What a row is read back as does not depend on the rows beside it."""
    stored = compress.quantise(vectors(n, lengths, seed), lengths, dtype)
    alone = torch.cat([compress.dequantise(stored[i : i + 1], lengths) for i in range(n)])
    assert torch.equal(alone, compress.dequantise(stored, lengths))


def test_float32_is_not_copied():
    x = vectors(5, (3, 4), 1)
    assert compress.dequantise(compress.quantise(x, (3, 4), "float32"), (3, 4)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", compress.DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_refused_going_in_and_kept_coming_out(dtype, value):
    """quantise names the row; a NaN that a stored file holds reaches the reader, who can then name the image."""
    x = vectors(4, (3, 4), 1)
    x[2, 5] = value
    with pytest.raises(ValueError, match="row 2"):
        compress.quantise(x, (3, 4), dtype)
    if dtype in ("float16", "bfloat16"):
        back = compress.dequantise(x.to(compress.DTYPES[dtype]), (3, 4))
        assert back[2, 3:].isnan().any() and back[[0, 1, 3]].isfinite().all() and back[2, :3].isfinite().all()


def test_other_dtypes_and_shapes_are_refused():
    x = vectors(4, (3, 4), 1)
    with pytest.raises(ValueError, match="expected dtype float32.*'int4'"):
        compress.quantise(x, (3, 4), "int4")
    with pytest.raises(ValueError, match=r"float64"):
        compress.dequantise(x.double(), (3, 4))
    for call in (compress.quantise, compress.principal_directions):
        with pytest.raises(ValueError, match=r"expected \(N, 6\).*\(4, 7\)"):
            call(x, (3, 3), "int8" if call is compress.quantise else 2)
    with pytest.raises(ValueError, match="at least 1 direction"):
        compress.principal_directions(x, (3, 4), 0)


@quick
@given(lengths, st.integers(0, 6), seeds, st.integers(1, 10))
def test_a_projection_is_the_loop(lengths, n, seed, dims):
    """Dot products with each direction, at unit length again; directions orthonormal, min(dims, L_j) of a scale."""
    x = vectors(n, lengths, seed)
    directions = compress.principal_directions(vectors(30, lengths, seed + 1), lengths, dims)
    assert [tuple(b.shape) for b in directions] == [(length, min(dims, length)) for length in lengths]
    for b in directions:
        torch.testing.assert_close(b.T @ b, torch.eye(b.shape[1]), atol=1e-5, rtol=0)
    projected = compress.project(x, directions)
    assert projected.dtype == torch.float32
    assert (torch.stack([p.norm(dim=1) for p in projected.split([b.shape[1] for b in directions], 1)]) <= 1.001).all()
    for row, got in zip(x.tolist(), projected.tolist(), strict=True):
        loop = []
        for numbers, b in zip(scales(row, lengths), directions, strict=True):
            dots = [sum(x * y for x, y in zip(numbers, column, strict=True)) for column in b.T.tolist()]
            loop += unit(dots) if math.hypot(*dots) > compress.CONSTANT else [0.0] * len(dots)
        assert got == pytest.approx(loop, abs=1e-5)


def test_all_directions_keep_all_correlations():
    """With d_j = L_j a projection is a rotation: dot products are those of before."""
    lengths = (5, 8)
    x = vectors(40, lengths, 3)
    y = compress.project(x, compress.principal_directions(x, lengths, 8))
    for a, b in zip(x.split(lengths, 1), y.split(lengths, 1), strict=True):
        torch.testing.assert_close(a @ a.T, b @ b.T, atol=1e-5, rtol=0)


def test_the_first_direction_keeps_the_most():
    """Vectors near one line: one direction keeps them; what lies across it becomes zeros, not noise."""
    line = torch.tensor([[0.6, 0.8, 0.0]])
    (b,) = compress.principal_directions(line.repeat(50, 1), (3,), 1)
    torch.testing.assert_close(b, line.T)
    across = torch.tensor([[0.8, -0.6, 0.0], [0.0, 0.0, 1.0]])
    assert torch.equal(compress.project(across, [b]), torch.zeros(2, 1))
