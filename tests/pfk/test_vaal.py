import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypfk.pfk import reference, vaal
from raypfk.pfk.vaal import VAE, Adversary

from .strategies import quick, seeds

close = {"rel": 1e-4, "abs": 1e-5}


def normal(*shape: int, seed: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(side: int = 8, channels: int = 1, latent: int = 4, seed: int = 0) -> Adversary:
    torch.manual_seed(seed)
    return Adversary(channels, side, 4, latent)


@quick
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 5), st.integers(1, 7), st.floats(0, 10), seeds)
def test_the_vae_loss_is_that_of_the_loops(n, channels, side, latent, beta, seed):
    """The mean over all pixels and the sum over all latent numbers, of any shape and weight."""
    image, decoded = (normal(n, channels, side, side, seed=seed + i) for i in range(2))
    mean, logvar = (normal(n, latent, seed=seed + i) for i in (2, 3))
    lists = [x.double().flatten(1).tolist() for x in (image, decoded, mean, logvar)]
    found = vaal.vae_loss(image, decoded, mean, logvar, beta)
    assert found.shape == () and found.item() == pytest.approx(reference.vae_loss(*lists, beta), **close)


@pytest.mark.parametrize("name", ["deceive", "tell_apart"])
@quick
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 1.0, 30.0, 1e4]), seeds)
def test_the_adversarial_losses_are_those_of_the_loops(name, labelled, unlabelled, size, seed):
    """Each kind's mean, whatever their numbers; finite where a sigmoid is 0 or 1."""
    logits = normal(labelled, seed=seed, size=size), normal(unlabelled, seed=seed + 1, size=size)
    found = getattr(vaal, name)(*logits).item()
    assert found == pytest.approx(getattr(reference, name)(*(x.double().tolist() for x in logits)), **close)


def test_a_divergence_of_next_to_nothing_is_no_rounding():
    """logvar = 1e-3 and mean 0: a KL of 2.5e-7, where 1 + v - exp(v) would be rounding alone; and zeros give zero."""
    image, zero = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1)
    found = vaal.vae_loss(image, image, zero, torch.full((1, 1), 1e-3), 1.0).item()
    assert found == pytest.approx((math.expm1(1e-3) - 1e-3) / 2, rel=1e-3)
    assert vaal.vae_loss(image, image, zero, zero, 1.0).item() == 0.0


def test_losses_of_nothing_are_refused():
    """No image, images of another shape, logits that are not (N,): the error says what was expected and what came."""
    image, code = torch.zeros(2, 1, 4, 4), torch.zeros(2, 3)
    for wrong in (torch.zeros(0, 1, 4, 4), torch.zeros(2, 1, 5, 5)):
        with pytest.raises(ValueError, match=r"expected images \(N, C, S, S\) .* got \(.*decoded as"):
            vaal.vae_loss(wrong, image[: len(wrong)], code, code, 1.0)
    for wrong in (torch.zeros(0), torch.zeros(2, 1)):
        for loss in (vaal.deceive, vaal.tell_apart):
            with pytest.raises(ValueError, match=r"expected logits \(N,\) with N at least 1, got \("):
                loss(torch.zeros(2), wrong)


@pytest.mark.parametrize("side", [1, 8, 15, 16, 17, 28, 32])
def test_images_of_any_side(side):
    """What is decoded has the image's shape, and its last row and column have a part in the mean of q(z|x)."""
    vae = VAE(3, side, 2, 5).eval()
    x = normal(2, 3, side, side, seed=side).requires_grad_()
    decoded, mean, logvar = vae(x, torch.zeros(2, 5))
    assert decoded.shape == x.shape and mean.shape == logvar.shape == (2, 5)
    mean.abs().sum().backward()
    assert x.grad[:, :, -1].any() and x.grad[:, :, :, -1].any()


def test_the_programs_layers():
    """At width 128, side 32 and 3 channels: weights of the shapes that the authors' program has."""
    with torch.device("meta"):
        shapes = {tuple(weight.shape) for weight in Adversary(3, 32, 128, 32).parameters() if weight.ndim > 1}
    convolutions = {(128, 3, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1024, 512, 4, 4), (128, 3, 1, 1)}
    linear = {(32, 4096), (16384, 32), (512, 32), (512, 512), (1, 512)}
    assert shapes == convolutions | linear


@pytest.mark.parametrize("side", [8, 28])
def test_a_logit_does_not_depend_on_batch_mates(side):
    """To the last bit, in eval mode: in any order, and with other images beside."""
    adversary = small(side).eval()
    x = normal(64, 1, side, side, seed=1)
    with torch.inference_mode():
        whole, order = adversary(x), torch.randperm(64, generator=torch.Generator().manual_seed(2))
        assert whole.shape == (64,) and torch.equal(adversary(x[order]), whole[order])
        others = torch.cat([normal(40, 1, side, side, seed=3), x[40:]])
        assert torch.equal(adversary(others)[40:], whole[40:])


def test_each_loss_reaches_its_own_network():
    """The discriminator's leaves the VAE alone; the VAE's is the sum of its parts, by the mean of q(z|x)."""
    adversary = small().eval()
    x, noise = normal(2, 3, 1, 8, 8, seed=1), normal(2, 3, 4, seed=2)
    adversary.discriminator_loss(*x).backward()
    assert all(weight.grad is None for weight in adversary.vae.parameters())
    assert all(weight.grad is not None for weight in adversary.discriminator.parameters())
    parts = [vaal.vae_loss(image, *adversary.vae(image, own), 0.1) for image, own in zip(x, noise, strict=True)]
    expected = sum(parts) + 2.0 * vaal.deceive(*map(adversary, x))
    found = adversary.vae_loss((x[0], noise[0]), (x[1], noise[1]), 0.1, 2.0)
    torch.testing.assert_close(found, expected)


def learned(adversary: float) -> torch.Tensor:
    """Logits (2, 8) of the standing and of the lying bars, of which the former were labelled."""
    net, generator = small(latent=8, seed=1), torch.Generator().manual_seed(0)
    bars = torch.eye(8)[:, None, None, :].expand(8, 1, 8, 8)
    standing, lying = bars, bars.transpose(2, 3)
    vae, discriminator = (torch.optim.Adam(part.parameters(), lr=2e-3) for part in (net.vae, net.discriminator))
    for _ in range(60):
        rows, noise = torch.randint(8, (2, 32), generator=generator), torch.randn(2, 32, 8, generator=generator)
        labelled, unlabelled = standing[rows[0]], lying[rows[1]]
        vae.zero_grad()
        net.vae_loss((labelled, noise[0]), (unlabelled, noise[1]), 0.0, adversary).backward()
        vae.step()
        discriminator.zero_grad()
        net.discriminator_loss(labelled, unlabelled).backward()
        discriminator.step()
    with torch.inference_mode():
        return torch.stack([net.eval()(standing), net(lying)])


def test_it_learns_to_tell_two_sets_apart():
    """Bars that stand and bars that lie: all of the former look more labelled, if the VAE does not hinder it; one that
    deceives leaves it knowing little."""
    honest, deceiving = learned(adversary=0.0), learned(adversary=1.0)
    assert honest[0].min() > honest[1].max()
    assert deceiving[0].mean() - deceiving[1].mean() < (honest[0].mean() - honest[1].mean()) / 4
