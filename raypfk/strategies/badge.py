"""BADGE: diverse gradients of uncertain images (Ash et al., Deep Batch Active Learning by Diverse, Uncertain Gradient
Lower Bounds, ICLR 2020)."""

from raypfk.pfk.greedy import KMeansPlusPlus
from raypfk.strategies import by_gradients


@by_gradients()
def badge(vectors, keys_N, salts_N):
    return KMeansPlusPlus(vectors, keys_N, salts_N)
