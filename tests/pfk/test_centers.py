import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypfk.pfk import Descriptors, Kernel, centers, greedy_k_center, reference, standardise

from .strategies import descriptors, kernels, lists, quick, seeds


@quick
@given(kernels, st.integers(0, 14), st.integers(0, 16), seeds)
def test_centers_are_those_of_the_full_matrix(kernel, m, p, seed):
    """The running maximum chooses what the M x M matrix chooses, duplicates and zero vectors included."""
    misses = descriptors(m, kernel.lengths, seed)
    similar = reference.scores(kernel.name, kernel.lengths, kernel.weight, lists(misses), lists(misses))
    got = greedy_k_center(kernel, misses, p, seed).tolist()
    first = got[0] if got else 0
    assert got == reference.greedy_k_center(similar, p, first)[: min(p, m)]
    assert len(set(got)) == len(got) == min(p, m)


def near_ties(n: int, kernel: Kernel, seed: int) -> Descriptors:
    """Of few kinds, most of them a little off, by less than float32 scores can tell; some with a NaN."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** -torch.randint(2, 9, (n, 1), generator=generator) * torch.randint(0, 3, (n, 1), generator=generator)
    parts = []
    for x in descriptors(n, kernel.lengths, seed):
        x = standardise(x + size * torch.randn(x.shape, generator=generator), kernel.lengths)
        parts.append(x.masked_fill(torch.rand(n, 1, generator=generator) < 0.03, torch.nan))
    return Descriptors(*parts)


def by_pairs(kernel: Kernel, misses: Descriptors, p: int, first: int) -> list[int]:
    """`greedy_k_center` for p < M in loops over the full matrix of exact similarities, NaN and all."""
    m = len(misses.z)
    every = torch.arange(m)
    similar = kernel.pairs(misses, misses, every.repeat_interleave(m), every.repeat(m)).float().reshape(m, m).tolist()
    broken = (misses.z.isnan().any(1) | misses.g.isnan().any(1)).tolist()
    chosen = [first]

    def order(i: int):
        closeness = max((similar[c][i] for c in chosen if not broken[c]), default=-math.inf)
        return (True, 0.0, i) if broken[i] else (False, closeness, i)

    while len(chosen) < p:
        chosen.append(min((i for i in range(m) if i not in chosen), key=order))
    return chosen


sizes = st.fixed_dictionaries(
    {
        "FRONT_NUMBERS": st.just(0),
        "FRONT_LEAST": st.integers(1, 5),
        "BATCH": st.integers(1, 3),
        "TILE": st.integers(1, 6),
        "COMPARED": st.integers(1, 30),
        "HASHED": st.integers(1, 60),
    }
)


@quick
@given(kernels, st.integers(2, 40), st.integers(1, 39), sizes, st.booleans(), st.booleans(), seeds)
def test_front_tiles_and_bounds_change_no_choice(kernel, m, p, small, near, collide, seed):
    """However few are in front or in a tile, near ties beyond float32, equal misses, NaNs: the loops' centers.

    So too where every miss has the same hash.
    """
    misses, p = near_ties(m, kernel, seed) if near else descriptors(m, kernel.lengths, seed), min(p, m - 1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items():
            patch.setattr(centers, name, value)
        if collide:
            patch.setattr(centers, "_hashes", lambda x_BL: torch.zeros(len(x_BL), dtype=torch.int64))
        got = greedy_k_center(kernel, misses, p, seed).tolist()
    assert got == by_pairs(kernel, misses, p, got[0])


@pytest.mark.parametrize("name", ["pcc", "pfk", "pfk-sum"])
def test_more_misses_than_a_front_holds(name):
    """With the sizes of real work: 1,500 misses in clusters, some equal, some zero, some hardly apart."""
    kernel = Kernel(name, (5, 11))
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(20, (1500,), generator=generator)
    parts = []
    for _ in range(2):
        x = torch.randn(20, 16, generator=generator)[which] + torch.randn(1500, 16, generator=generator) / 5
        x[:90], x[90:120] = x[90:180], x[120:150] + 1e-6
        parts.append(standardise(x, kernel.lengths))
        parts[-1][300:400] = 0
    misses = Descriptors(*parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(centers, "FRONT_NUMBERS", 0)
        got = greedy_k_center(kernel, misses, 150, 0).tolist()
    similar = torch.full((1500,), -torch.inf)
    for i, center in enumerate(got):
        assert i == 0 or center == int(similar.argmin())
        row = kernel.pairs(misses, misses, torch.full((1500,), center), torch.arange(1500)).float()
        similar = torch.maximum(similar, row)
        similar[center] = torch.inf


def test_equal_misses_are_seen_as_one():
    """Rows equal to the last bit, but for the sign of zero, and under pfk what a zero vector hides, are one miss."""
    z = torch.tensor([[0.6, -0.6, 0.0], [0.6, -0.6, -0.0], [0.6, -0.5, -0.1], [0.6, -0.5, -0.1]])
    g = torch.tensor([[0.0, 0.5, -0.5], [0.0, 0.5, -0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    z[3] = -z[3]
    assert centers._first_equals(Kernel("pfk", (3,)), Descriptors(z, g)).tolist() == [0, 0, 2, 2]
    assert centers._first_equals(Kernel("pfk-sum", (3,)), Descriptors(z, g)).tolist() == [0, 0, 2, 3]


def test_descriptors_that_are_not_standardised_are_refused():
    """The bounds hold for unit length alone; a NaN or an infinity is another matter. float16 storage will do."""
    kernel, misses = Kernel("pfk", (4, 5)), descriptors(6, (4, 5), 0)
    with pytest.raises(ValueError, match="standardised"):
        greedy_k_center(kernel, Descriptors(misses.z * 3, misses.g), 3, 0)
    misses.z[4, 0] = torch.inf
    assert 4 not in greedy_k_center(kernel, misses, 5, 0).tolist()[1:]
    half = misses.to(torch.float16)
    assert torch.equal(greedy_k_center(kernel, half, 5, 0), greedy_k_center(kernel, half.to(torch.float32), 5, 0))


def test_the_seed_draws_the_first_center():
    """Same seed, same centers; over many seeds every miss is first at some time."""
    kernel, misses = Kernel("pfk", (4, 5)), descriptors(6, (4, 5), 0)
    assert torch.equal(greedy_k_center(kernel, misses, 3, 8), greedy_k_center(kernel, misses, 3, 8))
    assert {int(greedy_k_center(kernel, misses, 1, seed)[0]) for seed in range(100)} == set(range(6))


@pytest.mark.parametrize("name", ["pcc", "pfk", "pfk-sum"])
def test_identical_or_broken_misses_are_chosen_once_each(name):
    """Of equal misses none is chosen twice; one with a NaN comes last, or first only by the draw."""
    kernel = Kernel(name, (4,))
    same = Descriptors(descriptors(1, (4,), 3).z.repeat(9, 1), descriptors(1, (4,), 4).z.repeat(9, 1))
    assert len(set(greedy_k_center(kernel, same, 8, 0).tolist())) == 8
    same.z[[2, 5]] = torch.nan
    for seed in range(12):
        chosen = greedy_k_center(kernel, same, 8, seed).tolist()
        assert len(set(chosen)) == 8
        assert not {2, 5} & set(chosen[1:7])


def test_two_clusters_give_a_center_each():
    """Two tight groups, two centers: one of each, whichever is drawn first."""
    a, b = torch.tensor([1.0, -1, 0, 0]), torch.tensor([0.0, 0, 1, -1])
    z = torch.nn.functional.normalize(torch.stack([a, a, a, b, b]), dim=1)
    for seed in range(10):
        assert {int(i) // 3 for i in greedy_k_center(Kernel("pcc", (4,)), Descriptors(z, z), 2, seed)} == {0, 1}


def test_all_misses_in_order_where_they_are_few():
    """With p >= M there is nothing to choose; a negative p is refused."""
    kernel, misses = Kernel("pfk", (4,)), descriptors(5, (4,), 0)
    for p in (5, 9):
        assert greedy_k_center(kernel, misses, p, 0).tolist() == [0, 1, 2, 3, 4]
    assert greedy_k_center(kernel, misses, 0, 0).tolist() == []
    with pytest.raises(ValueError, match="p >= 0"):
        greedy_k_center(kernel, misses, -1, 0)
