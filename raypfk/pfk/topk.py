"""The exact top-K pool images of each center as an accumulator: add blocks in any order, merge parts, read the result.

Most pairs are told to be out by a scan in low precision (scan.py); those that may be in are scored exactly. So the
result does not depend on the precision, nor on any block's size.

Shapes: M centers, R some of them, B pool images of a block, K candidates of a center, V votes, E entries of one batch.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from raypfk.pfk import scan
from raypfk.pfk.kernel import Descriptors, Kernel, check_standardised

HEAD = 4096  # images whose scores give an empty state its first floors
SMALL = 1 << 22  # pairs for which low precision is not worth its preparation
GROUP = 1 << 14  # pairs of a class's centers and voters that are scored one by one, with those of other classes
BUDGET = {  # of a block's pairs that may be left to rescore; beside a GPU's products that is dear
    "cpu": {"int8": 1 / 16, "bfloat16": 1 / 16, "float32": 1 / 8},
    "cuda": {"int8": 1 / 400, "bfloat16": 1 / 32, "float32": 1 / 8},
}


class Sizes(NamedTuple):
    """How much is done at once: on a CPU what stays in its cache, on a GPU what keeps it busy."""

    block: int
    """Images scanned against the same floors, at most."""
    growth: int
    """And at most one of so many seen before: floors rise fast at first."""
    centers: int
    head: int
    """Scores of the first images."""
    most: int
    """Pairs left to rescore."""
    entries: int
    """Candidates rescored and merged: bounds memory when nearly all scores tie."""


SIZES = {
    "cpu": Sizes(1 << 14, 8, 4096, 1 << 23, 1 << 24, 1 << 19),
    "cuda": Sizes(1 << 18, 1, 1 << 16, 1 << 27, 1 << 27, 1 << 23),
}


class Votes(NamedTuple):
    """What a label estimator says of B pool images: shares q_n(d) of a few classes d, and how much they count.

    A score with a center of class y is multiplied by q_n(y)^gamma. A class that is not listed has the share 0.
    """

    classes: Tensor
    """(B, V) int64, -1 for none; each class at most once in a row."""
    shares: Tensor
    """(B, V) float32, in 0..1."""
    labels: Tensor
    """(M,) int64, the classes y of the centers."""
    gamma: float
    """> 0."""


class TopK:
    """Keeps the K best keys of each of M centers, by (score descending, key ascending).

    The result is that of scoring every pair exactly (float64, rounded to float32), whatever the blocks, their order,
    the parts merged or the `precision` of the scan; a key offered again, as after a retry, counts once. `floor_M`:
    scores (M,) that a candidate must reach, such as the K-th best of what another accumulator has seen. Memory O(M K)
    plus a tile. `counts` says what was done: pairs scanned by precision, tiles that fell back, pairs rescored.
    """

    def __init__(
        self,
        num_centers: int,
        k: int,
        device: torch.device | str | None = None,
        floor_M: Tensor | None = None,
        precision: scan.Precision | Literal["auto"] = "auto",
    ):
        if num_centers < 0 or k < 1:
            raise ValueError(f"expected num_centers >= 0 and k >= 1, got {num_centers} and {k}")
        if precision not in ("auto", *scan.PRECISIONS):
            raise ValueError(f"expected precision auto, {', '.join(scan.PRECISIONS)}, got {precision!r}")
        self._scores_MK = torch.full((num_centers, k), -torch.inf, device=device)
        self._keys_MK = torch.full((num_centers, k), -1, dtype=torch.int64, device=device)
        self._least_M = self._scores_MK[:, 0].clone() if floor_M is None else floor_M.to(self._scores_MK)
        self._precision, self._seen, self._wary = precision, 0, 0
        if floor_M is not None and (floor_M > -torch.inf).all():
            self._seen = self._sizes.growth * self._sizes.block  # whoever sent floors has seen many
        self.counts: Counter[str] = Counter()

    @classmethod
    def of(cls, scores_MK: Tensor, keys_MK: Tensor) -> "TopK":
        """An accumulator from another's `result`. Raises ValueError for arrays of another shape or dtype."""
        if scores_MK.ndim != 2 or scores_MK.shape != keys_MK.shape:
            raise ValueError(f"expected scores and keys (M, K), got {tuple(scores_MK.shape)}, {tuple(keys_MK.shape)}")
        if scores_MK.dtype != torch.float32 or keys_MK.dtype != torch.int64:
            raise ValueError(f"expected float32 scores and int64 keys, got {scores_MK.dtype} and {keys_MK.dtype}")
        top = cls(*scores_MK.shape, device=scores_MK.device)
        top._scores_MK, top._keys_MK = _best(scores_MK, keys_MK, scores_MK.shape[1])
        return top

    @property
    def _sizes(self) -> Sizes:
        return SIZES[self._scores_MK.device.type]

    @property
    def _budget(self) -> dict[scan.Precision, float]:
        return BUDGET[self._scores_MK.device.type]

    def result(self) -> tuple[Tensor, Tensor]:
        """Scores (M, K) float32, padded with -inf, and keys (M, K) int64, padded with -1, best first."""
        return self._scores_MK.clone(), self._keys_MK.clone()

    def floor(self) -> Tensor:
        """(M,) float32: what a score must reach to be among the K best so far, -inf where there are fewer."""
        return self._floor(slice(None)).clone()

    def merge(self, other: "TopK") -> None:
        """Takes in the candidates of another accumulator of the same M and K; ValueError for another shape."""
        if other._scores_MK.shape != self._scores_MK.shape:
            expected, got = tuple(self._scores_MK.shape), tuple(other._scores_MK.shape)
            raise ValueError(f"expected an accumulator of (M, K) = {expected}, got {got}")
        scores = torch.cat([self._scores_MK, other._scores_MK.to(self._scores_MK.device)], dim=1)
        keys = torch.cat([self._keys_MK, other._keys_MK.to(self._keys_MK.device)], dim=1)
        self._scores_MK, self._keys_MK = _best(scores, keys, self._keys_MK.shape[1])

    def add(
        self, kernel: Kernel, centers: Descriptors, pool: Descriptors, keys: Tensor, votes: Votes | None = None
    ) -> None:
        """Offers pool images to every center.

        `centers` (M, L) and `pool` (B, L) are standardised descriptors on one device, taken as float32. `keys` (B,)
        int64 >= 0, distinct, are the images' ids: among equal scores the smaller wins. A zero vector scores 0 like any
        other; a pair whose score is NaN (a NaN in a descriptor) is dropped. With `votes`, scores are multiplied by the
        confidence in the center's class, and only pairs that have any are scored.
        Raises ValueError for shapes that do not fit, for descriptors that are not standardised (or infinite), and for a
        precision in which this machine's products are wrong.
        """
        centers, pool = (part.to(torch.float32) for part in (centers, pool))
        self._check(kernel, centers, pool, keys)
        self._check_votes(votes, len(self._scores_MK), len(keys))
        low = self._low_precision(kernel, len(keys), keys.device)
        lows = [None if low == "float32" else scan.round_to(kernel, low, part) for part in (centers, pool)]
        named = zip(("centers", "pool"), (centers, pool), lows, strict=True)
        fine_M, fine_B = (check_standardised(name, _lengths(kernel, *given)) for name, *given in named)
        rows = torch.arange(len(fine_M), device=keys.device)
        part = _Part(kernel, rows, centers, pool, keys, *lows)
        part = part if fine_M.all() else part.centers_of(fine_M)
        part = part if fine_B.all() else part.images(fine_B)
        if votes is None:
            self._add(part)
        else:
            self._add_voted(part, votes._replace(classes=votes.classes[fine_B], shares=votes.shares[fine_B]))
        self._seen += len(keys)

    def _add_voted(self, part: "_Part", votes: Votes) -> None:
        """The images with a vote for a class, to the centers of that class; the others all score 0 there."""
        by_key, of_center = part.keys.argsort(), _groups(votes.labels[part.rows])
        voter, slot = (votes.shares > 0).nonzero(as_tuple=True)
        of_vote = _groups(votes.classes[voter, slot])
        silent, few = [], [(by_key[:0], by_key[:0], votes.shares.new_empty(0, dtype=torch.float64))]
        for label, center in of_center.items():
            vote = of_vote.get(label, by_key[:0])
            image, slot_of = voter[vote], slot[vote]
            factor, pairs = votes.shares[image, slot_of].double() ** votes.gamma, len(center) * len(image)
            if pairs <= GROUP:
                few.append(
                    (center.repeat_interleave(len(image)), image.repeat(len(center)), factor.repeat(len(center)))
                )
            else:
                some = part.centers_of(center)
                some = some if pairs >= SMALL else replace(some, low_centers=None, low_pool=None)
                self._add(replace(some.images(image), factor=factor))
            silent.append((center, image))
        self._settle(part, *(torch.cat(x) for x in zip(*few, strict=True)))
        for center, image in silent:
            self._offer_zeros(part, center, image, by_key)

    def _offer_zeros(self, part: "_Part", center: Tensor, voters: Tensor, by_key: Tensor) -> None:
        """To centers whose list is not full of better ones: the images that are no voters, smallest keys first."""
        open_R = part.rows[center[self._floor(part.rows[center]) <= 0]]
        if len(open_R):
            k = self._keys_MK.shape[1]
            first = by_key[: k + len(voters)]
            some = part.keys[first[~torch.isin(first, voters)][:k]]
            zeros = torch.zeros(len(open_R) * len(some), device=some.device)
            self._offer(open_R.repeat_interleave(len(some)), zeros, some.repeat(len(open_R)))

    def _check(self, kernel: Kernel, centers: Descriptors, pool: Descriptors, keys: Tensor) -> None:
        length, m = sum(kernel.lengths), len(self._scores_MK)
        if keys.dtype != torch.int64 or keys.ndim != 1 or (len(keys) and int(keys.min()) < 0):
            raise ValueError(f"expected keys (B,) int64 >= 0, got {tuple(keys.shape)} {keys.dtype}")
        for name, part, rows in (("centers", centers, m), ("pool", pool, len(keys))):
            used = part if kernel.name != "pcc" else part[:1]
            if any(x.shape != (rows, length) for x in used):
                raise ValueError(f"expected {name} ({rows}, {length}), got {[tuple(x.shape) for x in used]}")

    @staticmethod
    def _check_votes(votes: Votes | None, m: int, n: int) -> None:
        if votes is None:
            return
        classes, shares = votes.classes, votes.shares
        if classes.shape != shares.shape or classes.ndim != 2 or len(classes) != n or votes.labels.shape != (m,):
            got = [tuple(x.shape) for x in votes[:3]]
            raise ValueError(f"expected votes (B, V) twice and labels (M,) for B = {n} and M = {m}, got {got}")
        if not votes.gamma > 0 or not ((shares >= 0) & (shares <= 1)).all():
            raise ValueError(f"expected shares in 0..1 and gamma > 0, got gamma {votes.gamma} and other shares")

    def _low_precision(self, kernel: Kernel, num_images: int, device: torch.device) -> scan.Precision:
        if self._precision != "auto":
            if self._precision not in scan.supported(kernel, device):
                raise ValueError(f"precision {self._precision}: its products are not exact here, for this kernel")
            return self._precision
        worth = len(self._scores_MK) * num_images >= SMALL
        return scan.fastest(kernel, device) if worth else "float32"

    def _add(self, part: "_Part") -> None:
        """Offers images without a NaN to centers without one."""
        start, end = 0, len(part.keys) if len(part.rows) else 0
        while start < end:
            cold = bool((self._floor(part.rows) == -torch.inf).any())
            size = max(HEAD, 2 * self._keys_MK.shape[1])
            if not cold:
                size = min(self._sizes.block, max(size, (self._seen + start) // self._sizes.growth))
            block = part.images(slice(start, start + size))
            if cold:
                few = max(1, self._sizes.head // size)
                for first in range(0, len(part.rows), few):
                    self._add_head(block.centers_of(slice(first, first + few)))
            else:
                self._add_block(block, self._seen + start)
            start += size

    def _floor(self, rows: Tensor | slice) -> Tensor:
        """What a score must reach to matter to these centers: -inf while K are not found."""
        return torch.maximum(self._scores_MK[rows, -1], self._least_M[rows])

    def _add_head(self, part: "_Part") -> None:
        """First images: their own K-th best scores, less their error, are the floors of lists that are not full."""
        k = self._keys_MK.shape[1]
        if k > self._budget["float32"] * len(part.keys):  # K are left of them at least
            self._settle_all(part)
            return
        scores_RB, bound = part.kernel.block(part.centers, part.pool), part.kernel.error_bound()
        if part.factor is not None:
            scores_RB *= part.factor32
        self.counts["float32"] += scores_RB.numel()
        floor_R = torch.maximum(self._floor(part.rows), scores_RB.topk(k, dim=1).values[:, -1] - bound)
        hit_RB = scores_RB >= (floor_R - bound)[:, None]
        if int(hit_RB.count_nonzero()) > self._budget["float32"] * scores_RB.numel():
            self._settle_all(part)
        else:
            self._settle(part, *hit_RB.nonzero(as_tuple=True))

    def _add_block(self, part: "_Part", seen: int) -> None:
        step = self._sizes.centers
        for first in range(0, len(part.rows), step):
            some = part.centers_of(slice(first, first + step))
            found = None
            if some.low_pool and seen >= self._wary:
                found = self._scan(some)
                if found is None:
                    self._wary = 2 * (seen + len(part.keys))  # floors will hardly be higher before that
            fallback = scan.fallback(some.rows.device)
            if found is None and not (some.low_pool and some.low_pool.precision == fallback):
                found = self._scan(some.rounded_to(fallback))
            if found is None:
                self._settle_all(some)
            else:
                self._settle(some, *found)

    def _scan(self, part: "_Part") -> scan.Pairs | None:
        """The pairs that a scan leaves to rescore; None where they are too many to be worth it."""
        pairs, precision = len(part.rows) * len(part.keys), part.low_pool.precision
        capacity = min(self._sizes.most, int(self._budget[precision] * pairs))
        lows, floor_R = (part.low_centers, part.low_pool), self._floor(part.rows)
        found = scan.survivors(part.kernel, *lows, floor_R, part.factor32, capacity)
        self.counts["overflows" if found is None else precision] += 1 if found is None else pairs
        return found

    def _settle_all(self, part: "_Part") -> None:
        """Scores all pairs exactly, and merges them."""
        few = max(1, self._sizes.entries // max(1, len(part.keys)))
        for first in range(0, len(part.rows), few):
            self._settle_dense(part.centers_of(slice(first, first + few)))

    def _settle_dense(self, part: "_Part") -> None:
        self.counts["dense"] += len(part.rows) * len(part.keys)
        scores_RB = part.kernel.exact_block(part.centers, part.pool, part.factor)
        low_RB = ~(scores_RB >= self._least_M[part.rows, None])  # of a NaN, too
        scores = torch.cat([self._scores_MK[part.rows], scores_RB.masked_fill_(low_RB, -torch.inf)], dim=1)
        keys = torch.cat([self._keys_MK[part.rows], part.keys.expand_as(scores_RB).masked_fill(low_RB, -1)], dim=1)
        k = self._keys_MK.shape[1]
        self._scores_MK[part.rows], self._keys_MK[part.rows] = _best(scores, keys, k)

    def _settle(self, part: "_Part", rows: Tensor, cols: Tensor, factor_E: Tensor | None = None) -> None:
        """Scores pairs (E,) exactly, times `factor_E` or what the part's images have, and offers them."""
        if factor_E is None and part.factor is not None:
            factor_E = part.factor[cols]
        for start in range(0, len(rows), self._sizes.entries):
            some = slice(start, start + self._sizes.entries)
            r, c, factor = rows[some], cols[some], None if factor_E is None else factor_E[some]
            self.counts["rescored"] += len(r)
            scores = part.kernel.exact_pairs(part.centers, part.pool, r, c, factor)
            self._offer(part.rows[r], scores, part.keys[c])

    def _offer(self, rows: Tensor, scores: Tensor, keys: Tensor) -> None:
        # Entries (E,) in any order.
        worst, worst_key = self._scores_MK[rows, -1], self._keys_MK[rows, -1]
        better = (scores > worst) | ((scores == worst) & (keys < worst_key))
        better &= scores >= self._least_M[rows]
        rows, scores, keys = _ranked(rows[better], scores[better], keys[better])
        if not len(rows):
            return
        hit_R, group, place = _places(rows)
        k = self._scores_MK.shape[1]
        among = place < k
        group, place, scores, keys = (x[among] for x in (group, place, scores, keys))
        wide = (len(hit_R), k + int(place.max()) + 1)
        scores_RW = scores.new_full(wide, -torch.inf)
        keys_RW = keys.new_full(wide, -1)
        scores_RW[:, :k], keys_RW[:, :k] = self._scores_MK[hit_R], self._keys_MK[hit_R]
        scores_RW[group, k + place], keys_RW[group, k + place] = scores, keys
        self._scores_MK[hit_R], self._keys_MK[hit_R] = _best(scores_RW, keys_RW, k)


@dataclass(frozen=True)
class _Part:
    """Some centers and some images, as they are and as they are scanned: `rows` are the centers' rows in the state."""

    kernel: Kernel
    rows: Tensor
    centers: Descriptors
    pool: Descriptors
    keys: Tensor
    low_centers: scan.Rounded | None
    low_pool: scan.Rounded | None
    factor: Tensor | None = None

    @property
    def factor32(self) -> Tensor | None:
        return None if self.factor is None else self.factor.float()

    def images(self, index: slice | Tensor) -> "_Part":
        factor = None if self.factor is None else self.factor[index]
        low = self.low_pool and self.low_pool.rows(index)
        return replace(self, pool=self.pool.rows(index), low_pool=low, keys=self.keys[index], factor=factor)

    def centers_of(self, index: slice | Tensor) -> "_Part":
        low = self.low_centers and self.low_centers.rows(index)
        return replace(self, rows=self.rows[index], centers=self.centers.rows(index), low_centers=low)

    def rounded_to(self, precision: scan.Precision) -> "_Part":
        centers, pool = (scan.round_to(self.kernel, precision, part) for part in (self.centers, self.pool))
        return replace(self, low_centers=centers, low_pool=pool)


def _groups(labels_N: Tensor) -> dict[int, Tensor]:
    """Of each label the rows that have it, in order."""
    order = labels_N.argsort(stable=True)
    found, counts = labels_N[order].unique_consecutive(return_counts=True)
    return dict(zip(found.tolist(), order.split(counts.tolist()), strict=True))


def _lengths(kernel: Kernel, part: Descriptors, rounded: scan.Rounded | None) -> Tensor:
    """Of every scale, also of those that do not count: 0 times NaN is NaN."""
    known = rounded and len(kernel.used_scales) == len(kernel.spans) and rounded.lengths_TN is not None
    return rounded.lengths_TN if known else kernel.scale_lengths(part)


def _ranked(rows: Tensor, scores: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entries (E,) by row, then score descending, then key."""
    order = keys.argsort()
    bits = (scores[order] + 0.0).view(torch.int32)  # without -0: of floats, but for the sign, the bits have the order
    down = torch.where(bits < 0, bits & 0x7FFFFFFF, -bits).long()
    order = order[((rows[order] << 33) + down).argsort(stable=True)]
    return rows[order], scores[order], keys[order]


def _places(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows (E,) in ascending order: those that occur; of each entry, which of them it is in and its place there."""
    hit_R, group, count_R = rows.unique_consecutive(return_inverse=True, return_counts=True)
    return hit_R, group, torch.arange(len(rows), device=rows.device) - (count_R.cumsum(0) - count_R)[group]


def _best(scores_RW: Tensor, keys_RW: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k of each row by (score descending, key ascending), each key once."""
    keys_RW, order = keys_RW.sort(dim=1)
    scores_RW, order = scores_RW.gather(1, order).sort(dim=1, descending=True, stable=True)
    keys_RW = keys_RW.gather(1, order)
    again = (keys_RW[:, 1:] == keys_RW[:, :-1]) & (keys_RW[:, 1:] >= 0)
    if again.any():
        scores_RW[:, 1:][again], keys_RW[:, 1:][again] = -torch.inf, -1
        scores_RW, order = scores_RW.sort(dim=1, descending=True, stable=True)
        keys_RW = keys_RW.gather(1, order)
    return scores_RW[:, :k].contiguous(), keys_RW[:, :k].contiguous()
