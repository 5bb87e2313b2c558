"""The practical Fisher kernel: features and Fisher scores both alike (Gudovskiy et al., Deep Active Learning for Biased
Datasets via Fisher Kernel Self-Supervision, CVPR 2020, eq. 11 and 12)."""

from raypfk.pfk import Kernel
from raypfk.strategies import by_kernel


@by_kernel
def pfk(lengths, weight):
    return Kernel("pfk", lengths, weight)
