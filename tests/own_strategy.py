"""A strategy as somebody would write it in a module of their own."""

from raypfk.pfk import Kernel
from raypfk.strategies import by_kernel


@by_kernel
def most_alike(lengths, weight):
    """Features of the last tap alone."""
    return Kernel("pcc", lengths, tuple(float(i == len(lengths) - 1) for i in range(len(lengths))))
