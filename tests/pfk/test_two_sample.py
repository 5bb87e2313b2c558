import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypfk.pfk import kernel_two_sample, reference, two_sample

from .strategies import lengths, quick, seeds, vectors

sizes = st.integers(2, 9)


def normal(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)) + shift


@quick
@given(sizes, sizes, lengths, seeds)
def test_the_statistic_is_that_of_the_loops(n, m, lengths, seed):
    """Of any sizes, with duplicates, zeros and sets of equal rows among them."""
    x, y = vectors(n, lengths, seed), vectors(m, lengths, seed + 1)
    expected = reference.mmd2(x.double().tolist(), y.double().tolist())
    assert kernel_two_sample(x, y, seed, permutations=3).mmd2 == pytest.approx(expected, abs=1e-9)


@quick
@given(sizes, sizes, seeds)
def test_p_counts_the_splits_that_are_as_far_apart(n, m, seed):
    """By eq. 3 of each split's two sets in loops, one after another; splits that tie with the given one count."""
    x, y = normal(n, seed).round(), normal(m, seed + 1).round()
    splits = two_sample._splits(n, n + m, 20, seed)
    assert splits.shape == (21, n + m) and (splits.sum(1) == n).all() and splits[0, :n].all()
    rows = torch.cat([x, y])
    values = [reference.mmd2(rows[split].tolist(), rows[~split].tolist()) for split in splits]
    expected = sum(value >= values[0] - 1e-12 for value in values) / 21
    assert kernel_two_sample(x, y, seed, permutations=20).p == expected


def test_every_image_is_as_likely_in_the_first_set():
    """4 of 10 images, 20,000 splits: each in 40 % of them, each pair in 4/10 3/9; other seeds split otherwise."""
    splits = two_sample._splits(4, 10, 20_000, 7)[1:].double()
    shares = splits.T @ splits / len(splits)
    expected = torch.full((10, 10), 4 / 10 * 3 / 9, dtype=torch.float64).fill_diagonal_(0.4)
    assert (shares - expected).abs().max() < 4 * math.sqrt(0.24 / len(splits))
    assert not torch.equal(splits, two_sample._splits(4, 10, 20_000, 8)[1:].double())


def test_of_one_distribution_p_is_uniform():
    """200 pairs of samples: p below 5 %, 25 %, 50 % and 75 % as often as that, and mmd2 around 0, on both sides."""
    tests = [kernel_two_sample(normal(20, 2 * i), normal(12, 2 * i + 1), i, permutations=99) for i in range(200)]
    p = torch.tensor([test.p for test in tests])
    for level in (0.05, 0.25, 0.5, 0.75):
        assert abs((p <= level).double().mean() - level) < 3 * math.sqrt(level * (1 - level) / 200)
    mmd2 = torch.tensor([test.mmd2 for test in tests])
    assert (mmd2 < 0).any() and abs(mmd2.mean()) < 3 * mmd2.std() / math.sqrt(200)


def test_a_shift_is_found():
    """A standard deviation along every axis: nothing that is shuffled is as far apart; more of it, more distance."""
    near, far = (kernel_two_sample(normal(40, 0), normal(30, 1, shift), 5) for shift in (1.0, 2.0))
    assert near.p == far.p == 1 / 1001 and 0.1 < near.mmd2 < far.mmd2


def test_the_order_of_rows_and_of_sets_does_not_matter():
    """The statistic, but for rounding; the same call gives the same bits."""
    x, y = normal(30, 0), normal(20, 1, 0.3)
    first = kernel_two_sample(x, y, 3)
    assert first == kernel_two_sample(x, y, 3)
    for a, b in [(y, x), (x.flip(0), y), (x, y[torch.randperm(20)])]:
        assert kernel_two_sample(a, b, 3).mmd2 == pytest.approx(first.mmd2, abs=1e-12)


def test_a_common_offset_costs_no_digits():
    """Features far from 0 are as far from each other as around it: a difference of squares would lose them."""
    x, y = normal(30, 0).double(), normal(20, 1, 0.3).double()
    expected = kernel_two_sample(x, y, 3)
    moved = kernel_two_sample(x + 2.0**20, y + 2.0**20, 3)
    assert moved.mmd2 == pytest.approx(expected.mmd2, abs=1e-8) and moved.p == expected.p


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_equal_rows_are_no_shift(value):
    """Nothing but copies of one row, which products round elsewhere: no distance, and every split is as far apart."""
    x = torch.full((70, 33), value, dtype=torch.float64)
    assert kernel_two_sample(x, x[:30], 0) == (pytest.approx(0.0, abs=1e-12), 1.0)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3)),
        (torch.zeros(5, 3), torch.zeros(0, 3)),
        (torch.zeros(5, 3), torch.zeros(5, 4)),
        (torch.zeros(5), torch.zeros(5)),
        (torch.zeros(5, 3), torch.full((5, 3), torch.nan)),
        (torch.full((5, 3), torch.inf), torch.zeros(5, 3)),
    ],
    ids=["one row", "no row", "another length", "no matrix", "NaN", "infinity"],
)
def test_what_cannot_be_compared_is_refused(x, y):
    """The error says what was expected and what came."""
    with pytest.raises(ValueError, match=r"expected finite features .* at least 2, got \("):
        kernel_two_sample(x, y, 0)
