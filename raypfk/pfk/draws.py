"""Random numbers that are a function of a salt and a counter alone: SplitMix64, in torch's int64.

No generator's state is handed on, so an image's numbers depend on its own salt, not on its batch mates or on who asks.
"""

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15 - 2**64  # the odd integer nearest to 2^64 / the golden ratio, as int64


def mix(x: Tensor) -> Tensor:
    """SplitMix64's output function: a one-to-one scrambling of int64, in which each bit of x moves half of all bits.

    Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014, with Stafford's mix 13.
    """
    x = (x ^ _shift(x, 30)).mul_(0xBF58476D1CE4E5B9 - 2**64)
    x = x.bitwise_xor_(_shift(x, 27)).mul_(0x94D049BB133111EB - 2**64)
    return x.bitwise_xor_(_shift(x, 31))


def bits(salts: Tensor, draw: int | Tensor) -> Tensor:
    """Output number `draw`, from 0, of the SplitMix64 that starts at each salt: int64, salts and draws broadcast.

    They are as good as new salts: `bits(bits(salts, a), b)` has independent numbers for every pair (a, b).
    """
    if isinstance(draw, int):
        draw = torch.tensor(draw, device=salts.device)
    return mix(salts + (draw + 1) * GAMMA)


def uniform(salts: Tensor, draw: int | Tensor) -> Tensor:
    """`bits` as float64 numbers that are uniform in the open interval (0, 1), 2^-52 apart."""
    return _shift(bits(salts, draw), 12).double().add_(0.5).mul_(2.0**-52)  # exact: no sum rounds up to 1


def _shift(x: Tensor, by: int) -> Tensor:
    # Logical, as of an unsigned number: torch's own shift repeats the sign.
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)
