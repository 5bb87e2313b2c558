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
    bounds, of = scan._bounds(kernel, low_centers, low_pool, floor_M, factor), scan.layout(kernel, False)
    for rows, cols in (found, scan._by_torch(of, low_centers, low_pool, bounds, m * n)):
        pairs = list(zip(rows.tolist(), cols.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs) and wanted <= set(pairs)
        most = largest_scores(kernel, centers, pool)[rows, cols] * factor[cols]
        assert (most >= floor_M[rows] - slack(low_centers, low_pool, kernel)).all()


def largest_scores(kernel: Kernel, centers: Descriptors, pool: Descriptors) -> torch.Tensor:
    """Of each pair what the scan goes by: for `pfk` the sum of w_j ((rz_j + rg_j) / 2)^2, else the score."""
    if kernel.name != "pfk":
        return exact_scores(kernel, centers, pool)
    both = [[x[:, span].double() for x in part] for part in (centers, pool) for span in kernel.spans]
    ours, theirs = both[: len(kernel.spans)], both[len(kernel.spans) :]
    sums = [(a @ c.T + b @ d.T) / 2 for (a, b), (c, d) in zip(ours, theirs, strict=True)]
    return sum(w * r.square() for w, r in zip(kernel.weights, sums, strict=True))


def slack(centers: scan.Rounded, pool: scan.Rounded, kernel: Kernel) -> float:
    """Of a score of size W: relative errors of vectors count about twice."""
    relative = max(float((x.errors_TN.max(1).values / factors(kernel)).max()) for x in (centers, pool))
    largest = sum(kernel.weights) * (2 if kernel.name == "pfk-sum" else 1)
    u = 0.01 if centers.precision == "bfloat16" else 1e-3
    return (8 * relative + u) * largest + 1e-9


def factors(kernel: Kernel) -> torch.Tensor:
    return torch.tensor([v.factor or 1.0 for v in scan.layout(kernel, False).vectors])


@quick
@given(st.lists(st.tuples(*[st.floats(-1, 1)] * 2), min_size=1, max_size=4))
def test_squared_sums_are_never_less_than_the_score(pairs):
    """4 x y <= (x + y)^2, the inequality that all of `pfk`'s scan rests on, with equality where x = y."""
    score, square = sum(x * y for x, y in pairs), sum((x + y) ** 2 for x, y in pairs) / 4
    assert score <= square + 1e-15 and (any(x != y for x, y in pairs) or abs(score - square) <= 1e-15)


@pytest.mark.parametrize("by_one", [0.0, 1.0])
@pytest.mark.parametrize("precision", SUPPORTED)
@pytest.mark.parametrize("name", NAMES)
def test_loops_and_torch_find_the_same(name, precision, by_one, monkeypatch):
    """At real tile sizes, and a last tile that is not full: the same pairs, but for some at the very limit (products
    come out in bfloat16); of `pfk` in int8 fewer, as these are looked at twice, but none that is well within."""
    kernel = Kernel(name, (33, 70))
    monkeypatch.setattr(scan, "ONE_BY_ONE", by_one)
    torch.manual_seed(4)
    x = standardise(torch.randn(1300, 103) + torch.randn(50, 103).repeat(26, 1), (33, 70))  # 50 clusters
    part = scan.round_to(kernel, precision, Descriptors(x, x))
    centers, pool = part.rows(slice(0, 600)), part.rows(slice(600, None))
    floor = 0.25 * sum(kernel.weights) * (2 if name == "pfk-sum" else 1)
    rows, cols = scan.survivors(kernel, centers, pool, torch.full((600,), floor))
    got = set(zip(rows.tolist(), cols.tolist(), strict=True))
    by_torch, near = [], 0.01 if precision == "bfloat16" else 0.001
    for factor in (1.08 if name == "pfk" and precision == "int8" else 1 + near, 1 - near):
        bounds = scan._bounds(kernel, centers, pool, torch.full((600,), floor * factor), None)
        pairs = scan._by_torch(scan.layout(kernel, False), centers, pool, bounds, 420000)
        by_torch.append(set(zip(*(x.tolist() for x in pairs), strict=True)))
    inner, outer = by_torch
    assert inner <= got <= outer and len(got) == len(rows) and 100 < len(got) < 400000


@pytest.mark.parametrize("precision", SUPPORTED)
def test_more_survivors_than_asked_for_are_none(precision):
    """A capacity that all fit in gives them, one less gives None."""
    kernel = Kernel("pfk", (20,))
    *_, centers, pool = rounded(kernel, precision, 4, 9, 1)
    floor_M = torch.full((4,), -100.0)
    bounds, of = scan._bounds(kernel, centers, pool, floor_M, None), scan.layout(kernel, False)
    assert len(scan._by_torch(of, centers, pool, bounds, 36)[0]) == 36
    assert scan._by_torch(of, centers, pool, bounds, 35) is None
    assert len(scan.survivors(kernel, centers, pool, floor_M, None, 36)[0]) == 36
    assert scan.survivors(kernel, centers, pool, floor_M, None, 35) is None


@pytest.mark.parametrize("precision", SUPPORTED)
def test_floors_of_any_size_are_met(precision):
    """An infinite floor leaves nobody, minus infinity everybody; a zero vector does not disturb the others."""
    kernel = Kernel("pfk", (20, 3))
    part = descriptors(30, kernel.lengths, 1)
    part.z[4], part.g[5] = 0, 0
    low = scan.round_to(kernel, precision, part)
    for floor, count in ((torch.inf, 0), (3e38, 0), (-torch.inf, 900), (-3e38, 900)):
        assert len(scan.survivors(kernel, low, low, torch.full((30,), floor))[0]) == count


@quick
@given(kernels, st.booleans(), st.integers(0, 20), seeds)
def test_int8_codes_are_as_near_as_they_say(kernel, on_gpu, n, seed):
    """The compiled rounding and torch's: the same steps, and no vector farther from its codes than its error."""
    part, of, size = (
        descriptors(n, kernel.lengths, seed),
        scan.layout(kernel, on_gpu),
        1e-4 * max(kernel.weights, default=1),
    )
    got, step = scan.round_to(kernel, "int8", part), torch.empty(n)
    codes, errors = torch.empty(n, of.groups[-1].stop, dtype=torch.int8), torch.empty(len(of.vectors), n)
    scan._round_rows(of, part, codes, step, errors)
    torch.testing.assert_close(got.steps_N, step, rtol=1e-6, atol=0)
    by_numba = scan.layout(kernel, False), got.codes_NP, got.steps_N, got.errors_TN
    for places, c, s, e_TN in ((of, codes, step, errors + size), by_numba):
        assert not n or c.int().abs().max() <= 127
        for v, error in zip(places.vectors, e_TN, strict=True):
            x = part[v.which][:, v.span].double() * v.factor
            away = (x - c[:, v.columns].double() * s.double()[:, None]).norm(dim=1)
            assert (away <= error).all() and (error <= 0.6 * s * x.shape[1] ** 0.5 + 2 * size + 1e-6).all()
    padding = torch.ones(of.groups[-1].stop, dtype=torch.bool)
    for v in of.vectors:
        padding[v.columns] = False
    assert not codes[:, padding].any() and (not on_gpu or all(group.stop % 128 == 0 for group in of.groups))


def test_lengths_see_what_is_not_a_number():
    """As torch's norm, NaN and infinity included, also where rounding finds them on the way."""
    kernel, part = Kernel("pfk", (3, 40, 1), "equal"), descriptors(50, (3, 40, 1), 0)
    part.z[3, 1], part.z[4, 20], part.g[5, 43] = torch.nan, torch.inf, -torch.nan
    expected = torch.stack([x[:, span].norm(dim=1) for x in part for span in kernel.spans])
    assert expected.isnan().sum() == 2 and expected.isinf().sum() == 1
    torch.testing.assert_close(kernel.scale_lengths(part), expected, equal_nan=True)
    by_scale = torch.stack([x[:, span].norm(dim=1) for span in kernel.spans for x in part])
    torch.testing.assert_close(scan.round_to(kernel, "int8", part).lengths_TN, by_scale, equal_nan=True)


def test_int8_products_that_saturate_are_found_out(monkeypatch):
    """As of a processor without VNNI: int8 is not offered, refused where asked for, and left out of the trial."""
    plain, kernel = torch._int_mm, Kernel("pcc", (64,))
    monkeypatch.setattr(torch, "_int_mm", lambda x, y, out: plain(x, y, out=out).clamp_(-(2**15), 2**15 - 1))
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


@pytest.mark.parametrize("name", NAMES)
def test_scales_of_one_number_are_multiplied_too(name):
    """oneDNN leaves int8 products of one column unwritten, for some strides: whatever was in memory would count."""
    kernel, torch_empty = Kernel(name, (1, 8), "equal"), torch.empty

    def dirty(*shape, **options):
        x = torch_empty(*shape, **options)
        return x.fill_(-(10**9)) if x.dtype == torch.int32 else x

    part = Descriptors(*(torch.nn.functional.pad(torch.rand(300, 1) * 2 - 1, (0, 8)) for _ in range(2)))
    scores = kernel.block(*[part.to(torch.float64)] * 2)
    floor_M = scores.quantile(0.9, dim=1).float()
    low = scan.round_to(kernel, SUPPORTED[-1], part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", dirty)
        patch.setattr(scan, "ONE_BY_ONE", 1.0)
        rows, cols = scan.survivors(kernel, low, low, floor_M)
    wanted = {tuple(pair) for pair in (scores >= floor_M[:, None]).nonzero().tolist()}
    assert wanted <= set(zip(rows.tolist(), cols.tolist(), strict=True))


def test_autocast_changes_nothing():
    """A caller's half precision: the bounds are of what is computed here."""
    kernel, part = Kernel("pfk", (40, 24)), descriptors(200, (40, 24), 3)
    for precision in SUPPORTED:
        low, floor_M = scan.round_to(kernel, precision, part), torch.full((200,), 20.0)
        with torch.autocast("cpu", torch.bfloat16):
            got = scan.survivors(kernel, low, low, floor_M)
        assert all(torch.equal(x, y) for x, y in zip(got, scan.survivors(kernel, low, low, floor_M), strict=True))


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
