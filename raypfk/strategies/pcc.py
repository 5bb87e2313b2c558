"""Features alone (Gudovskiy et al., CVPR 2020, eq. 6): Pearson's correlation, and no backward pass."""

from raypfk.pfk import Kernel
from raypfk.strategies import by_kernel


@by_kernel
def pcc(lengths, weight):
    return Kernel("pcc", lengths, weight)
