"""Acquire: from the candidates of each center to the images of a round (eq. 12, Algorithm 1)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SLAB = 1 << 17  # candidates sorted at once: a rank at least


class Picks(NamedTuple):
    """The chosen images, first choice first, and why: each (n,), n <= p."""

    keys: Tensor
    """int64, the image."""
    centers: Tensor
    """int64, the number of the center that asked for it."""
    ranks: Tensor
    """int64, its place among that center's candidates; 0 is the best."""
    scores: Tensor
    """float32, its score with that center."""


def rank_by_rank(scores_CK: Tensor, keys_CK: Tensor, p: int, first_center: int = 0) -> Picks:
    """All centers' best first, in order of score, then all second bests, ..., each image once, until p are chosen.

    `scores_CK` float32 and `keys_CK` int64 are a `TopK.result`: C centers, K candidates each, best first, key -1 for
    none; their rows are the centers `first_center`, `first_center` + 1, .... Equal scores of a rank go by key, then by
    center. Fewer than p where the candidates run out; a larger K then goes on where the smaller stopped: its picks
    begin with the same picks. O(C R log(C R)) for the R <= K ranks that it takes to choose p.
    Raises ValueError for shapes that differ or p < 0.
    """
    if scores_CK.ndim != 2 or scores_CK.shape != keys_CK.shape or p < 0:
        raise ValueError(f"expected (C, K) twice and p >= 0, got {tuple(scores_CK.shape)}, {tuple(keys_CK.shape)}, {p}")
    c, k = keys_CK.shape
    parts, taken, rank = [_offers(scores_CK[:, :0], keys_CK[:, :0], 0)], keys_CK.new_empty(0), 0
    while rank < k and len(taken) < p:
        # No fewer candidates at once than images taken, so that sorting those again costs no more than these.
        stop = rank + max(1, max(SLAB, len(taken)) // max(1, c))
        offers = _offers(scores_CK[:, rank:stop], keys_CK[:, rank:stop], rank)
        parts.append(_in_order(_take(offers, _absent(offers.keys, taken)), p - len(taken)))
        taken, rank = torch.cat([taken, parts[-1].keys]).sort().values, stop
    picks = Picks(*map(torch.cat, zip(*parts, strict=True)))
    return picks._replace(centers=picks.centers + first_center)


def merge_picks(parts: Sequence[Picks], p: int) -> Picks:
    """What `rank_by_rank` picks from all centers, from what it picked, with the same p, from some centers at a time.

    An image's place in the order of choice is the best (rank, -score, key, center) at which a center names it, and
    whoever is among the first p of all is so among the centers of its best place. Memory O(sum of the parts).
    Raises ValueError for p < 0, or for no part.
    """
    if p < 0 or not parts:
        raise ValueError(f"expected parts and p >= 0, got {len(parts)} and {p}")
    offers = Picks(*map(torch.cat, zip(*parts, strict=True)))
    return _in_order(_take(offers, offers.centers.argsort(stable=True)), p)


def _offers(scores_CR: Tensor, keys_CR: Tensor, first_rank: int) -> Picks:
    """The candidates of R ranks, by rank, then center."""
    ranks, centers = (keys_CR.T >= 0).nonzero(as_tuple=True)
    return Picks(keys_CR[centers, ranks], centers, ranks + first_rank, scores_CR[centers, ranks])


def _in_order(offers: Picks, p: int) -> Picks:
    """Each image once, where it comes first by (rank, -score, key, center), and of these the first p.

    `offers` are in the order of their centers within a rank.
    """
    place = _place(offers)
    order = place.argsort(stable=True)
    order = order[offers.keys[order].argsort(stable=True)]
    keys = offers.keys[order]
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    order = order[first]  # by key
    return _take(offers, order[place[order].argsort(stable=True)][:p])


def _place(offers: Picks) -> Tensor:
    """(rank, -score) as one int64: the bits of a float32 >= 0 rise with it, those of one < 0 fall."""
    bits = (offers.scores.float() + 0.0).view(torch.int32).long()  # + 0.0: -0 is 0
    return (offers.ranks << 32) - torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _absent(keys: Tensor, taken: Tensor) -> Tensor:
    """Positions of the keys that are not among those taken, which ascend."""
    at = torch.searchsorted(taken, keys)
    padded = torch.cat([taken, taken.new_full((1,), -1)])
    return (padded[at] != keys).nonzero().squeeze(1)


def _take(picks: Picks, index: Tensor) -> Picks:
    return Picks(*(part[index] for part in picks))
