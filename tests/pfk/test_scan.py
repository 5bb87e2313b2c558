"""The scan must miss nobody: held against float64 loops, and the compiled loops against whole torch operations."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypfk.pfk import Descriptors, Kernel, TopK, kernel, loops, reference, scan, standardise

from .strategies import NAMES, descriptors, kernels, lists, quick, seeds, vectors

SUPPORTED = scan.supported(Kernel("pfk", (8,)), torch.device("cpu"))
precisions = st.sampled_from(SUPPORTED)


def rounded(kernel: Kernel, precision: str, m: int, n: int, seed: int):
    centers, pool = descriptors(m, kernel.lengths, seed), descriptors(n, kernel.lengths, seed + 3)
    return centers, pool, *(scan.round_to(kernel, precision, part) for part in (centers, pool))


def exact_scores(kernel: Kernel, centers: Descriptors, pool: Descriptors) -> torch.Tensor:
    scores = reference.scores(kernel.name, kernel.lengths, kernel.weight, lists(centers), lists(pool))
    return torch.tensor(scores, dtype=torch.float64).reshape(len(centers.z), len(pool.z))


@quick
@given(kernels, precisions, st.integers(1, 8), st.integers(1, 30), st.booleans(), st.floats(0, 1), seeds)
def test_no_pair_that_reaches_its_floor_is_missed(kernel, precision, m, n, by_one, high, seed):
    """Any precision, floor and factor; by one correlation first, or both at once; on a CPU, or as on another device."""
    centers, pool, low_centers, low_pool = rounded(kernel, precision, m, n, seed)
    generator = torch.Generator().manual_seed(seed)
    factor, scores = torch.rand(n, generator=generator), exact_scores(kernel, centers, pool)
    floor_M = (scores * factor).quantile(high, dim=1).float()
    wanted = {tuple(pair) for pair in (scores * factor >= floor_M[:, None]).nonzero().tolist()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "TILE_CENTERS", 3)
        patch.setattr(scan, "TILE_POOL", 4)
        patch.setattr(scan, "ONE_BY_ONE", 1.0 if by_one else 0.1)
        found = scan.survivors(kernel, low_centers, low_pool, floor_M, factor)
    bounds = scan._bounds(kernel, low_centers, low_pool, floor_M, factor)
    by_torch = scan._by_torch(kernel, low_centers, low_pool, bounds, m * n)
    for rows, cols in (found, by_torch):
        pairs = list(zip(rows.tolist(), cols.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs) and wanted <= set(pairs)
        errors = sum(2.0 * e.max() for part in (low_centers, low_pool) for e in part.errors_TN)
        slack = (errors + 0.01) * sum(kernel.weights) * 4 + 4 * kernel.error_bound()
        assert (scores[rows, cols] * factor[cols] >= floor_M[rows] - slack).all()


@pytest.mark.parametrize("by_one", [0.0, 1.0])
@pytest.mark.parametrize("precision", SUPPORTED)
@pytest.mark.parametrize("name", NAMES)
def test_loops_and_torch_find_the_same(name, precision, by_one, monkeypatch):
    """At real tile sizes, and a last tile that is not full: the same pairs, but for some at the very limit."""
    kernel = Kernel(name, (33, 70))
    monkeypatch.setattr(scan, "ONE_BY_ONE", by_one)
    torch.manual_seed(4)
    x = standardise(torch.randn(1300, 103) + torch.randn(50, 103).repeat(26, 1), (33, 70))  # 50 clusters
    part = scan.round_to(kernel, precision, Descriptors(x, x))
    centers, pool = part.rows(slice(0, 600)), part.rows(slice(600, None))
    floor_M = torch.full((600,), 0.25 * sum(kernel.weights) * (2 if name == "pfk-sum" else 1))
    bounds = scan._bounds(kernel, centers, pool, floor_M, None)
    rows, cols = scan.survivors(kernel, centers, pool, floor_M)
    got = set(zip(rows.tolist(), cols.tolist(), strict=True))
    limits = [bounds._replace(limit_M=bounds.limit_M + x) for x in (1e-3, -1e-3)]
    pairs = [scan._by_torch(kernel, centers, pool, some, 420000) for some in limits]
    inner, outer = (set(zip(*(x.tolist() for x in some), strict=True)) for some in pairs)
    assert inner <= got <= outer and len(got) == len(rows) and 100 < len(got) < 400000


@pytest.mark.parametrize("precision", SUPPORTED)
@pytest.mark.parametrize("search", ["_by_tiles", "_by_torch"])
def test_more_survivors_than_asked_for_are_none(search, precision):
    """A capacity that all fit in gives them, one less gives None."""
    kernel = Kernel("pfk", (20,))
    *_, centers, pool = rounded(kernel, precision, 4, 9, 1)
    bounds = scan._bounds(kernel, centers, pool, torch.full((4,), -100.0), None)
    assert len(getattr(scan, search)(kernel, centers, pool, bounds, 36)[0]) == 36
    assert getattr(scan, search)(kernel, centers, pool, bounds, 35) is None


@quick
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple), st.integers(0, 20), seeds)
def test_int8_codes_are_as_near_as_they_say(lengths, n, seed):
    """The compiled rounding and torch's: the same steps, and no vector farther from its codes than its error."""
    kernel, part = Kernel("pfk", lengths, "equal"), descriptors(n, lengths, seed)
    got = scan.round_to(kernel, "int8", part)
    for i, x in enumerate(kernel.matrices(part)):
        codes, (step, error, length) = torch.empty_like(x, dtype=torch.int8), torch.empty(3, n)
        scan._round_rows(x, codes, step, error, length)
        torch.testing.assert_close(got.lengths_TN[i], length)
        torch.testing.assert_close(got.steps_TN[i], step, rtol=1e-6, atol=0)
        for c, s, e in ((codes, step, error), (got.matrices[i], got.steps_TN[i], got.errors_TN[i])):
            assert not n or c.abs().max() <= 127
            away = (x.double() - c.double() * s.double()[:, None]).norm(dim=1)
            assert (away <= e).all() and (e <= 0.6 * s * x.shape[1] ** 0.5 + 1e-5).all()


def test_lengths_see_what_is_not_a_number():
    """As torch's norm, NaN and infinity included, also where rounding finds them on the way."""
    kernel, part = Kernel("pfk", (3, 40, 1), "equal"), descriptors(50, (3, 40, 1), 0)
    part.z[3, 1], part.z[4, 20], part.g[5, 43] = torch.nan, torch.inf, -torch.nan
    expected = torch.stack([x[:, span].norm(dim=1) for x in part for span in kernel.spans])
    assert expected.isnan().sum() == 2 and expected.isinf().sum() == 1
    torch.testing.assert_close(kernel.scale_lengths(part), expected, equal_nan=True)
    by_scale = torch.stack([x.norm(dim=1) for x in kernel.matrices(part)])
    torch.testing.assert_close(scan.round_to(kernel, "int8", part).lengths_TN, by_scale, equal_nan=True)


def test_int8_products_that_saturate_are_found_out(monkeypatch):
    """As of a processor without VNNI: int8 is not offered, refused where asked for, and left out of the trial."""
    plain, kernel = torch._int_mm, Kernel("pcc", (64,))
    monkeypatch.setattr(torch, "_int_mm", lambda x, y: plain(x, y).clamp(-(2**15), 2**15 - 1))
    scan._int8_products_are_exact.cache_clear()
    try:
        assert "int8" not in scan.supported(kernel, torch.device("cpu"))
        assert scan.fastest(Kernel("pcc", (65,)), torch.device("cpu")) != "int8"
        part = descriptors(4, (64,), 0)
        with pytest.raises(ValueError, match="precision int8: its products are not exact"):
            TopK(4, 2, precision="int8").add(kernel, part, part, torch.arange(4))
    finally:
        monkeypatch.undo()
        scan._int8_products_are_exact.cache_clear()
    assert "int8" not in scan.supported(Kernel("pcc", (scan.LONGEST_INT8 + 1,)), torch.device("cpu"))


def test_a_product_above_1_rounded_to_bfloat16_is_within_its_bound():
    """Rounding errs by 2^-8 of a number, just above 1 by all of it: an image at the floor of its opposite is found."""
    kernel, sign = Kernel("pcc", (1029,)), torch.ones(1, 1029)
    sign[:, ::2] = -1
    x = sign * (1.99609375 + 1e-4) / 64
    center, image = (scan.round_to(kernel, "bfloat16", Descriptors(y, y)) for y in (x, -x))
    floor_M = torch.tensor([-1028.0 * float(x.double() @ x.double().T)])
    assert len(scan.survivors(kernel, center, image, floor_M)[0]) == 1


@quick
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 40), seeds)
def test_sampled_products_are_those_of_the_matrices(m, n, q, seed):
    """Compiled, or by torch's sparse product as on a GPU: distinct pairs in any order."""
    lengths, generator = (3, 70), torch.Generator().manual_seed(seed)
    a, b, spans = vectors(m, lengths, seed), vectors(n, lengths, seed + 1), Kernel("pcc", lengths).spans
    pairs = torch.randperm(m * n, generator=generator)[:q]
    rows, cols = pairs // n, pairs % n
    expected = torch.stack([(a[:, s].double() @ b[:, s].double().T)[rows, cols] for s in spans])
    for sampled in (kernel._sampled, kernel._sampled_on_cpu):
        torch.testing.assert_close(sampled(a, b, spans, rows, cols), expected, rtol=0, atol=1e-14)


def test_without_a_folder_for_compiled_code_it_is_compiled_all_the_same(monkeypatch):
    """A read-only installation and no home: Numba refuses to cache, and the function works."""

    def no_folder(function, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(function, **options)

    njit = loops.njit
    monkeypatch.setattr(loops, "njit", no_folder)
    square = loops._compiled(lambda x: x * x)
    assert square(np.float32(3)) == 9


@pytest.mark.parametrize("name", NAMES)
def test_the_fastest_precision_is_one_that_works(name):
    """Whatever the trial finds, torch can multiply in it here."""
    kernel = Kernel(name, (24, 40))
    assert scan.fastest(kernel, torch.device("cpu")) in scan.PRECISIONS
    assert all(scan._seconds(kernel, p, descriptors(300, kernel.lengths, 0)) > 0 for p in scan.PRECISIONS)
