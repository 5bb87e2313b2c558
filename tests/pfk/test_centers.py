import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypfk.pfk import Descriptors, Kernel, greedy_k_center, reference

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
