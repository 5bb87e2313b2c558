import math
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raypfk.pfk import draws, greedy, reference
from raypfk.pfk.descriptors import logit_slope
from raypfk.pfk.greedy import FacilityLocation, FarthestFirst, Features, KMeansPlusPlus, LastLayer, best, choose

from .strategies import quick, seeds

sizes = st.fixed_dictionaries(
    {
        "AT_ONCE": st.integers(1, 4),
        "GROWTH": st.integers(1, 3),
        "TILE": st.integers(1, 5),
        "SIMILARITIES": st.integers(1, 30),
        "NUMBERS": st.integers(1, 40),
    }
)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 5))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(n: int, length: int, seed: int, broken: float = 0.1) -> torch.Tensor:
    """(n, length) float32 of few kinds: random, small integers, zero, tiny; many duplicates; some with a NaN."""
    generator = seeded(seed)
    kinds = torch.cat(
        [
            torch.randn(4, length, generator=generator),
            torch.randint(-1, 2, (4, length), generator=generator).float(),
            torch.zeros(1, length),
            torch.randn(1, length, generator=generator) * 1e-30,
        ]
    )
    x = kinds[torch.randint(len(kinds), (n,), generator=generator)]
    x[torch.rand(n, generator=generator) < broken, -1] = [torch.nan, torch.inf, -torch.inf][seed % 3]
    return x


def make(n: int, shape: tuple[int, int], seed: int, broken: float = 0.1) -> Features | LastLayer:
    """Features for odd seeds, gradients for even ones."""
    a, b = numbers(n, shape[0], seed, broken), numbers(n, shape[1], seed + 1, broken)
    return Features(b) if seed % 2 else LastLayer(a, b)


def lists(vectors: Features | LastLayer) -> list[list[float]]:
    """As `reference` takes them."""
    if isinstance(vectors, Features):
        return vectors.z.double().tolist()
    return [reference.outer(s, h) for s, h in zip(vectors.slope.tolist(), vectors.hidden.tolist(), strict=True)]


def salts_and_keys(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    salts = torch.randint(-(2**63), 2**63 - 1, (n,), generator=seeded(seed + 2))
    return salts, torch.randperm(3 * n, generator=seeded(seed + 3))[:n] - n


def cut(n: int, parts: int, seed: int) -> list[torch.Tensor]:
    """The rows of each part: all n, shuffled and cut anywhere; some parts may be empty."""
    rows = torch.randperm(n, generator=seeded(seed + 4))
    ends = torch.randint(n + 1, (parts - 1,), generator=seeded(seed + 5)).sort().values
    return list(rows.tensor_split(ends))


@contextmanager
def small(sizes: dict):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(greedy, name, value)
        yield


many = (st.integers(0, 14), shapes, st.integers(0, 16), st.integers(1, 4), sizes, seeds)


@quick
@given(*many, st.integers(0, 7))
def test_farthest_first_is_that_of_the_loops(n, shape, p, parts, sizes, seed, labelled):
    """However the pool is cut, shuffled and tiled; duplicates, zeros, NaNs, more than there are, labelled or none."""
    pool, known, (salts, keys) = make(n, shape, seed), make(labelled, shape, seed + 10), salts_and_keys(n, seed)
    expected = reference.farthest_first(lists(pool), keys.tolist(), salts.tolist(), lists(known), p)
    with small(sizes):
        some = [FarthestFirst(pool.rows(rows), keys[rows], salts[rows]) for rows in cut(n, parts, seed)]
        for part in some:
            part.absorb(known)
        got = choose(some, p)
    assert [proposal.key for proposal in got] == expected
    values = [proposal.value for proposal in got[labelled == 0 :]]
    assert all(a >= b for a, b in pairwise(values))


@quick
@given(*many)
def test_k_means_plus_plus_is_that_of_the_loops(n, shape, p, parts, sizes, seed):
    """However the pool is cut, shuffled and tiled, the race has one winner; those at distance 0 come after all."""
    pool, (salts, keys) = make(n, shape, seed), salts_and_keys(n, seed)
    expected = reference.k_means_plus_plus(lists(pool), keys.tolist(), salts.tolist(), p)
    with small(sizes):
        got = choose([KMeansPlusPlus(pool.rows(rows), keys[rows], salts[rows]) for rows in cut(n, parts, seed)], p)
    assert [proposal.key for proposal in got] == expected


@quick
@given(*many, st.integers(1, 7))
def test_facility_location_is_that_of_the_loops(n, shape, p, parts, sizes, seed, queries):
    """However the pool is cut, shuffled and tiled, what adds most to the sums as they are written; gains only fall."""
    pool, asked, keys = make(n, shape, seed), make(queries, shape, seed + 10, broken=0.0), salts_and_keys(n, seed)[1]
    expected = reference.facility_location(lists(pool), keys.tolist(), lists(asked), p)
    with small(sizes):
        got = choose([FacilityLocation(pool.rows(rows), keys[rows], asked) for rows in cut(n, parts, seed)], p)
    assert [proposal.key for proposal in got] == expected
    assert all(a.value >= b.value for a, b in pairwise(got))


def near_ties(n: int, shape: tuple[int, int], seed: int) -> Features | LastLayer:
    """`make`, most of them a little off, by less than float64 can tell or by somewhat more."""
    off = 10.0 ** -torch.randint(3, 9, (n, 1), generator=seeded(seed + 6))
    off *= torch.randint(0, 3, (n, 1), generator=seeded(seed + 7))
    vectors = make(n, shape, seed, broken=0.02)
    return type(vectors)(*(x + off * torch.randn(x.shape, generator=seeded(seed + 8)) for x in vectors))


def all_three(pool, rows, salts, keys, queries) -> list[greedy.Part]:
    pool, keys, salts = pool.rows(rows), keys[rows], salts[rows]
    return [FarthestFirst(pool, keys, salts), KMeansPlusPlus(pool, keys, salts), FacilityLocation(pool, keys, queries)]


@settings(quick, max_examples=10)
@given(st.integers(2, 9), st.integers(2, 40), st.integers(1, 4), st.booleans(), seeds)
def test_not_a_bit_depends_on_parts_or_on_what_is_in_doubt(d, h, parts, doubt, seed):
    """Among many that nearly tie: the same keys and values from one part, or from several that doubt every sum."""
    n, p = 100, 12
    pool, queries, (salts, keys) = near_ties(n, (d, h), seed), near_ties(20, (d, h), seed + 10), salts_and_keys(n, seed)
    whole = all_three(pool, torch.arange(n), salts, keys, queries)
    expected = [[proposal[:2] for proposal in choose([part], p)] for part in whole]
    changed = {"TILE": 30, "AT_ONCE": 5, "GROWTH": 2, "SIMILARITIES": 500}
    with small(changed | ({"_slack": lambda vectors: 1e-4} if doubt else {})):
        cuts = [all_three(pool, rows, salts, keys, queries) for rows in cut(n, parts, seed)]
        got = [[proposal[:2] for proposal in choose(some, p)] for some in zip(*cuts, strict=True)]
    assert got == expected


def test_lazily_what_all_distances_choose():
    """600 images in clusters, some equal, few brought up to date at once: 60 times the best by all distances."""
    n, generator = 600, seeded(1)
    x = torch.randn(30, 6, generator=generator)[torch.randint(30, (n,), generator=generator)]
    x += torch.randn(n, 6, generator=generator) * torch.rand(n, 1, generator=generator)
    x[:50] = x[50:100]
    square_NN = greedy._rounded((x.double()[:, None] - x.double()).square().sum(2))
    salts, keys = salts_and_keys(n, 1)
    for kind in (FarthestFirst, KMeansPlusPlus):
        with small({"TILE": 16, "AT_ONCE": 8, "GROWTH": 2}):
            got = choose([kind(Features(x), keys, salts)], 60)
        nearest_N, left_N = torch.full((n,), torch.inf, dtype=torch.float64), torch.ones(n, dtype=torch.bool)
        for number, (value, key, _) in enumerate(got):
            if number:
                worth_N = nearest_N if kind is FarthestFirst else draws.uniform(salts, number).log() / nearest_N
                most = worth_N[left_N].amax()
                assert key == int(keys[left_N & (worth_N == most)].amin()) and value == pytest.approx(float(most))
            nearest_N = torch.minimum(nearest_N, square_NN[keys == key][0])
            left_N &= keys != key


def test_a_similarity_halfway_between_steps_is_decided_in_fixed_order():
    """Where the cosine is -1/2, and steps are so wide that this is halfway, matrix products' last bits do not count."""
    r = torch.randn(100, 30, 1, generator=seeded(0))
    pool, queries = (Features((r * torch.tensor(x)).flatten(1)) for x in ([1.0, -1.0, 0.0], [0.0, 1.0, -1.0]))
    with small({"STEPS": 2}):
        part = FacilityLocation(pool, torch.arange(100), queries)
        every, squares = torch.arange(100), greedy._measure(pool).square
        exact = greedy._in_steps(greedy._exact_products(pool, queries, every, every), squares.sqrt() * part._length_Q)
        assert exact.round().unique().tolist() == [0, 1]
        assert torch.equal(part._similar(part._pool).diagonal(), exact.round())


@settings(quick, max_examples=20)
@given(st.integers(1, 9), st.integers(1, 300), seeds)
def test_sums_in_any_order_stay_within_the_slack(d, h, seed):
    """All that lies between products by matrices and sums in fixed order; and no doubt where they agree that far."""
    a, b = (LastLayer(torch.randn(20, d, generator=seeded(s)), numbers(20, h, s, 0.0)) for s in (seed, seed + 1))
    rows, cols = torch.arange(20).repeat_interleave(20), torch.arange(20).repeat(20)
    exact = greedy._exact_products(a, b, rows, cols).reshape(20, 20)
    long = greedy._measure(a).square[:, None].sqrt() * greedy._measure(b).square.sqrt()
    assert ((greedy._products(a, b) - exact).abs() <= greedy._slack(a) * long / 2).all()
    assert greedy._slack(a) < 1e-12


@settings(quick, max_examples=20)
@given(shapes, st.integers(1, 12), sizes, seeds)
def test_absorbed_at_once_or_one_by_one(shape, b, sizes, seed):
    """A part that starts again with all that was chosen, in any order, goes on where the other would have."""
    pool, chosen, (salts, keys) = make(9, shape, seed), make(b, shape, seed + 10), salts_and_keys(9, seed)
    queries = make(3, shape, seed + 12, broken=0.0)
    with small(sizes):
        pairs = zip(*(all_three(pool, torch.arange(9), salts, keys, queries) for _ in range(2)), strict=True)
        for one, other in pairs:
            for i in range(b):
                one.absorb(chosen.rows(slice(i, i + 1)))
                one.propose()
            other.absorb(chosen.rows(torch.randperm(b, generator=seeded(seed))))
            for part in (one, other):
                part.take(int(keys[0]))
            assert [x[:2] for x in choose([one], 9)] == [x[:2] for x in choose([other], 9)]


def test_the_race_is_proportional_to_the_square_of_the_distance():
    """Of images at the distances 0, 1, 2 and 3 from what is absorbed, 0, 1/14, 4/14 and 9/14 of the draws."""
    pool, n = Features(torch.tensor([[5.0], [6.0], [3.0], [8.0]])), 1500
    salts, counts = torch.randint(-(2**63), 2**63 - 1, (n, 4), generator=seeded(0)), [0] * 4
    for salts_4 in salts:
        part = KMeansPlusPlus(pool, torch.arange(4), salts_4)
        part.absorb(Features(torch.tensor([[5.0]])))
        counts[part.propose().key] += 1
    assert counts[0] == 0
    for count, square in zip(counts[1:], (1, 4, 9), strict=True):
        assert abs(count / n - square / 14) < 4 * math.sqrt(square / 14 * (1 - square / 14) / n)


def test_distance_zero_is_drawn_last_and_in_any_order():
    """Copies of what is absorbed wait for all others, however near these are; over seeds each copy is first of them."""
    pool = Features(torch.tensor([[1.0], [1.0], [1.0], [1.0 + 2.0**-20], [0.0]]))
    firsts = set()
    for seed in range(60):
        part = KMeansPlusPlus(pool, torch.arange(5), torch.randint(2**62, (5,), generator=seeded(seed)))
        part.absorb(pool.rows(slice(1)))
        keys = [proposal.key for proposal in choose([part], 5)]
        assert set(keys[:2]) == {3, 4}
        firsts.add(keys[2])
    assert firsts == {0, 1, 2}


def test_the_salts_draw_the_first_of_a_core_set():
    """With nothing labelled every image is first for some salts, and alike for the same."""
    pool = Features(torch.zeros(5, 2))
    draws_60 = [torch.randint(2**62, (5,), generator=seeded(seed)) for seed in range(60)]
    firsts = [[choose([FarthestFirst(pool, torch.arange(5), s)], 1)[0].key for s in draws_60] for _ in range(2)]
    assert firsts[0] == firsts[1] and set(firsts[0]) == set(range(5))


def test_distances_that_differ_by_the_order_of_a_sum_are_equal():
    """Vectors of the same numbers in another order are as far from 0: by key. Rounded as to float32, at any size."""
    x = torch.stack([torch.randn(40, generator=seeded(0))[torch.randperm(40, generator=seeded(i))] for i in range(50)])
    part = FarthestFirst(Features(x), torch.arange(50), torch.zeros(50).long())
    part.absorb(Features(torch.zeros(1, 40)))
    assert len(greedy._measure(Features(x)).square.unique()) > 1 and part.propose().key == 0
    for size in (1.0, 2.0**-600):
        y = x.double() / 3
        assert torch.equal(greedy._rounded(y * size), y.float().double() * size)


def test_a_core_set_by_hand():
    """On a line with 0 labelled: the far end 10, then 5 between, then 2 or 8, of which 2 has the smaller key."""
    part = FarthestFirst(Features(torch.tensor([[2.0], [8.0], [5.0], [10.0]])), torch.arange(4), torch.zeros(4).long())
    part.absorb(Features(torch.zeros(1, 1)))
    got = choose([part], 4)
    assert [(x.key, x.value) for x in got] == [(3, 100.0), (2, 25.0), (0, 4.0), (1, 4.0)]
    assert torch.equal(got[0].vector.z, torch.tensor([[10.0]]))


def test_facility_location_by_hand():
    """Queries e1, e1, e2: e1 covers two, then e2 the third, though a copy of e1 is as like a query; last what opposes.

    e1 adds 1 + 1 + 1/2 and its best 1; then e2 1/2 and 1, the copy only its 1, and -e1 its best 1/2.
    """
    e1, e2 = torch.eye(2)
    queries = Features(torch.stack([e1, 3 * e1, e2, e1 * torch.nan]))
    got = choose([FacilityLocation(Features(torch.stack([-e1, 2 * e1, e1, e2])), torch.arange(4), queries)], 4)
    assert [(x.key, x.value) for x in got] == [(1, 3.5), (3, 1.5), (2, 1.0), (0, 0.5)]


def test_last_layer_vectors_are_the_gradients():
    """Inner products of slope and hidden, with a one for the bias, are those of what autograd gives."""
    layer, hidden, labels = torch.nn.Linear(4, 3).double(), numbers(6, 4, 1, 0.0), torch.tensor([0, 2, 1, 1, 0, 2])
    grads = []
    for x, y in zip(hidden.double(), labels, strict=True):
        loss = torch.nn.functional.cross_entropy(layer(x[None]), y[None])
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(layer.parameters()))]))
    slope = logit_slope(layer(hidden.double()).detach(), labels)
    vectors = LastLayer(slope, hidden).with_bias()
    torch.testing.assert_close(greedy._products(vectors, vectors), torch.stack(grads) @ torch.stack(grads).T)


def test_uniform_is_splitmix64():
    """Known outputs for the seeds 0 and 1234567; the loops' numbers for any salt, alone or among others; in (0, 1)."""
    known = {0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4], 1234567: [6457827717110365317, 3203168211198807973]}
    for salt, outputs in known.items():
        for number, output in enumerate(outputs):
            assert int(draws.uniform(torch.tensor([salt]), number)[0] * 2**52) == output >> 12
            assert int(reference.draw(salt, number) * 2**52) == output >> 12
    salts = torch.randint(-(2**63), 2**63 - 1, (20_000,), generator=seeded(0))
    u, v = draws.uniform(salts, 7), draws.uniform(salts, 8)
    assert u[:50].tolist() == [reference.draw(salt, 7) for salt in salts[:50].tolist()]
    assert torch.equal(u[9::7], draws.uniform(salts[9::7], 7)) and u.amin() > 0 and u.amax() < 1
    assert (torch.histc(u, 10, 0, 1) / len(u) - 0.1).abs().amax() < 0.01
    assert torch.corrcoef(torch.stack([u, v]))[0, 1].abs() < 0.03


def test_logarithm_is_right_and_the_same_at_any_place():
    """To a few units of the last place, at both ends of (0, 1) too; and not a bit by shape."""
    ends = [2.0**-53, 0.5, 1 - 2.0**-53]
    u = torch.cat([draws.uniform(torch.arange(5001), 0), torch.tensor(ends, dtype=torch.float64)])
    got = greedy._log(u)
    expected = torch.tensor([math.log(x) for x in u.tolist()], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-15, atol=0)
    assert all(torch.equal(greedy._log(u[i:]), got[i:]) for i in range(9))
    assert torch.equal(torch.cat([greedy._log(x) for x in u[:100].split(1)]), got[:100])


def test_taking_is_for_good_and_for_its_owner():
    """A key of another part changes nothing; all taken, or no image at all, leaves nothing to propose."""
    pool, keys = Features(torch.tensor([[1.0], [2.0]])), torch.tensor([2**63 - 1, -(2**63)])
    part = KMeansPlusPlus(pool, keys, keys)
    empty = KMeansPlusPlus(pool.rows(slice(0)), keys[:0], keys[:0])
    part.take(5)
    assert part.propose().key == -(2**63) and empty.propose() is None
    part.take(-(2**63))
    assert part.propose().key == 2**63 - 1
    part.take(2**63 - 1)
    assert part.propose() is None and best([None, None]) is None and choose([part, empty], 3) == []


def test_what_does_not_fit_is_refused():
    """Shapes, dtypes, other kinds of vectors, a negative budget, and queries of whom none is finite."""
    pool, keys = LastLayer(torch.zeros(3, 2), torch.zeros(3, 4)), torch.arange(3)
    part = FarthestFirst(pool, keys, keys)
    refused = [
        ("keys", lambda: FarthestFirst(pool, keys[:2], keys)),
        ("keys", lambda: FarthestFirst(pool, keys.int(), keys)),
        ("salts", lambda: KMeansPlusPlus(pool, keys, keys.double())),
        ("floating vectors", lambda: FarthestFirst(LastLayer(pool.slope, pool.hidden[:2]), keys, keys)),
        ("floating vectors", lambda: FarthestFirst(Features(pool.slope.long()), keys, keys)),
        ("floating vectors", lambda: FarthestFirst(Features(pool.slope[:, :0]), keys, keys)),
        ("LastLayer of", lambda: part.absorb(Features(pool.slope))),
        ("LastLayer of", lambda: part.absorb(LastLayer(pool.slope, pool.slope))),
        ("queries", lambda: FacilityLocation(pool, keys, pool.rows(slice(0)))),
        ("queries", lambda: FacilityLocation(pool, keys, LastLayer(pool.slope * torch.nan, pool.hidden))),
        ("p >= 0", lambda: choose([part], -1)),
    ]
    for words, call in refused:
        with pytest.raises(ValueError, match=f"expected .*{words}"):
            call()
