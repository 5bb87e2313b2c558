"""Random changes of training images, seeded: uint8 (N, C, H, W) and a torch.Generator in, the same shape out."""

import math

import torch
import torch.nn.functional as F

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
