"""Hypothesis makes shapes and seeds; torch makes the numbers from them."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

from raypfk.pfk import Descriptors, Kernel, standardise

quick = settings(deadline=None, max_examples=40, derandomize=True)

NAMES = ("pcc", "pfk", "pfk-sum")
WEIGHTS = ("length", "length-squared", "equal")

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)
kernels = st.builds(Kernel, st.sampled_from(NAMES), lengths, st.sampled_from(WEIGHTS))
seeds = st.integers(0, 2**31)


def vectors(n: int, lengths: tuple[int, ...], seed: int) -> torch.Tensor:
    """Standardised (n, L) float32, of few kinds: random, small integers, zero, constant, tiny; many duplicates."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    kinds = torch.cat(
        [
            torch.randn(4, total, generator=generator),
            torch.randint(-1, 2, (3, total), generator=generator).float(),
            torch.zeros(1, total),
            torch.full((1, total), 0.1),
            -torch.randn(1, total, generator=generator) * 1e-38,
        ]
    )
    return standardise(kinds[torch.randint(len(kinds), (n,), generator=generator)], lengths)


def descriptors(n: int, lengths: tuple[int, ...], seed: int) -> Descriptors:
    """`vectors` for z and for g."""
    return Descriptors(vectors(n, lengths, seed), vectors(n, lengths, seed + 1))


def lists(part: Descriptors) -> tuple[list, list]:
    """As `reference` takes them."""
    return part.z.tolist(), part.g.tolist()
