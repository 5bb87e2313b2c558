"""Random changes of training images, seeded: uint8 (N, C, H, W) and a torch.Generator in, the same shape out; and
samples around images that are looked at (`jitter`)."""

import math

import torch
import torch.nn.functional as F

from raypfk.pfk import draws

CROP_AREA = (0.35, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)


def none(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return image


def flip(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image left-right with probability one half."""
    mirrored = torch.rand(len(image), generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), image.flip(3), image)


def crop_flip(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image a crop of random area and aspect (Szegedy et al. 2015), resized to the whole, and `flip`."""
    n = len(image)
    draw = torch.rand(4, n, generator=generator)
    area = CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * draw[0]
    low, high = map(math.log, CROP_ASPECT)
    aspect = torch.exp(low + (high - low) * draw[1])
    w, h = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    # Affine maps of the output's [-1, 1] square onto the crop.
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = w, h
    theta[:, 0, 2], theta[:, 1, 2] = (2 * draw[2] - 1) * (1 - w), (2 * draw[3] - 1) * (1 - h)
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    cropped = F.grid_sample(image.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return flip(cropped.round().to(torch.uint8), generator)


AUGMENTATIONS = {"none": none, "flip": flip, "crop-flip": crop_flip}


def jitter(image: torch.Tensor, salts: torch.Tensor, sample: int, degrees: float, noise: float) -> torch.Tensor:
    """A sample around each image: turned by up to `degrees` to either side, uniform, and with Gaussian noise.

    image: what a network sees, float (N, C, S, S). salts: (N,) int64; an image's samples follow from its own, whatever
    its batch mates. noise: standard deviation. (The paper, section 4.3, has 5 degrees, its program 5 radians.)
    """
    own = draws.bits(salts, sample)
    angle = (2 * draws.uniform(own, 0) - 1) * math.radians(degrees)
    theta = torch.zeros(len(image), 2, 3, dtype=torch.float64, device=image.device)
    theta[:, 0, 0] = theta[:, 1, 1] = angle.cos()
    theta[:, 1, 0], theta[:, 0, 1] = angle.sin(), -angle.sin()
    grid = F.affine_grid(theta.to(image.dtype), list(image.shape), align_corners=False)
    turned = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return turned + noise * _normal(own, image.shape[1:].numel()).view_as(image).to(image.dtype) if noise else turned


def _normal(salts: torch.Tensor, count: int) -> torch.Tensor:
    """(N, count) float64 of the normal distribution (Box and Muller 1958), from each salt's draws 1, 2, ...."""
    half = -(-count // 2)
    place = torch.arange(1, half + 1, device=salts.device)
    radius = (-2 * draws.uniform(salts[:, None], place).log()).sqrt()
    turn = 2 * math.pi * draws.uniform(salts[:, None], place + half)
    return torch.cat([radius * turn.cos(), radius * turn.sin()], dim=1)[:, :count]
