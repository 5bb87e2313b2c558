import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypfk.pfk import PowerLaw, fit_power_law, mcnemar, reference, standard_error
from raypfk.pfk.stopping import error_rate

from .strategies import quick

misses = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60)
laws = st.builds(PowerLaw, st.floats(-3, -0.1), st.floats(0.02, 1.5))


def table(both: int, only_a: int, only_b: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The misses of two networks, by how many images both, one and none of them miss."""
    cells = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    return tuple(cells.repeat_interleave(torch.tensor([both, only_a, only_b, neither]), dim=0).T)


@quick
@given(misses)
def test_mcnemar_is_that_of_the_loops(pairs):
    """Of any table, the empty one too; the same whichever network is named first."""
    a, b = torch.tensor(pairs, dtype=torch.bool).reshape(-1, 2).T
    assert mcnemar(a, b) == pytest.approx(reference.mcnemar(a.tolist(), b.tolist()), rel=1e-12)
    assert mcnemar(a, b) == mcnemar(b, a)


@pytest.mark.parametrize(
    ("counts", "p"),
    [
        ((0, 0, 0, 0), 1.0),
        ((9, 0, 0, 9), 1.0),  # the same misses: nothing to tell them by
        ((0, 1, 0, 5), 1.0),
        ((3, 0, 5, 2), 2 / 32),
        ((3, 6, 1, 0), 2 * (1 + 7) / 128),
        ((8, 4, 4, 8), 1.0),
        ((59, 10, 2, 80), 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_mcnemar_by_hand(counts, p):
    """Tables small enough to count: of n coins, the ways to so few heads over 2^n."""
    assert mcnemar(*table(*counts)) == pytest.approx(p, rel=1e-12)


def test_mcnemar_of_many_images():
    """Large counts neither overflow nor lose the tail: the normal law's at 3 standard deviations; 0 far beyond."""
    half, by = 500_000, 1500  # of a million, standard deviation 500
    expected = math.erfc((2 * by - 1) / math.sqrt(2 * 2 * half))
    assert mcnemar(*table(5, half - by, half + by, 5)) == pytest.approx(expected, rel=1e-3)
    assert mcnemar(*table(0, 5000, 0, 0)) == 0.0


@pytest.mark.parametrize(
    ("a", "b"),
    [(torch.ones(3), torch.ones(3)), (torch.ones(3).bool(), torch.ones(4).bool()), (torch.ones(2, 2).bool(),) * 2],
    ids=["floats", "other images", "two axes"],
)
def test_what_are_no_misses_is_refused(a, b):
    with pytest.raises(ValueError, match=r"expected the misses \(M,\) of two networks, bool, got \("):
        mcnemar(a, b)


def test_no_miss_counts_as_half_an_image():
    """And none that is right likewise: a standard error of 0 would claim to know more than so few images show."""
    assert [error_rate(n, 50) for n in (0, 0.5, 1, 25, 50)] == [0.01, 0.01, 0.02, 0.5, 0.99]
    assert standard_error(20, 100) == pytest.approx(0.04)
    assert standard_error(0, 50) == pytest.approx(math.sqrt(0.01 * 0.99 / 50)) == standard_error(50, 50)
    assert standard_error(1, 1) == 0.5
    with pytest.raises(ValueError, match="at least 1 image, got 0"):
        standard_error(0, 0)


@quick
@given(laws, st.sets(st.integers(1, 10_000), min_size=3, max_size=8).map(sorted))
def test_a_curve_of_a_known_law_comes_back(law, labels):
    """Errors on the law itself, however few labels they are of."""
    images = 10**9
    found = fit_power_law(labels, [law.error(n) * images for n in labels], [images] * len(labels))
    assert found == pytest.approx(tuple(law), rel=1e-6, abs=1e-6)


@quick
@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 40)), min_size=3, max_size=9, unique_by=lambda x: x[0]))
def test_the_fit_is_that_of_the_loops(points):
    """Of any curve, errors of 0 among them; None exactly where the line of the loops does not fall."""
    labels, counts = map(list, zip(*points, strict=True))
    log_a, b = reference.power_law(labels, [max(count, 0.5) / 100 for count in counts])
    found = fit_power_law(labels, counts, [100] * len(labels))
    if abs(b) > 1e-9:
        assert (found is None) == (b < 0)
    if found:
        assert found == pytest.approx((log_a, b), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("labels", "counts"),
    [([], []), ([10, 20], [9, 4]), ([10, 20, 20], [9, 4, 3]), ([10, 20, 30], [7, 7, 7]), ([10, 20, 30], [4, 5, 9])],
    ids=["no round", "two rounds", "two numbers of labels", "no change", "rising"],
)
def test_what_shows_no_fall_fits_nothing(labels, counts):
    assert fit_power_law(labels, counts, [60] * len(labels)) is None


@quick
@given(laws, st.integers(1, 5000), st.integers(1, 500), st.floats(1e-4, 0.1))
def test_labels_are_bought_while_they_gain_enough(law, labels, more, threshold):
    """The smallest number from which `more` gains less than the threshold, by the difference of two errors."""
    worth = law.worth(labels, more, threshold)

    def gain(n: int) -> float:
        a = math.exp(law.log_a)
        return a * n**-law.b - a * (n + more) ** -law.b

    assert law.gain(labels, more) == pytest.approx(gain(labels), rel=1e-6, abs=1e-12)
    assert gain(labels + worth) < threshold * (1 + 1e-6)
    assert worth == 0 or gain(labels + worth - 1) >= threshold * (1 - 1e-6)


def test_a_stopping_point_by_hand():
    """err = 1 / n, 10 labels a time: 1/n - 1/(n + 10) = 10 / (n (n + 10)) falls below 1/300 beyond n = 50."""
    law = PowerLaw(0.0, 1.0)
    assert law.gain(50, 10) == pytest.approx(1 / 300)
    assert law.worth(20, 10, 1 / 300 - 1e-9) == 31 and law.worth(51, 10, 1 / 300) == law.worth(900, 10, 1 / 300) == 0
