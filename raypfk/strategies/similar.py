"""SIMILAR: images like the validation set's misses, and together like all of them, by facility location mutual
information (Kothawade et al., SIMILAR: Submodular Information Measures Based Active Learning in Realistic Scenarios,
NeurIPS 2021)."""

from raypfk.pfk.greedy import FacilityLocation
from raypfk.strategies import by_gradients


@by_gradients("misses")
def similar(vectors, keys_N, salts_N, misses):
    return FacilityLocation(vectors.with_bias(), keys_N, misses.with_bias())
