"""The exact top-K pool images of each center as an accumulator: add blocks in any order, merge parts, read the result.

Most pairs are told to be out by a scan in low precision (scan.py); those that may be in are scored in float32, and
those that still may be in, in float64. So the result does not depend on the precision, nor on any block's size.

Shapes: M centers, R some of them, B pool images of a block, K candidates of a center, V votes, E entries of one batch.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from raypfk.pfk import scan
from raypfk.pfk.kernel import MAX_LENGTH, Descriptors, Kernel

HEAD = 4096  # images whose scores give an empty state its first floors
SEGMENT = 1 << 16  # images scanned against the same floors
BLOCK_CENTERS = 1024  # centers of a first block
TILE_CENTERS = {"cpu": scan.TILE_CENTERS}  # centers scanned at once: for a core's cache, or to fill a GPU
SMALL = 1 << 22  # pairs for which low precision is not worth its preparation
BUDGETS = (1 / 512, 1 / 64)  # of a tile's pairs that may be left to rescore: with loose error bounds, with tight ones
DENSE = 1 / 8  # of the pairs of a block: from there on, all are scored in float64 products at once
BLOCK_NUMBERS = 1 << 23  # scores of a first block
ENTRIES = 1 << 19  # candidates rescored and merged at once: bounds memory when nearly all scores tie


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
        self._precision, self._caution, self._seen = precision, 0, 0
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

    def result(self) -> tuple[Tensor, Tensor]:
        """Scores (M, K) float32, padded with -inf, and keys (M, K) int64, padded with -1, best first."""
        return self._scores_MK.clone(), self._keys_MK.clone()

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
        Raises ValueError for shapes that do not fit, and for descriptors that are not standardised (or infinite).
        """
        centers, pool = (part.to(torch.float32) for part in (centers, pool))
        fine_M, fine_B = self._check(kernel, centers, pool, keys)
        self._check_votes(votes, len(fine_M), len(keys))
        rows = fine_M.nonzero().squeeze(1)
        if not fine_B.all():
            pool, keys = pool.rows(fine_B), keys[fine_B]
            votes = votes and votes._replace(classes=votes.classes[fine_B], shares=votes.shares[fine_B])
        if votes is None:
            self._add(kernel, rows, centers, pool, keys)
        else:
            for label in votes.labels[rows].unique().tolist():
                self._add_class(kernel, rows[votes.labels[rows] == label], centers, pool, keys, votes, label)
        self._seen += len(keys)

    def _add_class(self, kernel, rows: Tensor, centers, pool, keys: Tensor, votes: Votes, label: int) -> None:
        """The images with a vote for a class, to the centers of that class; the others all score 0 there."""
        image, slot = ((votes.classes == label) & (votes.shares > 0)).nonzero(as_tuple=True)
        factor = votes.shares[image, slot].double() ** votes.gamma
        self._add(kernel, rows, centers, pool.rows(image), keys[image], factor)
        worst = self._floor(rows)
        if (worst <= 0).any():  # a list that is not full of better ones has room for zeros, smallest keys first
            silent = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
            silent[image] = False
            some = keys[silent].sort().values[: self._keys_MK.shape[1]]
            open_R = rows[worst <= 0]
            zeros = torch.zeros(len(open_R) * len(some), device=keys.device)
            self._offer(open_R.repeat_interleave(len(some)), zeros, some.repeat(len(open_R)))

    def _check(self, kernel: Kernel, centers: Descriptors, pool: Descriptors, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Masks (M,) and (B,) of the vectors without a NaN."""
        length, m = sum(kernel.lengths), len(self._scores_MK)
        if keys.dtype != torch.int64 or keys.ndim != 1 or (len(keys) and int(keys.min()) < 0):
            raise ValueError(f"expected keys (B,) int64 >= 0, got {tuple(keys.shape)} {keys.dtype}")
        masks = []
        for name, part, rows in (("centers", centers, m), ("pool", pool, len(keys))):
            used = part if kernel.name != "pcc" else part[:1]
            if any(x.shape != (rows, length) for x in used):
                raise ValueError(f"expected {name} ({rows}, {length}), got {[tuple(x.shape) for x in used]}")
            sizes = torch.stack([x[:, span].norm(dim=1) for x in used for span in kernel.spans])
            if (sizes > MAX_LENGTH).any():
                raise ValueError(f"{name}: expected standardised descriptors, got a scale longer than 1")
            masks.append(~sizes.isnan().any(0))
        return masks[0], masks[1]

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

    def _add(self, kernel, rows: Tensor, centers, pool, keys: Tensor, factor: Tensor | None = None) -> None:
        """Offers images without a NaN to the centers `rows`; scores are multiplied by `factor` (B,) float64."""
        part = _Part(kernel, rows, centers.rows(rows), pool, keys, factor)
        start, low = 0, self._low_precision(part)
        while start < len(keys) and len(rows):
            cold = bool((self._floor(rows) == -torch.inf).any())
            size = max(HEAD, 2 * self._keys_MK.shape[1]) if cold else min(SEGMENT, max(HEAD, self._seen + start))
            segment = part.images(slice(start, start + size))
            if cold:
                few = max(1, min(BLOCK_CENTERS, BLOCK_NUMBERS // size))
                for tile in torch.arange(len(rows), device=rows.device).split(few):
                    self._add_block(segment.centers_of(tile))
            else:
                self._add_segment(segment, low)
            start += size

    def _low_precision(self, part: "_Part") -> scan.Rounded | None:
        """The centers in the precision to scan in, or None for float32."""
        precision = self._precision
        if precision == "auto":
            worth = len(part.rows) * len(part.keys) >= SMALL and part.factor is None
            precision = scan.fastest(part.kernel, part.keys.device) if worth else "float32"
        return None if precision == "float32" else scan.round_to(part.kernel, precision, part.centers)

    def _floor(self, rows: Tensor) -> Tensor:
        """What a score must reach to matter to these centers: -inf while K are not found."""
        return torch.maximum(self._scores_MK[rows, -1], self._least_M[rows])

    def _add_block(self, part: "_Part") -> None:
        """A first block: its own K-th best scores, less their error, are the floors of lists that are not full."""
        scores_RB, bound = part.kernel.block(part.centers, part.pool), part.kernel.error_bound()
        if part.factor is not None:
            scores_RB *= part.factor32
        self.counts["float32"] += scores_RB.numel()
        floor_R, k = self._floor(part.rows), self._keys_MK.shape[1]
        if scores_RB.shape[1] >= k:
            floor_R = torch.maximum(floor_R, scores_RB.topk(k, dim=1).values[:, -1] - bound)
        flat_E = (scores_RB >= (floor_R - bound)[:, None]).flatten().nonzero().squeeze(1)
        if part.factor is None and len(flat_E) > DENSE * scores_RB.numel():
            self._settle_all(part)
        else:
            self._settle(part, flat_E // len(part.keys), flat_E % len(part.keys))

    def _settle_all(self, part: "_Part") -> None:
        """Scores all pairs exactly, and merges them; without a factor."""
        self.counts["dense"] += len(part.rows) * len(part.keys)
        scores_RB = part.kernel.exact_block(part.centers, part.pool)
        low_RB = scores_RB < self._least_M[part.rows, None]
        scores = torch.cat([self._scores_MK[part.rows], scores_RB.masked_fill_(low_RB, -torch.inf)], dim=1)
        keys = torch.cat([self._keys_MK[part.rows], part.keys.expand_as(scores_RB).masked_fill(low_RB, -1)], dim=1)
        k = self._keys_MK.shape[1]
        self._scores_MK[part.rows], self._keys_MK[part.rows] = _best(scores, keys, k)

    def _add_segment(self, part: "_Part", low: scan.Rounded | None) -> None:
        device = part.rows.device
        tiles = torch.arange(len(part.rows), device=device).split(TILE_CENTERS.get(device.type, 1 << 16))
        exact, found = scan.round_to(part.kernel, "float32", part.pool), []
        if low is not None:
            pool = scan.round_to(part.kernel, low.precision, part.pool, low.steps)
            outlier = scan.drop_outliers(pool)
            outliers = part.images(outlier)
            apart = scan.round_to(part.kernel, "float32", outliers.pool)
            self._caution = max(0, self._caution - 1)  # what one segment could not afford the next one may
        for tile in tiles:
            piece, some = part.centers_of(tile), None
            if low is not None and self._caution < len(BUDGETS):
                some = self._scan_low(piece, low.rows(tile), pool)
                if some is not None and len(outlier):
                    few = self._scan_float32(outliers.centers_of(tile), apart)
                    some += [(rows, outlier[cols]) for rows, cols in few]
            if some is None:
                some = self._scan_float32(piece, exact)
            found += [(rows + tile[0], cols) for rows, cols in some]
        if found:
            self._settle(part, *(torch.cat(x) for x in zip(*found, strict=True)))

    def _scan_low(self, part: "_Part", centers: scan.Rounded, pool: scan.Rounded) -> list[tuple[Tensor, Tensor]] | None:
        """The pairs that a scan in low precision leaves to rescore; None where they are too many to be worth it."""
        floor_R = self._floor(part.rows)
        while self._caution < len(BUDGETS):
            budget, found, total = len(part.rows) * len(part.keys) * BUDGETS[self._caution], [], 0
            for some in scan.survivors(part.kernel, centers, pool, floor_R, part.factor32, tight=self._caution > 0):
                found.append((some.rows, some.cols))
                total += len(some.rows)
                if total > budget:
                    break
            else:
                self.counts[centers.precision] += len(part.rows) * len(part.keys)
                return found
            self.counts["overflows"] += 1
            self._caution += 1
        return None

    def _scan_float32(self, part: "_Part", pool: scan.Rounded) -> list[tuple[Tensor, Tensor]]:
        """The pairs that a scan in float32 leaves to rescore, but for blocks where nearly all do: these are settled."""
        centers, floor_R = scan.round_to(part.kernel, "float32", part.centers), self._floor(part.rows)
        self.counts["float32"] += len(part.rows) * len(part.keys)
        found, total = [], 0
        for some in scan.survivors(part.kernel, centers, pool, floor_R, part.factor32):
            block = part.images(some.images)
            if part.factor is None and len(some.rows) > DENSE * len(block.rows) * len(block.keys):  # nearly all tie
                self._settle_all(block)
                floor_R.copy_(self._floor(part.rows))
                continue
            found.append((some.rows, some.cols))
            total += len(some.rows)
            if total >= ENTRIES:
                self._settle(part, *(torch.cat(x) for x in zip(*found, strict=True)))
                floor_R.copy_(self._floor(part.rows))
                found, total = [], 0
        return found

    def _settle(self, part: "_Part", rows: Tensor, cols: Tensor) -> None:
        """Scores pairs (E,) in float32, then those that may still be among the K best exactly, and offers them."""
        order = cols.argsort(stable=True)  # of an image all pairs together: it is read from memory once
        rows, cols = rows[order], cols[order]
        for r, c in zip(rows.split(ENTRIES), cols.split(ENTRIES), strict=True):
            self.counts["rescored"] += len(r)
            r, c = self._may_be_in(part, r, c)
            self.counts["exact"] += len(r)
            factor = None if part.factor is None else part.factor[c]
            scores = part.kernel.exact_pairs(part.centers, part.pool, r, c, factor)
            order = r.argsort(stable=True)
            self._offer(part.rows[r[order]], scores[order], part.keys[c[order]])

    def _may_be_in(self, part: "_Part", rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs whose float32 score does not rule them out; `cols` ascend before and after."""
        scores, bound = part.kernel.pairs32(part.centers, part.pool, rows, cols), part.kernel.error_bound()
        if part.factor is not None:
            scores *= part.factor32[cols]
        high = (scores >= self._floor(part.rows)[rows] - bound).nonzero().squeeze(1)
        best = high[scores[high].argsort(descending=True)]
        best = best[rows[best].argsort(stable=True)]
        kth = _places(rows[best])[2] == self._keys_MK.shape[1] - 1
        least_R = scores.new_full((len(part.rows),), -torch.inf)
        least_R[rows[best[kth]]] = scores[best[kth]] - 2 * bound
        keep = high[scores[high] >= least_R[rows[high]]]
        return rows[keep], cols[keep]

    def _offer(self, rows: Tensor, scores: Tensor, keys: Tensor) -> None:
        # Entries (E,) in ascending order of row.
        worst, worst_key = self._scores_MK[rows, -1], self._keys_MK[rows, -1]
        better = (scores > worst) | ((scores == worst) & (keys < worst_key))
        better &= scores >= self._least_M[rows]
        rows, scores, keys = rows[better], scores[better], keys[better]
        if not len(rows):
            return
        hit_R, group, place = _places(rows)
        k = self._scores_MK.shape[1]
        wide = (len(hit_R), k + int(place.max()) + 1)
        scores_RW = scores.new_full(wide, -torch.inf)
        keys_RW = keys.new_full(wide, -1)
        scores_RW[:, :k], keys_RW[:, :k] = self._scores_MK[hit_R], self._keys_MK[hit_R]
        scores_RW[group, k + place], keys_RW[group, k + place] = scores, keys
        self._scores_MK[hit_R], self._keys_MK[hit_R] = _best(scores_RW, keys_RW, k)


@dataclass(frozen=True)
class _Part:
    """Some centers and some images: `rows` are the centers' rows in the state."""

    kernel: Kernel
    rows: Tensor
    centers: Descriptors
    pool: Descriptors
    keys: Tensor
    factor: Tensor | None

    @property
    def factor32(self) -> Tensor | None:
        return None if self.factor is None else self.factor.float()

    def images(self, index: slice | Tensor) -> "_Part":
        factor = None if self.factor is None else self.factor[index]
        return replace(self, pool=self.pool.rows(index), keys=self.keys[index], factor=factor)

    def centers_of(self, tile: Tensor) -> "_Part":
        return replace(self, rows=self.rows[tile], centers=self.centers.rows(tile))


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
