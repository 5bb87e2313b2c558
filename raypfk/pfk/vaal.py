"""VAAL's networks and losses (Sinha, Ebrahimi and Darrell, Variational Adversarial Active Learning, ICCV 2019): a
variational autoencoder maps images to a latent space in which a discriminator tells labelled from unlabelled ones.

The architecture, the initial weights and the reductions are those of the authors' published program, except that a
discriminator's output is a logit here: its sigmoid rounds to 1 where the logits still differ.
Shapes: N images, C channels, S side of an image, Z latent numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 16
"""Of the four convolutions together."""
HIDDEN = 512
"""Numbers of the discriminator's hidden layers."""


class VAE(nn.Module):
    """`vae(x (N, C, S, S), noise (N, Z)) -> (decoded (N, C, S, S), mean (N, Z), logvar (N, Z))`, q(z|x) and a sample's.

    width: channels after the first of four convolutions of stride 2, of which each has twice as many as the one before
    (128 in the program); the decoder mirrors them. side: any; where it is no multiple of 16, the encoder sees the image
    padded with its last row and column, below and on the right, and what is decoded is cropped to the image.
    """

    def __init__(self, channels: int, side: int, width: int, latent: int):
        super().__init__()
        grid = -(-side // STRIDE)
        self.side, self.padding = side, grid * STRIDE - side
        widths = [width << i for i in range(4)]
        deepest, inputs = widths[-1], widths[-1] * grid**2
        down = [layer for a, b in zip([channels, *widths], widths, strict=False) for layer in _half(a, b)]
        up = [layer for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True) for layer in _double(a, b)]
        self.encoder = nn.Sequential(*down, nn.Flatten())
        self.mean, self.logvar = nn.Linear(inputs, latent), nn.Linear(inputs, latent)
        unflatten = nn.Unflatten(1, (deepest, 2 * grid, 2 * grid))
        last = nn.ConvTranspose2d(width, channels, 1)
        self.decoder = nn.Sequential(nn.Linear(latent, 4 * inputs), unflatten, *up, last)
        _initialise(self.encoder, self.decoder)

    def encode(self, x_NCSS: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (N, Z) of q(z|x)."""
        hidden = self.encoder(F.pad(x_NCSS, (0, self.padding, 0, self.padding), mode="replicate"))
        return self.mean(hidden), self.logvar(hidden)

    def decode(self, z_NZ: Tensor) -> Tensor:
        return self.decoder(z_NZ)[:, :, : self.side, : self.side]

    def forward(self, x_NCSS: Tensor, noise_NZ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean_NZ, logvar_NZ = self.encode(x_NCSS)
        return self.decode(mean_NZ + noise_NZ * (logvar_NZ / 2).exp()), mean_NZ, logvar_NZ


class Discriminator(nn.Module):
    """`discriminator(z (N, Z)) -> logits (N,)` of being labelled: three linear layers, the two hidden of this size."""

    def __init__(self, latent: int, hidden: int):
        super().__init__()
        layers = [nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)]
        self.layers = nn.Sequential(*layers)
        _initialise(self.layers)

    def forward(self, z_NZ: Tensor) -> Tensor:
        return self.layers(z_NZ).squeeze(1)


class Adversary(nn.Module):
    """Both: `adversary(x (N, C, S, S)) -> logits (N,)` of being labelled, by the mean of q(z|x), not a sample of it.

    In eval mode, and at one shape of batch, an image's logit does not depend on its batch mates, to the last bit.
    """

    def __init__(self, channels: int, side: int, width: int, latent: int):
        super().__init__()
        self.vae, self.discriminator = VAE(channels, side, width, latent), Discriminator(latent, HIDDEN)

    def forward(self, x_NCSS: Tensor) -> Tensor:
        return self.discriminator(self.vae.encode(x_NCSS)[0])

    def vae_loss(
        self, labelled: tuple[Tensor, Tensor], unlabelled: tuple[Tensor, Tensor], beta: float, adversary: float
    ) -> Tensor:
        """What the VAE descends (the paper's eq. 1 and 2), of images (N, C, S, S) and noise (N, Z) of either kind: both
        kinds' `vae_loss`, and `adversary` times `deceive`. Batch normalisation sees each kind by itself.
        """
        losses, logits = [], []
        for x_NCSS, noise_NZ in (labelled, unlabelled):
            decoded_NCSS, mean_NZ, logvar_NZ = self.vae(x_NCSS, noise_NZ)
            losses.append(vae_loss(x_NCSS, decoded_NCSS, mean_NZ, logvar_NZ, beta))
            logits.append(self.discriminator(mean_NZ))
        return sum(losses) + adversary * deceive(*logits)

    def discriminator_loss(self, labelled_NCSS: Tensor, unlabelled_NCSS: Tensor) -> Tensor:
        """What the discriminator descends (eq. 3), `tell_apart`; no gradient reaches the VAE."""
        with torch.no_grad():
            means = [self.vae.encode(x_NCSS)[0] for x_NCSS in (labelled_NCSS, unlabelled_NCSS)]
        return tell_apart(*map(self.discriminator, means))


def vae_loss(image_NCSS: Tensor, decoded_NCSS: Tensor, mean_NZ: Tensor, logvar_NZ: Tensor, beta: float) -> Tensor:
    """Squared error, the mean over all N C S S numbers, and beta KL(q(z|x) || N(0, I)), the sum over all N Z numbers.

    So the program weighs them: beta = 1 counts the divergence N C S S / 2 times as much as the evidence lower bound of
    unit variance does. ValueError unless there is an image, and what is decoded has its shape.
    """
    if image_NCSS.shape != decoded_NCSS.shape or not image_NCSS.numel():
        got = f"{tuple(image_NCSS.shape)} decoded as {tuple(decoded_NCSS.shape)}"
        raise ValueError(f"expected images (N, C, S, S) with N at least 1, decoded in the same shape, got {got}")
    divergence_NZ = (mean_NZ.square() + logvar_NZ.expm1() - logvar_NZ) / 2
    return F.mse_loss(decoded_NCSS, image_NCSS) + beta * divergence_NZ.sum()


def deceive(labelled_N: Tensor, unlabelled_N: Tensor) -> Tensor:
    """Cross-entropy of calling both kinds labelled, by the logits of either: the mean of each, added (eq. 2).

    ValueError unless both are (N,), with N at least 1.
    """
    return _called(labelled_N, True) + _called(unlabelled_N, True)


def tell_apart(labelled_N: Tensor, unlabelled_N: Tensor) -> Tensor:
    """Cross-entropy of calling the labelled so, and the unlabelled not: the mean of each, added (eq. 3).

    ValueError unless both are (N,), with N at least 1.
    """
    return _called(labelled_N, True) + _called(unlabelled_N, False)


def _called(logits_N: Tensor, labelled: bool) -> Tensor:
    if logits_N.ndim != 1 or not len(logits_N):
        raise ValueError(f"expected logits (N,) with N at least 1, got {tuple(logits_N.shape)}")
    return F.softplus(-logits_N if labelled else logits_N).mean()


def _half(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def _double(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def _initialise(*parts: nn.Sequential) -> None:
    """He's normal weights, no biases, of convolutions and linear layers (He et al. 2015); all others stay torch's."""
    for layer in (layer for part in parts for layer in part):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
