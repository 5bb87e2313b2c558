"""The mathematics of Fisher-kernel active learning (Gudovskiy et al., CVPR 2020, section 4): no Ray, no files.

descriptors (z, g) -> labels (S) -> kernel -> topk (candidates), with centers and acquire around it; `compress` makes
descriptors smaller; `uncertainty` (by `dropout`), `greedy` and `vaal` are the rivals'; `stopping` and `two_sample` say
whether to go on; `reference` says the same in float64 loops. It is torch, but for two compiled inner loops: `loops` for
CPUs (Numba), `fused` for GPUs (Triton).
"""

from raypfk.pfk.acquire import Picks, merge_picks, rank_by_rank
from raypfk.pfk.centers import greedy_k_center
from raypfk.pfk.compress import dequantise, principal_directions, project, quantise
from raypfk.pfk.descriptors import (
    TapReader,
    class_scores,
    features,
    fisher_scores,
    grid_features,
    lengths,
    logit_slope,
    spatial_mean,
    standardise,
)
from raypfk.pfk.discriminant import Discriminant, fit_discriminant
from raypfk.pfk.dropout import McDropout
from raypfk.pfk.greedy import LastLayer
from raypfk.pfk.kernel import Descriptors, Kernel, scale_weights
from raypfk.pfk.labels import Voted, mc_information, mc_trace, neighbour, predicted, vote
from raypfk.pfk.stopping import PowerLaw, fit_power_law, mcnemar, standard_error
from raypfk.pfk.topk import TopK, Votes
from raypfk.pfk.two_sample import TwoSample, kernel_two_sample
from raypfk.pfk.uncertainty import mean_probabilities

__all__ = [
    "Descriptors",
    "Discriminant",
    "Kernel",
    "LastLayer",
    "McDropout",
    "Picks",
    "PowerLaw",
    "TapReader",
    "TopK",
    "TwoSample",
    "Voted",
    "Votes",
    "class_scores",
    "dequantise",
    "features",
    "fisher_scores",
    "fit_discriminant",
    "fit_power_law",
    "greedy_k_center",
    "grid_features",
    "kernel_two_sample",
    "lengths",
    "logit_slope",
    "mc_information",
    "mc_trace",
    "mcnemar",
    "mean_probabilities",
    "merge_picks",
    "neighbour",
    "predicted",
    "principal_directions",
    "project",
    "quantise",
    "rank_by_rank",
    "scale_weights",
    "spatial_mean",
    "standard_error",
    "standardise",
    "vote",
]
