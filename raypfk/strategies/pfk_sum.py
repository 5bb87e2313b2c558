"""The sum of what is multiplied in `pfk`: what the program of Gudovskiy et al. (CVPR 2020) computes."""

from raypfk.pfk import Kernel
from raypfk.strategies import by_kernel


@by_kernel
def pfk_sum(lengths, weight):
    return Kernel("pfk-sum", lengths, weight)
