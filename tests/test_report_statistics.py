"""The report's mathematics and the published curves, by numbers that can be checked by hand."""

import numpy as np
import pytest

from raypfk.report import figures, published, statistics

NAN = float("nan")


def test_mean_and_deviation_are_of_the_seeds_that_are_known():
    """A point's mean and sample deviation leave out what is NaN; of one seed there is no deviation, of none no mean."""
    mean, deviation = statistics.mean_and_deviation(np.array([[0.2, 0.5, NAN], [0.4, NAN, NAN]]))
    assert mean[:2] == pytest.approx([0.3, 0.5]) and np.isnan(mean[2])
    assert deviation[0] == pytest.approx(0.02**0.5) and np.isnan(deviation[1:]).all()


def test_area_is_a_mean_accuracy_weighted_by_labels():
    """Trapezoids over unequal steps: 10 labels at a mean of 0.3 and 30 at one of 0.5 are 0.45; a point is itself."""
    x = np.array([10.0, 20.0, 50.0])
    assert statistics.area(x, np.array([[0.2, 0.4, 0.6]])) == pytest.approx([(10 * 0.3 + 30 * 0.5) / 40])
    assert statistics.area(x[:1], np.array([[0.2], [NAN]])) == pytest.approx([0.2, NAN], nan_ok=True)


def test_labels_are_read_off_straight_lines():
    """Straight between points; the first time counts; before its first point a curve says nothing."""
    x, y = np.array([10.0, 20.0, 30.0, 40.0]), np.array([0.2, 0.6, 0.4, 0.8])
    assert statistics.labels_needed(x, y, 0.3) == pytest.approx(12.5)
    assert statistics.labels_needed(x, y, 0.6) == 20
    assert statistics.labels_needed(x, y, 0.7) == pytest.approx(37.5)
    assert statistics.labels_needed(x, y, 0.1) == 10
    assert statistics.labels_needed(x, y, 0.81) is None


def test_labels_saved_at_equal_accuracy():
    """Where the baseline has 0.6 with 40 labels and the curve with 20, half is saved: its largest saving as well."""
    x = np.array([10.0, 20.0, 30.0, 40.0])
    better, base = np.array([0.4, 0.6, 0.7, 0.8]), np.array([0.3, 0.4, 0.5, 0.6])
    at_last = statistics.saved_at(base[-1], x, better, x, base)
    assert at_last == (0.6, 20, 40, None) and at_last.share == 0.5
    most = statistics.most_saved(x, better, x, base)
    assert most.share == 0.5 and most.earlier is None
    worse = statistics.most_saved(x, base, x, better)
    assert worse.share == 0.0 and worse.labels == 10 and worse.earlier == "baseline"  # at most: the better one's start
    assert statistics.saved_at(0.7, x, better, x, base) is None


def test_nothing_is_made_up_beyond_a_curve():
    """A curve better than the baseline's best from the first point saves at least what that point shows; `most_saved`
    says nothing, as the baseline never gets there."""
    x = np.array([10.0, 20.0])
    best, base = np.array([0.9, 0.95]), np.array([0.3, 0.4])
    assert statistics.saved_at(0.4, x, best, x, base) == (0.4, 10, 20, "curve")
    assert statistics.most_saved(x, best, x, base) is None
    assert statistics.saved_at(0.2, x, best, x, base) is None  # both were better all along


def test_paired_t_test():
    """Differences 1, 2, 3: t = 2 / (1 / sqrt 3) with 2 degrees of freedom, whose two-sided p is 0.0742."""
    found = statistics.paired(np.array([1.0, 4.0, 5.0, NAN]), np.array([0.0, 2.0, 2.0, 1.0]))
    assert found.difference == pytest.approx(2) and found.n == 3
    t = 2 * 3**0.5
    assert found.p == pytest.approx(1 - t / (t * t + 2) ** 0.5)  # the distribution of 2 degrees, in closed form
    assert found.p == pytest.approx(0.0742, abs=1e-4)


def test_a_test_that_says_nothing_has_no_p():
    """Fewer than two pairs, and differences without deviation, have no p; of no pair there is no mean either."""
    assert statistics.paired(np.array([0.7]), np.array([0.5])).p is None
    assert statistics.paired(np.array([0.7, 0.8, 0.9]), np.array([0.6, 0.7, 0.8])) == pytest.approx((0.1, None, 3))
    nothing = statistics.paired(np.array([]), np.array([]))
    assert np.isnan(nothing.difference) and nothing[1:] == (None, 0)


def test_holm():
    """The least of three p-values counts three times, the next two times, and none less than the one before it."""
    assert statistics.holm([0.04, None, 0.01, 0.03]) == pytest.approx([0.06, None, 0.03, 0.06])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0] and statistics.holm([None]) == [None] and statistics.holm([]) == []


def test_a_first_published_point_is_one_round():
    """MNIST's 0.25 % are 125 labels, 2.5 % ten times as many; ImageNet's first point is 5 %; limits have no labels."""
    mnist = published.figure("4b", 125)
    curves = {curve.method: curve for curve in mnist.curves}
    assert (mnist.dataset, mnist.imbalance, mnist.percent) == ("mnist", 100, 0.25)
    assert curves["PFK S=phat L80"].labels == [125, 250, 375, 500, 625, 750, 1250]
    assert curves["PFK S=phat L80"].accuracy[0] == pytest.approx(0.716)
    assert curves["varR E4 K32"].labels[0] == 250
    assert mnist.limits == {"all train": 0.925}
    imagenet = {curve.method: curve for curve in published.figure("5d", 64000).curves}
    assert imagenet["random"].labels == [64000, 256000, 640000]
    assert published.figure("9", 125) is None


def test_names_are_moved_apart_as_little_as_it_takes():
    """What does not touch stays; two that touch part evenly; a chain of them stays around its mean, in order."""
    assert figures.apart([0.0, 5.0], 1.0) == [0.0, 5.0]
    assert figures.apart([1.0, 1.0], 1.0) == [0.5, 1.5]
    assert figures.apart([0.0, 0.1, 0.2, 9.0], 1.0) == pytest.approx([-0.9, 0.1, 1.1, 9.0])
    assert figures.apart([], 1.0) == []
