"""Acquire: from the candidates of each center to the images of a round (eq. 12, Algorithm 1)."""

from typing import NamedTuple

import torch
from torch import Tensor


class Picks(NamedTuple):
    """The chosen images, first choice first, and why: each (n,), n <= p."""

    keys: Tensor
    """int64, the image."""
    centers: Tensor
    """int64, the row of the center that asked for it."""
    ranks: Tensor
    """int64, its place among that center's candidates; 0 is the best."""
    scores: Tensor
    """float32, its score with that center."""


def rank_by_rank(scores_CK: Tensor, keys_CK: Tensor, p: int) -> Picks:
    """All centers' best first, in order of score, then all second bests, ..., each image once, until p are chosen.

    `scores_CK` float32 and `keys_CK` int64 are a `TopK.result`: C centers, K candidates each, best first, key -1 for
    none. Equal scores of a rank go by key, then by center. Fewer than p where the candidates run out; a larger K then
    goes on where the smaller stopped: its picks begin with the same picks. O(C K log(C K)).
    Raises ValueError for shapes that differ or p < 0.
    """
    if scores_CK.ndim != 2 or scores_CK.shape != keys_CK.shape or p < 0:
        raise ValueError(f"expected (C, K) twice and p >= 0, got {tuple(scores_CK.shape)}, {tuple(keys_CK.shape)}, {p}")
    ranks, centers = (keys_CK.T >= 0).nonzero(as_tuple=True)  # by rank, then center
    scores, keys = scores_CK[centers, ranks], keys_CK[centers, ranks]
    order = keys.argsort(stable=True)
    order = order[scores[order].argsort(descending=True, stable=True)]
    order = order[ranks[order].argsort(stable=True)]
    order = order[_first_of_each(keys[order])][:p]
    return Picks(keys[order], centers[order], ranks[order], scores[order])


def _first_of_each(keys: Tensor) -> Tensor:
    """Positions, ascending, at which a key stands for the first time."""
    keys, position = keys.sort(stable=True)
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    return position[first].sort().values
