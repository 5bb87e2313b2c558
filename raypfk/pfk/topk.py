"""The exact top-K pool images of each center as an accumulator: add blocks in any order, merge parts, read the result.

Shapes: M centers, B pool images of a block, K candidates of a center, E entries offered to the state.
"""

import torch
from torch import Tensor

from raypfk.pfk.kernel import MAX_LENGTH, Descriptors, Kernel

TILE_CENTERS = 1024
TILE_POOL = 4096
ENTRIES = 1 << 19  # candidates rescored and merged at once: bounds memory when nearly all scores tie


class TopK:
    """Keeps the K best keys of each of M centers, by (score descending, key ascending).

    The result is that of scoring every pair exactly (float64, rounded to float32), whatever the blocks, their order, or
    the parts merged; a key offered again, as after a retry, counts once. Memory O(M K) plus one tile.
    """

    def __init__(self, num_centers: int, k: int, device: torch.device | str | None = None):
        if num_centers < 0 or k < 1:
            raise ValueError(f"expected num_centers >= 0 and k >= 1, got {num_centers} and {k}")
        self._scores_MK = torch.full((num_centers, k), -torch.inf, device=device)
        self._keys_MK = torch.full((num_centers, k), -1, dtype=torch.int64, device=device)

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

    def add(self, kernel: Kernel, centers: Descriptors, pool: Descriptors, keys: Tensor) -> None:
        """Offers pool images to every center.

        `centers` (M, L) and `pool` (B, L) are standardised descriptors on one device, taken as float32. `keys` (B,)
        int64 >= 0, distinct, are the images' ids: among equal scores the smaller wins. A zero vector scores 0 like any
        other; a pair whose score is NaN (a NaN in a descriptor) is dropped.
        Raises ValueError for shapes that do not fit, and for descriptors that are not standardised (or infinite).
        """
        self._check(kernel, centers, pool, keys)
        for c in range(0, len(centers.z), TILE_CENTERS):
            center_tile = centers.rows(slice(c, c + TILE_CENTERS)).to(torch.float32)
            for b in range(0, len(keys), TILE_POOL):
                pool_tile = pool.rows(slice(b, b + TILE_POOL)).to(torch.float32)
                self._add_tile(kernel, c, center_tile, pool_tile, keys[b : b + TILE_POOL])

    def _check(self, kernel: Kernel, centers: Descriptors, pool: Descriptors, keys: Tensor) -> None:
        length, m = sum(kernel.lengths), len(self._scores_MK)
        for name, part, rows in (("centers", centers, m), ("pool", pool, len(keys))):
            used = part if kernel.name != "pcc" else part[:1]
            if any(x.shape != (rows, length) for x in used):
                raise ValueError(f"expected {name} ({rows}, {length}), got {[tuple(x.shape) for x in used]}")
            if any(
                (x[:, span].norm(dim=1, dtype=torch.float32) > MAX_LENGTH).any() for x in used for span in kernel.spans
            ):
                raise ValueError(f"{name}: expected standardised descriptors, got a scale longer than 1")
        if keys.dtype != torch.int64 or keys.ndim != 1 or (len(keys) and int(keys.min()) < 0):
            raise ValueError(f"expected keys (B,) int64 >= 0, got {tuple(keys.shape)} {keys.dtype}")

    def _add_tile(self, kernel: Kernel, first: int, centers: Descriptors, pool: Descriptors, keys: Tensor) -> None:
        approx_MB = kernel.block(centers, pool)
        worst_M = self._scores_MK[first : first + len(approx_MB), -1]
        floor_M = self._floor(approx_MB, worst_M) - 2 * kernel.error_bound()
        hit_R = (~(approx_MB.amax(1) < floor_M)).nonzero().squeeze(1)  # "not less": the maximum of a row may be NaN
        if len(hit_R) < len(approx_MB):
            approx_MB, floor_M = approx_MB[hit_R], floor_M[hit_R]
        flat_E = (approx_MB >= floor_M[:, None]).flatten().nonzero().squeeze(1)
        for part in flat_E.split(ENTRIES):
            rows, cols = hit_R[part // len(keys)], part % len(keys)
            scores = kernel.pairs(centers, pool, rows, cols).float()
            self._offer(rows + first, scores, keys[cols])

    def _floor(self, approx_MB: Tensor, worst_M: Tensor) -> Tensor:
        # A lower bound, but for rounding, on the K-th best score: the state's, and while it is not full the tile's.
        k = self._scores_MK.shape[1]
        if approx_MB.shape[1] < k or not (worst_M == -torch.inf).any():
            return worst_M
        approx_MB.nan_to_num_(nan=-torch.inf)
        return torch.maximum(worst_M, approx_MB.topk(k, dim=1).values[:, -1])

    def _offer(self, rows: Tensor, scores: Tensor, keys: Tensor) -> None:
        # Entries (E,) in ascending order of row.
        worst, worst_key = self._scores_MK[rows, -1], self._keys_MK[rows, -1]
        better = (scores > worst) | ((scores == worst) & (keys < worst_key))  # a NaN is neither
        rows, scores, keys = rows[better], scores[better], keys[better]
        if not len(rows):
            return
        hit_R, group, count_R = rows.unique_consecutive(return_inverse=True, return_counts=True)
        place = torch.arange(len(rows), device=rows.device) - (count_R.cumsum(0) - count_R)[group]
        k = self._scores_MK.shape[1]
        wide = (len(hit_R), k + int(count_R.max()))
        scores_RW = scores.new_full(wide, -torch.inf)
        keys_RW = keys.new_full(wide, -1)
        scores_RW[:, :k], keys_RW[:, :k] = self._scores_MK[hit_R], self._keys_MK[hit_R]
        scores_RW[group, k + place], keys_RW[group, k + place] = scores, keys
        self._scores_MK[hit_R], self._keys_MK[hit_R] = _best(scores_RW, keys_RW, k)


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
