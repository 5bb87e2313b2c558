import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypfk.pfk import class_shares, prior_ratio, reweighted
from raypfk.pfk.prior import STEPS

from .strategies import quick, seeds

D = 4


def votes(n: int, v: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Posteriors of n images, of which v of the D classes are kept, likeliest first; some are certain."""
    generator = torch.Generator().manual_seed(seed)
    posterior = (4 * torch.randn(n, D, generator=generator)).softmax(1)
    posterior[posterior < 0.05] = 0
    shares, classes = posterior.sort(dim=1, descending=True)
    return classes[:, :v].masked_fill(shares[:, :v] == 0, -1), shares[:, :v]


def by_loops(classes: list, shares: list, prior: list[float], least: float) -> list[float]:
    """Saerens et al., eq. 9, image by image."""
    found = list(prior)
    for _ in range(STEPS):
        sums = [0.0] * D
        for of, q in zip(classes, shares, strict=True):
            weighted = {d: x * found[d] / prior[d] for d, x in zip(of, q, strict=True) if d >= 0 and prior[d] > 0}
            for d, x in weighted.items():
                sums[d] += x / sum(weighted.values()) * sum(q)
        found = [max(least, x / sum(sums)) if p > 0 else 0.0 for x, p in zip(sums, prior, strict=True)]
        found = [x / sum(found) for x in found]
    return found


@quick
@given(st.integers(1, 8), st.integers(1, D), st.sampled_from([0.0, 0.01, 0.25]), seeds)
def test_class_shares_are_those_of_the_loops(n, v, least, seed):
    classes, shares = votes(n, v, seed)
    prior = torch.rand(D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    prior = prior / prior.sum()
    expected = by_loops(classes.tolist(), shares.double().tolist(), prior.tolist(), least)
    assert class_shares(classes, shares, prior, least).tolist() == pytest.approx(expected, abs=1e-9)


def test_rare_classes_are_found_rare():
    """Posteriors that are as sure as they are right, of images of which few are of two classes: their shares, but for
    noise; where the images are as the prior says, that stays."""
    generator = torch.Generator().manual_seed(0)
    prior, means = torch.full((D,), 1 / D, dtype=torch.float64), 3.0 * torch.eye(D)
    for true in (torch.tensor([0.48, 0.5, 0.015, 0.005]), prior):
        labels = torch.multinomial(true.float(), 20000, replacement=True, generator=generator)
        seen = means[labels] + torch.randn(20000, D, generator=generator)
        shares, classes = (3.0 * seen).softmax(1).sort(dim=1, descending=True)  # p(y | seen) by Bayes' rule
        found = class_shares(classes, shares, prior, 0.0)
        assert (found - torch.bincount(labels, minlength=D) / 20000).abs().max() < 0.004


def test_no_class_is_taken_to_be_rarer_than_the_least():
    """Not one that is never seen; but one that the labels do not have stays without share."""
    classes, shares = torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)
    labels = torch.tensor([0, 1, 1, 0])
    assert prior_ratio(classes, shares, labels, 3, 0.1).tolist() == pytest.approx([2 / 1.1, 0.2 / 1.1, 0])
    assert prior_ratio(classes[:0], shares[:0], labels, 3, 0.1).tolist() == [1, 1, 0]


def test_posteriors_under_other_shares():
    """Bayes' rule; the sum over what is kept stays as it was; an image for which nothing speaks stays without."""
    classes, shares = torch.tensor([[0, 1], [2, -1], [1, 2]]), torch.tensor([[0.5, 0.25], [0.5, 0.0], [0.5, 0.5]])
    got = reweighted(classes, shares, torch.tensor([1.0, 4.0, 0.0]))
    assert got.tolist() == [[0.25, 0.5], [0.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("least", [-0.1, 0.3])
def test_a_least_share_that_cannot_be_is_refused(least):
    with pytest.raises(ValueError, match=r"least share of 0..1/4, got \(5, 2\), \(5, 2\) and"):
        class_shares(torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 2), torch.full((D,), 0.25), least)
