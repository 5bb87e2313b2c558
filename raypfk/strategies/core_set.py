"""Core-set: every image of the pool near a labelled one (Sener and Savarese, Active Learning for Convolutional Neural
Networks: A Core-Set Approach, ICLR 2018, Algorithm 1), by Euclidean distances of what the last layer sees."""

from raypfk.pfk.greedy import FarthestFirst, Features
from raypfk.strategies import by_gradients


@by_gradients("labelled")
def core_set(vectors, keys_N, salts_N, labelled):
    part = FarthestFirst(Features(vectors.hidden), keys_N, salts_N)
    part.absorb(Features(labelled.hidden))
    return part
