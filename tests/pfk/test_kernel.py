import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypfk.pfk import Descriptors, Kernel, reference, scale_weights, standardise

from .strategies import NAMES, descriptors, kernels, lists, quick, seeds


@quick
@given(kernels, st.integers(0, 5), st.integers(0, 7), seeds)
def test_block_and_pairs_are_the_loops_scores(kernel, m, b, seed):
    """Every kernel and weight: pairs to 1e-12, the block within its error bound of the rounded exact score."""
    centers, pool = descriptors(m, kernel.lengths, seed), descriptors(b, kernel.lengths, seed + 7)
    expected = torch.tensor(
        reference.scores(kernel.name, kernel.lengths, kernel.weight, lists(centers), lists(pool)), dtype=torch.float64
    ).reshape(m, b)
    rows, cols = torch.cartesian_prod(torch.arange(m), torch.arange(b)).T
    exact = kernel.pairs(centers, pool, rows, cols).reshape(m, b)
    torch.testing.assert_close(exact, expected, rtol=1e-12, atol=1e-12)
    block = kernel.block(centers, pool)
    assert block.dtype == torch.float32 and block.shape == (m, b)
    assert ((block.double() - exact.float().double()).abs() <= kernel.error_bound()).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [(3,), (64, 256, 512), (2048,)])
def test_the_error_bound_holds_and_is_of_use(name, lengths):
    """On long vectors, equal, opposite and random, the block keeps the bound, under 2e-3 of the largest score."""
    kernel = Kernel(name, lengths)
    torch.manual_seed(1)
    z, g = standardise(torch.randn(80, sum(lengths)), lengths).chunk(2)
    centers, pool = Descriptors(z, g), Descriptors(torch.cat([z, -z, z.abs()]), torch.cat([g, g, -g]))
    pool = Descriptors(standardise(pool.z, lengths), pool.g)
    rows, cols = torch.cartesian_prod(torch.arange(40), torch.arange(120)).T
    error = kernel.block(centers, pool).flatten().double() - kernel.pairs(centers, pool, rows, cols).float().double()
    largest = sum(kernel.weights) * (2 if name == "pfk-sum" else 1)
    assert error.abs().max() <= kernel.error_bound() <= 2e-3 * largest


@quick
@given(kernels, st.integers(0, 8), st.integers(0, 30), seeds)
def test_exact_scores_are_the_pairs_to_the_bit(kernel, m, b, seed):
    """Dense or sampled float64 products, with pairs where they leave a doubt: pairs rounded to float32, scaled."""
    centers, pool = descriptors(m, kernel.lengths, seed), descriptors(b, kernel.lengths, seed + 7)
    cols, rows = torch.cartesian_prod(torch.arange(b), torch.arange(m)).T
    pairs = kernel.pairs(centers, pool, rows, cols)
    exact = pairs.float()
    assert torch.equal(kernel.exact_block(centers, pool), exact.reshape(b, m).T)
    assert torch.equal(kernel.exact_pairs(centers, pool, rows, cols), exact)
    factor = torch.rand(len(cols), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(kernel.exact_pairs(centers, pool, rows, cols, factor), (pairs * factor).float())
    factor_B = torch.rand(b, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scaled = (pairs.reshape(b, m) * factor_B[:, None]).float().T
    assert torch.equal(kernel.exact_block(centers, pool, factor_B), scaled)


def test_the_error_bound_widens_where_products_are_narrower():
    """With TF32 or bfloat16 products allowed, the bound covers their rounding."""
    kernel = Kernel("pfk", (64, 64))
    exact = kernel.error_bound()
    try:
        torch.set_float32_matmul_precision("medium")
        assert kernel.error_bound() > 100 * exact
        centers = descriptors(50, kernel.lengths, 1)
        rows, cols = torch.cartesian_prod(torch.arange(50), torch.arange(50)).T
        error = kernel.block(centers, centers).flatten().double() - kernel.pairs(centers, centers, rows, cols)
        assert error.abs().max() <= kernel.error_bound()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_autocast_does_not_reach_the_block():
    """A caller's autocast leaves the scores in float32, to the bit."""
    kernel, part = Kernel("pfk-sum", (16, 32)), descriptors(20, (16, 32), 3)
    expected = kernel.block(part, part)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kernel.block(part, part), expected)


@quick
@given(kernels, st.integers(1, 30), seeds)
def test_a_pair_has_one_score_to_the_bit(kernel, n, seed):
    """Asked alone, among others, in another order or the other way round, a pair's float64 score is the same."""
    a, b = descriptors(n, kernel.lengths, seed), descriptors(n, kernel.lengths, seed + 5)
    rows = torch.arange(n)
    together = kernel.pairs(a, b, rows, rows)
    alone = torch.cat([kernel.pairs(a.rows(rows[i : i + 1]), b, rows[:1], rows[i : i + 1]) for i in range(n)])
    assert torch.equal(together, alone)
    assert torch.equal(together, kernel.pairs(b, a, rows.flip(0), rows.flip(0)).flip(0))


def test_pairs_in_chunks_are_pairs_at_once(monkeypatch):
    """The chunk size, a matter of memory, is not in the result."""
    kernel, part = Kernel("pfk", (5, 9)), descriptors(30, (5, 9), 4)
    rows, cols = torch.randint(30, (2, 500))
    expected = kernel.pairs(part, part, rows, cols)
    monkeypatch.setattr("raypfk.pfk.kernel.PAIR_NUMBERS", {"cpu": 100})
    assert torch.equal(kernel.pairs(part, part, rows, cols), expected)


def test_self_scores_show_the_weights():
    """A vector with itself scores sum w_j: pfk-sum twice that; pcc by length is the paper's unit-variance product."""
    x = torch.randn(1, 12, dtype=torch.float64)
    lengths, index = (5, 7), torch.zeros(1, dtype=torch.int64)
    z = standardise(x, lengths)
    for kind, expected in [("length", 10.0), ("length-squared", 52.0), ("equal", 2.0)]:
        assert sum(scale_weights(lengths, kind)) == expected
        for name, times in [("pcc", 1), ("pfk", 1), ("pfk-sum", 2)]:
            got = Kernel(name, lengths, kind).pairs(Descriptors(z, z), Descriptors(z, z), index, index).item()
            assert got == pytest.approx(times * expected, rel=1e-6)
    y = torch.randn(1, 12, dtype=torch.float64)
    unit = [(t - t.mean()) / t.std() for v in (x, y) for t in v[0].split(lengths)]
    paper = (unit[0] @ unit[2] + unit[1] @ unit[3]).item()
    w = standardise(y, lengths)
    assert Kernel("pcc", lengths).block(Descriptors(z, z), Descriptors(w, w)).item() == pytest.approx(paper, abs=1e-5)


def test_unknown_names_are_refused():
    """A kernel, a weight kind or a length that does not exist is an error on construction."""
    for arguments in [("cosine", (3,)), ("pfk", (3,), "none"), ("pfk", ()), ("pfk", (0, 3))]:
        with pytest.raises(ValueError, match="expected"):
            Kernel(*arguments)


def test_weights_can_be_given():
    """The w_j of a kind, given as numbers, score alike; as many as scales are wanted, none negative or infinite."""
    kernel = Kernel("pfk", (3, 4, 2))
    given = Kernel("pfk", (3, 4, 2), kernel.weights)
    centers = descriptors(5, kernel.lengths, 1)
    rows = torch.arange(5)
    assert given.weights == (2.0, 3.0, 1.0) and given.error_bound() == kernel.error_bound()
    assert torch.equal(given.block(centers, centers), kernel.block(centers, centers))
    assert torch.equal(given.pairs(centers, centers, rows, rows), kernel.pairs(centers, centers, rows, rows))
    for wrong in ((1.0, 2.0), (1.0, -1.0, 0.0), (1.0, float("nan"), 0.0), (1.0, float("inf"), 0.0), (1e-13, 1.0, 1.0)):
        with pytest.raises(ValueError, match="expected 3 weights, each 0 or 1e-12 to 1e12"):
            Kernel("pfk", (3, 4, 2), wrong)
