import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypfk.pfk import Discriminant, fit_discriminant, reference
from raypfk.pfk.discriminant import COLDEST, HOTTEST, _discriminants

from .strategies import quick, seeds

D = 4


def examples(m: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy classes of which some may have no example."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(D, (m,), generator=generator)
    means = torch.randn(D, length, generator=generator)
    return means[labels] + 0.7 * torch.randn(m, length, generator=generator), labels


def normalised(logs: list[float], temperature: float) -> list[float]:
    powers = [math.exp((x - max(logs)) / temperature) for x in logs]
    return [p / sum(powers) for p in powers]


@quick
@given(st.integers(1, 12), st.integers(1, 4), st.sampled_from([1e-2, 1.0]), seeds)
def test_the_posterior_is_that_of_the_loops(m, length, ridge, seed):
    """Of Gaussian classes with one covariance, up to a temperature; classes without an example have none."""
    z, labels = examples(m, length, seed)
    new, _ = examples(5, length, seed + 1)
    weights, bias = _discriminants(z.double(), labels, D, ridge)
    posterior = Discriminant(weights, bias).posterior(new)
    for row, found in zip(new.double().tolist(), posterior.tolist(), strict=True):
        expected = reference.discriminant(row, z.double().tolist(), labels.tolist(), D, ridge)
        assert found == pytest.approx(normalised(expected, 1.0), rel=1e-5, abs=1e-9)


@quick
@given(st.integers(2, 12), st.integers(1, 3), seeds)
def test_no_other_temperature_suits_the_other_half_better(m, length, seed):
    """Cross-entropy of each half by the loops' discriminants of the other, where that has the class: with half a label
    of all together spread over the classes that it has. Nothing is fitted where a half has no two of one class."""
    z, labels = examples(m, length, seed)
    weights, bias = _discriminants(z.double(), labels, D, 0.1)
    fitted = fit_discriminant(z, labels, D, 0.1)
    pairs = []
    for first in (0, 1):
        train, known = z.double()[first::2].tolist(), labels[first::2].tolist()
        if len(set(known)) < 2 or len(set(known)) == len(known):
            continue
        for row, label in zip(z.double()[1 - first :: 2].tolist(), labels[1 - first :: 2].tolist(), strict=True):
            if label in known:
                pairs.append((reference.discriminant(row, train, known, D, 0.1), label, set(known)))

    def loss(temperature: float) -> float:
        total, spread = 0.0, 0.5 / max(1, len(pairs))
        for logs, label, known in pairs:
            surprise = [-math.log(max(1e-300, p)) for p in normalised(logs, temperature)]
            total += (1 - spread) * surprise[label] + spread * sum(surprise[c] for c in known) / len(known)
        return total

    seen = bias > -torch.inf
    scale = weights.abs().max()
    temperature = float(scale / fitted.weights.abs().max()) if scale > 0 else 1.0
    assert torch.allclose(fitted.weights * temperature, weights) or not scale > 0
    assert torch.allclose(fitted.bias[seen] * temperature, bias[seen]) or not scale > 0
    others = [t for t in (temperature * 1.2, temperature / 1.2) if COLDEST <= t <= HOTTEST]
    assert all(loss(temperature) <= loss(t) + 1e-6 * (1 + loss(t)) for t in others if scale > 0)


def test_what_is_told_apart_is_told_apart_and_noise_is_not():
    """Far classes are found with certainty; of features that say nothing the classes' shares are left."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) // 2 % D  # both halves have all classes
    noise = torch.randn(400, 3, generator=generator)
    far = fit_discriminant(10 * torch.eye(D)[labels] + 0.1 * torch.randn(400, D, generator=generator), labels, D, 0.01)
    assert (far.posterior(10 * torch.eye(D)).diagonal() > 0.999).all()
    assert (fit_discriminant(noise, labels, D, 0.01).posterior(noise) - 1 / D).abs().max() < 0.2
    assert fit_discriminant(torch.zeros(9, 2), labels[:9], D, 0.01).posterior(torch.zeros(1, 2)).isfinite().all()


def test_a_few_that_are_all_told_right_do_not_show_certainty():
    """Forty images, all right by the other half: between one in ten thousand and one in ten would still be wrong."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) // 2 % 2
    z = 3 * torch.eye(2)[labels] + 0.3 * torch.randn(40, 2, generator=generator)
    posterior = fit_discriminant(z, labels, D, 0.01).posterior(z)
    assert (posterior.argmax(1) == labels).all() and 1e-4 < 1 - posterior.amax(1).mean() < 0.1
    alone = fit_discriminant(z[:2], torch.tensor([0, 1]), D, 0.01)  # no two of one class: nothing to fit by
    assert torch.allclose(alone.weights, _discriminants(z[:2].double(), torch.tensor([0, 1]), D, 0.01)[0])


def test_votes_are_the_likeliest_classes():
    """Best first, of equals the first class; as many as asked for, -1 for one without any probability."""
    told = Discriminant(torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0.0, 1.0, 0.0]).double().log())
    voted = told.vote(torch.zeros(1, 2), 2)
    assert voted.labels.tolist() == [1] and voted.classes.tolist() == [[1, -1]] and voted.shares.tolist() == [[1, 0]]
    even = Discriminant(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3).double()).vote(torch.zeros(1, 2), 2)
    assert even.classes.tolist() == [[0, 1]] and even.shares[0].tolist() == pytest.approx([1 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("z", "labels", "classes", "shrinkage", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), 2, 0.1, "M >= 1 labels int64, got 0"),
        (torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64), 2, 0.1, "got 2 and 3"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), 2, 0.1, "expected classes 0..1, got 0..2"),
        (torch.zeros(2, 2), torch.tensor([0, 1]), 2, 0.0, "shrinkage > 0 and finite features, got 0.0"),
        (torch.full((2, 2), torch.nan), torch.tensor([0, 1]), 2, 0.1, "finite features"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(z, labels, classes, shrinkage, message):
    with pytest.raises(ValueError, match=message):
        fit_discriminant(z, labels, classes, shrinkage)
