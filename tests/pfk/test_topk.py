from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypfk.pfk import Descriptors, Kernel, TopK, Votes, reference, scan, standardise, topk

from .strategies import descriptors, kernels, lists, quick, seeds


def oracle(kernel: Kernel, centers: Descriptors, pool: Descriptors, keys: torch.Tensor, k: int):
    """`reference.top_k` of every center, padded as `TopK.result` is."""
    rows = reference.scores(kernel.name, kernel.lengths, kernel.weight, lists(centers), lists(pool))
    return best_of(rows, keys, k)


def best_of(rows: list[list[float]], keys: torch.Tensor, k: int):
    best = [reference.top_k(row, keys.tolist(), k) for row in rows]
    best = [row + [(-torch.inf, -1)] * (k - len(row)) for row in best]
    scores = torch.tensor([[score for score, _ in row] for row in best], dtype=torch.float32).reshape(-1, k)
    return scores, torch.tensor([[key for _, key in row] for row in best], dtype=torch.int64).reshape(-1, k)


def whole(kernel, centers, pool, keys, k):
    top = TopK(len(centers.z), k)
    top.add(kernel, centers, pool, keys)
    return top.result()


def same(got, expected):
    return torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@quick
@given(kernels, st.integers(0, 5), st.integers(0, 25), st.sampled_from([1, 2, 7, 30]), seeds)
def test_top_k_is_the_sorted_list_of_exact_scores(kernel, m, n, k, seed):
    """With ties, duplicates, zero vectors, K > N, no center or no image: the loops' list, to the bit."""
    centers, pool = descriptors(m, kernel.lengths, seed), descriptors(n, kernel.lengths, seed + 3)
    keys = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:n]
    assert same(whole(kernel, centers, pool, keys, k), oracle(kernel, centers, pool, keys, k))


SMALL_TILES = {"TILE_CENTERS": 3, "TILE_POOL": 4, "DENSE_CENTERS": 3, "DENSE_POOL": 4}
SIZES = topk.SIZES["cpu"]
SMALL_PARTS = {
    "SIZES": {"cpu": SIZES._replace(block=11, centers=5, head=20, entries=5)},
    "HEAD": 5,
    "SMALL": 0,
}
SUPPORTED = scan.supported(Kernel("pfk", (8,)), torch.device("cpu"))
precisions = st.sampled_from(SUPPORTED)


@contextmanager
def small_tiles(**more):
    """Tiles and blocks so small that a few vectors go through all of them, and more than once."""
    with pytest.MonkeyPatch.context() as patch:
        for module, values in ((scan, SMALL_TILES), (topk, SMALL_PARTS | more)):
            for name, value in values.items():
                patch.setattr(module, name, value)
        yield


@quick
@given(
    kernels, precisions, st.integers(1, 8), st.integers(1, 60), st.sampled_from([1, 3, 20]), st.integers(1, 9), seeds
)
def test_precision_blocks_order_tiles_and_parts_do_not_matter(kernel, precision, m, n, k, blocks, seed):
    """One block or many, in any order, in small tiles of any precision, some twice, in parts: the same bits."""
    centers, pool = descriptors(m, kernel.lengths, seed), descriptors(n, kernel.lengths, seed + 3)
    keys = torch.arange(n)
    expected = whole(kernel, centers, pool, keys, k)
    generator = torch.Generator().manual_seed(seed)
    parts = [TopK(m, k, precision=precision) for _ in range(3)]
    chunks = list(torch.randperm(n, generator=generator).chunk(blocks))
    with small_tiles():
        for index in [*chunks, chunks[0]]:
            part = parts[int(torch.randint(3, (), generator=generator))]
            part.add(kernel, centers, pool.rows(index), keys[index])
    parts[0].merge(parts[1])
    parts[2].merge(TopK.of(*parts[0].result()))
    parts[2].merge(parts[1])
    assert same(parts[2].result(), expected)


@quick
@given(kernels, precisions, st.integers(1, 8), st.integers(1, 60), st.sampled_from([1, 3, 20]), seeds)
def test_floors_leave_what_reaches_them(kernel, precision, m, n, k, seed):
    """With floors from elsewhere a list holds just those of the K best that reach its floor, ties included."""
    centers, pool = descriptors(m, kernel.lengths, seed), descriptors(n, kernel.lengths, seed + 3)
    scores, keys = whole(kernel, centers, pool, torch.arange(n), k)
    floor = scores[torch.arange(m), torch.randint(k, (m,), generator=torch.Generator().manual_seed(seed))]
    top = TopK(m, k, floor_M=floor, precision=precision)
    with small_tiles():
        top.add(kernel, centers, pool, torch.arange(n))
    low = scores < floor[:, None]
    assert same(top.result(), (scores.masked_fill(low, -torch.inf), keys.masked_fill(low, -1)))


@quick
@given(kernels, precisions, st.integers(0, 8), st.integers(0, 40), st.sampled_from([1, 3, 20]), st.data(), seeds)
def test_votes_are_the_dense_scores_times_the_confidence(kernel, precision, m, n, k, data, seed):
    """Grouped by class, with zeros where nothing was scored: the top-K of every pair's score times q_n(y_m)^gamma."""
    centers, pool = descriptors(m, kernel.lengths, seed), descriptors(n, kernel.lengths, seed + 3)
    generator, width = torch.Generator().manual_seed(seed), data.draw(st.integers(0, 3))
    classes = torch.stack([torch.randperm(5, generator=generator)[:width] for _ in range(n)] or [torch.empty(0, width)])
    classes = classes[:n].long().reshape(n, width) - 1
    shares = torch.randint(0, 4, (n, width), generator=generator) / 3
    gamma = data.draw(st.sampled_from([0.5, 1.0, 2.0]))
    votes = Votes(classes, shares, torch.randint(0, 4, (m,), generator=generator), gamma)
    rows = reference.scores(kernel.name, kernel.lengths, kernel.weight, lists(centers), lists(pool))
    for i, row in enumerate(rows):
        for j in range(n):
            listed = [q for d, q in zip(classes[j].tolist(), shares[j].tolist(), strict=True) if d == votes.labels[i]]
            row[j] *= listed[0] ** gamma if listed else 0.0
    expected = best_of(rows, torch.arange(n), k)
    for group in (0, 4, topk.GROUP):  # pairs of small groups are scored one by one
        top = TopK(m, k, precision=precision)
        with small_tiles(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(topk, "GROUP", group)
            top.add(kernel, centers, pool, torch.arange(n), votes)
        assert same(top.result(), expected)


@pytest.mark.parametrize("fits", [*SUPPORTED, None])
@pytest.mark.parametrize("name", ["pcc", "pfk", "pfk-sum"])
def test_what_overflows_its_budget_falls_back(name, fits, monkeypatch):
    """From low precision to float32, from there to all pairs: the same candidates, and the counts say which it was."""
    kernel, low = Kernel(name, (24, 40)), fits if fits in ("int8", "bfloat16") else SUPPORTED[-1]
    torch.manual_seed(2)
    x = standardise(torch.randn(3000, 64) + 2 * torch.randn(5, 64).repeat(600, 1), kernel.lengths)
    x[::100] = standardise(torch.randn(30, 64).exp() ** 3, kernel.lengths)  # int8 moves these far
    pool, centers = Descriptors(x, x.flip(0)), Descriptors(x[:40], x[-40:])
    expected = whole(kernel, centers, pool, torch.arange(3000), 5)
    monkeypatch.setattr(topk, "BUDGET", {"cpu": {p: float(p == fits) for p in scan.PRECISIONS}})
    monkeypatch.setattr(topk, "SIZES", {"cpu": SIZES._replace(block=1000)})
    monkeypatch.setattr(topk, "HEAD", 500)
    top = TopK(40, 5, precision=low)
    top.add(kernel, centers, pool, torch.arange(3000))
    assert same(top.result(), expected)
    assert (top.counts["int8"] + top.counts["bfloat16"] > 0) == (fits in ("int8", "bfloat16"))
    assert (top.counts["dense"] > 0) == (fits is None or fits != "float32")
    assert (top.counts["overflows"] == 0) == (fits == low)
    assert (top.counts["rescored"] > 0) == (fits is not None)


def test_large_tiles_of_random_vectors_keep_the_exact_order():
    """At the real tile size float32 would swap near-equal scores: the state holds the float64 order all the same."""
    kernel = Kernel("pfk", (16, 48))
    torch.manual_seed(5)
    base = torch.randn(50, 64)
    near = base.repeat(120, 1) * (1 + 1e-6 * torch.randn(6000, 64))
    pool = Descriptors(standardise(near, kernel.lengths), standardise(near.flip(1), kernel.lengths))
    centers = pool.rows(slice(0, 20))
    rows, cols = torch.cartesian_prod(torch.arange(20), torch.arange(6000)).T
    exact = kernel.pairs(centers, pool, rows, cols).float().reshape(20, 6000)
    keys = exact.argsort(dim=1, descending=True, stable=True)[:, :10]
    assert not torch.equal(kernel.block(centers, pool).argsort(dim=1, descending=True, stable=True)[:, :10], keys)
    assert same(whole(kernel, centers, pool, torch.arange(6000), 10), (exact.gather(1, keys), keys))


@pytest.mark.parametrize("budget", [0.0, 2.0])
@pytest.mark.parametrize("name", ["pcc", "pfk", "pfk-sum"])
def test_masses_of_equal_scores_go_by_key(name, budget, monkeypatch):
    """Zero vectors and copies: all pairs tie, scored at once or in bounded batches; the smallest keys win."""
    seen, plain = [], Kernel.pairs

    def spy(self, centers, pool, rows, cols):
        seen.append(len(rows))
        return plain(self, centers, pool, rows, cols)

    monkeypatch.setattr(Kernel, "pairs", spy)
    monkeypatch.setattr(topk, "SIZES", {"cpu": SIZES._replace(entries=1000)})
    monkeypatch.setattr(topk, "BUDGET", {"cpu": dict.fromkeys(scan.PRECISIONS, budget)})
    kernel, one = Kernel(name, (4, 7)), descriptors(40, (4, 7), 3)
    for part in (Descriptors(torch.zeros(6000, 11), torch.zeros(6000, 11)), one.rows(torch.arange(6000) % 3)):
        keys = torch.arange(6000).flip(0)
        scores, best = whole(kernel, part.rows(slice(0, 3)), part, keys, 6)
        assert torch.equal(scores, scores[:, :1].expand(3, 6))
        assert torch.equal(best, oracle(kernel, part.rows(slice(0, 3)), part, keys, 6)[1])
    assert not budget or max(seen) <= 1000


@quick
@given(kernels, st.integers(1, 6), st.integers(1, 40), seeds)
def test_a_k_beyond_the_pool_ranks_every_image(kernel, m, n, seed):
    """With K > N a list is the whole pool in exact order, from dense float64 products as from pairs."""
    centers, pool = descriptors(m, kernel.lengths, seed), descriptors(n, kernel.lengths, seed + 3)
    got = whole(kernel, centers, pool, torch.arange(n), n + 2)
    assert same(got, oracle(kernel, centers, pool, torch.arange(n), n + 2))


@pytest.mark.parametrize("name", ["pcc", "pfk", "pfk-sum"])
def test_a_nan_is_dropped_and_disturbs_nobody(name):
    """NaN rows of the pool are never candidates, a NaN center has none, and all others are as without them."""
    kernel = Kernel(name, (3, 4))
    centers, pool = descriptors(6, kernel.lengths, 1), descriptors(40, kernel.lengths, 2)
    broken = Descriptors(pool.z.clone(), pool.g.clone())
    broken.z[::3, 1] = torch.nan
    good = torch.arange(40)[torch.arange(40) % 3 != 0]
    expected = whole(kernel, centers, pool.rows(good), good, 5)
    assert same(whole(kernel, centers, broken, torch.arange(40), 5), expected)
    top = TopK(6, 5)
    for i in range(0, 40, 4):  # the state is full when later NaNs come
        top.add(kernel, centers, broken.rows(slice(i, i + 4)), torch.arange(i, i + 4))
    assert same(top.result(), expected)
    centers.z[2] = torch.nan
    scores, keys = whole(kernel, centers, pool, torch.arange(40), 5)
    assert (keys[2] == -1).all() and (scores[2] == -torch.inf).all() and (keys[[0, 1, 3, 4, 5]] >= 0).all()


@pytest.mark.parametrize("precision", SUPPORTED)
def test_a_scale_that_does_not_count_may_hold_a_nan_and_vectors_may_be_tiny(precision):
    """0 times NaN is NaN: such an image is dropped. A scale of length 1e-30 and less is not standard, but no error."""
    kernel = Kernel("pfk", (1, 8))
    centers, pool = descriptors(4, kernel.lengths, 1), descriptors(300, kernel.lengths, 2)
    for x in pool:
        x[::7, 1:] *= 1e-38
    good = torch.arange(300) % 50 > 0
    pool.z[~good, 0] = torch.nan
    expected = oracle(kernel, centers, pool.rows(good), torch.arange(300)[good], 10)
    top = TopK(4, 10, precision=precision)
    with small_tiles(HEAD=40):
        top.add(kernel, centers, pool, torch.arange(300))
    assert same(top.result(), expected)


def test_descriptors_stored_in_half_precision_are_ranked_as_stored():
    """float16 storage is raised to float32 first: the result is that of the raised numbers."""
    kernel, part = Kernel("pfk", (8, 8)), descriptors(30, (8, 8), 9).to(torch.float16)
    raised, keys = part.to(torch.float32), torch.arange(30)
    assert same(whole(kernel, part, part, keys, 4), whole(kernel, raised, raised, keys, 4))


def test_what_does_not_fit_is_refused():
    """Shapes, dtypes, unstandardised vectors and accumulators of another size are errors, not wrong candidates."""
    kernel, part, keys = Kernel("pfk", (3,)), descriptors(4, (3,), 0), torch.arange(4)
    top = TopK(4, 2)
    wrong = [
        (part.rows(slice(0, 3)), part, keys),
        (part, part, keys[:3]),
        (part, part, keys.int()),
        (part, part, keys - 1),
        (part, Descriptors(part.z + 2, part.g), keys),
        (part, Descriptors(part.z, part.g + torch.inf), keys),
        (part, descriptors(4, (4,), 0), keys),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="expected"):
            top.add(kernel, *arguments)
    for other in (TopK(4, 3), TopK(3, 2)):
        with pytest.raises(ValueError, match="expected an accumulator"):
            top.merge(other)
    with pytest.raises(ValueError, match="expected precision"):
        TopK(4, 2, precision="int4")
    labels, good = torch.zeros(4).long(), torch.zeros(4, 1).long()
    for votes in [
        Votes(good, torch.ones(4, 2), labels, 1.0),
        Votes(good[:3], torch.ones(3, 1), labels, 1.0),
        Votes(good, torch.ones(4, 1), labels[:2], 1.0),
        Votes(good, torch.full((4, 1), 1.5), labels, 1.0),
        Votes(good, torch.ones(4, 1), labels, 0.0),
    ]:
        with pytest.raises(ValueError, match="expected"):
            top.add(kernel, part, part, keys, votes)
    for arguments in [(torch.zeros(2, 3), torch.zeros(2, 3)), (torch.zeros(2), torch.zeros(2).long())]:
        with pytest.raises(ValueError, match="expected"):
            TopK.of(*arguments)
    with pytest.raises(ValueError, match="k >= 1"):
        TopK(3, 0)


def test_result_is_a_copy():
    """Later blocks do not change a result already read, nor does its reader change the state."""
    kernel, part = Kernel("pcc", (3,)), descriptors(5, (3,), 0)
    top = TopK(5, 2)
    top.add(kernel, part, part, torch.arange(5) + 10)
    before = top.result()
    before[1].fill_(7)
    top.add(kernel, part, part, torch.arange(5))
    assert (before[1] == 7).all() and not (top.result()[1] == 7).any()
