import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypfk.pfk import acquire, merge_picks, rank_by_rank, reference

from .strategies import quick, seeds


def candidates(c: int, k: int, n: int, seed: int):
    """Top-k of c centers over n images with few distinct scores, as `TopK.result` gives them."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (c, n), generator=generator).float()
    best, keys = scores.sort(dim=1, descending=True, stable=True)
    pad = max(0, k - n)
    best = torch.nn.functional.pad(best[:, :k], (0, pad), value=-torch.inf)
    return best, torch.nn.functional.pad(keys[:, :k], (0, pad), value=-1)


@quick
@given(st.integers(0, 6), st.integers(1, 8), st.integers(0, 12), st.integers(0, 20), seeds)
def test_picks_are_those_of_the_loops(c, k, n, p, seed):
    """Ties by key and then center, taken images skipped, short lists, no center, no budget: the loops' picks."""
    scores, keys = candidates(c, k, n, seed)
    picks = rank_by_rank(scores, keys, p)
    got = list(zip(*(part.tolist() for part in (picks.keys, picks.centers, picks.ranks, picks.scores)), strict=True))
    assert got == reference.rank_by_rank(scores.tolist(), keys.tolist(), p)
    assert len(set(picks.keys.tolist())) == len(picks.keys) <= p


@quick
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 12), st.integers(0, 20), seeds)
def test_a_larger_k_goes_on_where_the_smaller_stopped(c, k, more, n, p, seed):
    """Growing K and scanning again changes no pick that was made: it only appends."""
    few = rank_by_rank(*candidates(c, k, n, seed), p)
    many = rank_by_rank(*candidates(c, k + more, n, seed), p)
    assert len(few.keys) <= len(many.keys)
    assert all(torch.equal(a, b[: len(a)]) for a, b in zip(few, many, strict=True))


def as_tuples(picks):
    return list(zip(*(part.tolist() for part in (picks.keys, picks.centers, picks.ranks, picks.scores)), strict=True))


@quick
@given(
    st.integers(0, 8),
    st.integers(1, 8),
    st.integers(1, 12),
    st.integers(0, 14),
    st.integers(1, 9),
    st.integers(1, 30),
    seeds,
)
def test_tiles_of_the_centers_merge_to_the_picks_of_all(c, k, n, p, tile, slab, seed):
    """Picks of some centers at a time, merged in any order, are the loops' picks of all; ranks may go together."""
    scores, keys = candidates(c, k, n, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acquire, "SLAB", slab)
        starts = range(0, max(c, 1), tile)
        parts = [rank_by_rank(scores[i : i + tile], keys[i : i + tile], p, first_center=i) for i in starts]
        whole = rank_by_rank(scores, keys, p)
    expected = reference.rank_by_rank(scores.tolist(), keys.tolist(), p)
    assert as_tuples(merge_picks(parts[::-1], p)) == as_tuples(whole) == expected
    halves = [merge_picks(part, p) for part in (parts[::2], parts[1::2]) if part]
    assert as_tuples(merge_picks(halves, p)) == expected


def test_negative_scores_and_both_zeros_keep_their_order():
    """Scores of any size in the order of numbers; -0 equals 0, so that the key decides."""
    scores = torch.tensor([-torch.inf, -2.0, -1e-45, -0.0, 0.0, -0.0, 1e-45, 3e38, -3e38])[:, None]
    keys = torch.tensor([9, 8, 7, 6, 5, 4, 3, 2, 1])[:, None]
    assert rank_by_rank(scores, keys, 9).keys.tolist() == [2, 3, 4, 5, 6, 7, 8, 1, 9]


def test_merging_nothing_is_refused():
    """No part says of which device; a budget is not negative."""
    part = rank_by_rank(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int64), 3)
    for parts, p in [([], 1), ([part], -1)]:
        with pytest.raises(ValueError, match="expected"):
            merge_picks(parts, p)


def test_an_example_by_hand():
    """Bests 7 (0.9) and 5 (0.8) first, then second bests; 7 is taken, so the first center's third choice comes last."""
    scores = torch.tensor([[0.8, 0.7, 0.1], [0.9, 0.6, 0.5]])
    keys = torch.tensor([[5, 7, 2], [7, 5, 9]])
    picks = rank_by_rank(scores, keys, 4)
    assert picks.keys.tolist() == [7, 5, 9, 2]
    assert picks.centers.tolist() == [1, 0, 1, 0] and picks.ranks.tolist() == [0, 0, 2, 2]
    assert rank_by_rank(scores, keys, 1).keys.tolist() == [7]


def test_a_million_candidates_take_seconds_at_most():
    """No quadratic step."""
    scores, keys = torch.randn(1000, 1000).sort(dim=1, descending=True).values, torch.randint(10**6, (1000, 1000))
    assert len(rank_by_rank(scores, keys, 100_000).keys) == 100_000


def test_shapes_that_differ_are_refused():
    """Scores and keys belong together; a budget is not negative."""
    for columns, p in [(2, 1), (3, -1)]:
        with pytest.raises(ValueError, match="expected"):
            rank_by_rank(torch.zeros(2, 3), torch.zeros(2, columns, dtype=torch.int64), p)
