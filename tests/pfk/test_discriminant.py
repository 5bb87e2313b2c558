import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypfk.pfk import Discriminant, fit_discriminant, reference
from raypfk.pfk.discriminant import COLDEST, FOLDS, HOTTEST, _classes, _discriminants

from .strategies import quick, seeds

D = 4


def examples(m: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy classes of which some may have no example."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(D, (m,), generator=generator)
    means = torch.randn(D, length, generator=generator)
    return means[labels] + 0.7 * torch.randn(m, length, generator=generator), labels


def untempered(z: torch.Tensor, labels: torch.Tensor, ridge: float) -> Discriminant:
    return Discriminant(*_discriminants(_classes(z.double(), labels, D), ridge))


def surprise(told: Discriminant, z: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0) -> float:
    """Mean cross-entropy."""
    logits = (z.double() @ told.weights + told.bias) / temperature
    return float(torch.nn.functional.cross_entropy(logits, labels))


def normalised(logs: list[float], temperature: float) -> list[float]:
    powers = [math.exp((x - max(logs)) / temperature) for x in logs]
    return [p / sum(powers) for p in powers]


@quick
@given(st.integers(1, 12), st.integers(1, 4), st.sampled_from([1e-2, 1.0]), seeds)
def test_the_posterior_is_that_of_the_loops(m, length, ridge, seed):
    """Of Gaussian classes with one covariance, up to a temperature; classes without an example have none."""
    z, labels = examples(m, length, seed)
    new, _ = examples(5, length, seed + 1)
    posterior = untempered(z, labels, ridge).posterior(new)
    for row, found in zip(new.double().tolist(), posterior.tolist(), strict=True):
        expected = reference.discriminant(row, z.double().tolist(), labels.tolist(), D, ridge)
        assert found == pytest.approx(normalised(expected, 1.0), rel=1e-5, abs=1e-9)


@quick
@given(st.integers(2, 25), st.integers(1, 3), seeds)
def test_no_other_temperature_suits_unseen_images_better(m, length, seed):
    """Cross-entropy of each fold by the loops' discriminants of the others, where these have the class: with half a
    label of all together spread over the classes that they have. Nothing is fitted where they have no two of one class,
    or only one class."""
    z, labels = examples(m, length, seed)
    weights, bias = untempered(z, labels, 0.1)
    fitted = fit_discriminant(z, labels, D, 0.1)
    rows, classes, pairs = z.double().tolist(), labels.tolist(), []
    folds = [classes[:i].count(c) * FOLDS // classes.count(c) for i, c in enumerate(classes)]
    for fold in range(FOLDS):
        train = [row for row, f in zip(rows, folds, strict=True) if f != fold]
        known = [c for c, f in zip(classes, folds, strict=True) if f != fold]
        if len(set(known)) < 2 or len(set(known)) == len(known):
            continue
        for row, label, f in zip(rows, classes, folds, strict=True):
            if f == fold and label in known:
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
    """Far classes are found with the certainty that 400 images can show; of features that say nothing the classes'
    shares are left."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % D
    noise = torch.randn(400, 3, generator=generator)
    far = fit_discriminant(10 * torch.eye(D)[labels] + 0.1 * torch.randn(400, D, generator=generator), labels, D, 0.01)
    assert (far.posterior(10 * torch.eye(D)).diagonal() > 1 - 1 / 400).all()
    assert (fit_discriminant(noise, labels, D, 0.01).posterior(noise) - 1 / D).abs().max() < 0.2
    assert fit_discriminant(torch.zeros(9, 2), labels[:9], D, 0.01).posterior(torch.zeros(1, 2)).isfinite().all()


def test_a_few_that_are_all_told_right_do_not_show_certainty():
    """Forty images, all right by the others: between one in ten thousand and one in ten would still be wrong."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    z = 3 * torch.eye(2)[labels] + 0.3 * torch.randn(40, 2, generator=generator)
    posterior = fit_discriminant(z, labels, D, 0.01).posterior(z)
    assert (posterior.argmax(1) == labels).all() and 1e-4 < 1 - posterior.amax(1).mean() < 0.1
    alone = fit_discriminant(z[:2], torch.tensor([0, 1]), D, 0.01)  # no two of one class: nothing to fit by
    assert torch.allclose(alone.weights, untempered(z[:2], torch.tensor([0, 1]), 0.01).weights)


@pytest.mark.parametrize("seed", range(4))
def test_the_temperature_of_few_images_suits_unseen_ones(seed):
    """120 images of 60 numbers that hardly tell the classes apart: little is lost against the best of all temperatures,
    where 1 is far too sure, and nothing at all is log 4."""
    generator = torch.Generator().manual_seed(seed)
    means = 0.25 * torch.randn(D, 60, generator=generator)

    def draw(m):
        labels = torch.randint(D, (m,), generator=generator)
        return means[labels] + torch.randn(m, 60, generator=generator), labels

    z, labels = draw(120)
    unseen = draw(4000)
    raw = untempered(z, labels, 0.01)
    best = min(surprise(raw, *unseen, math.exp(t / 10)) for t in range(60))
    assert surprise(fit_discriminant(z, labels, D, 0.01), *unseen) < best + 0.1
    assert best < math.log(4) - 0.2 and surprise(raw, *unseen) > 1.4 * best


def test_nearly_the_same_images_side_by_side_are_not_told_by_each_other():
    """Two frames of each of 300 scenes: the scenes are what is seen for the first time."""
    generator = torch.Generator().manual_seed(0)
    means, scenes = 0.2 * torch.randn(D, 100, generator=generator), torch.randint(D, (700,), generator=generator)
    z = means[scenes] + torch.randn(700, 100, generator=generator)
    frames = z[:300].repeat_interleave(2, 0) + 0.1 * torch.randn(600, 100, generator=generator)
    told = fit_discriminant(frames, scenes[:300].repeat_interleave(2), D, 0.01)
    assert surprise(told, z[300:], scenes[300:]) < math.log(4)


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
