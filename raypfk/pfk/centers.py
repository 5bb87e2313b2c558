"""Centers: the misses that the selection must cover (section 4.4, Algorithm 1 lines 5-7).

Shapes: M misses, U distinct ones, T in front, B of a tile, n centers, Q pairs, L numbers of a descriptor.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from raypfk.pfk.kernel import Descriptors, Kernel, check_standardised

FRONT_NUMBERS = 2 << 20  # of the features and Fisher scores in front: every choice reads them, so they lie in cache
FRONT_LEAST = 512
BATCH = 4  # fronts brought up to date before it is asked whether more must be
TILE = 1024  # misses, or centers, of one block
COMPARED = 1 << 20  # similarities to all centers found at once
HASHED = 1 << 20  # numbers hashed, or compared, at once
NONE = -1
NOBODY = torch.iinfo(torch.int64).max


def greedy_k_center(kernel: Kernel, misses: Descriptors, p: int, seed: int) -> Tensor:
    """Indices (min(p, M),) int64 of p of the M misses, in the order chosen.

    The first is drawn with `seed`; then always the miss whose largest similarity to the centers so far is smallest, of
    equals the first. Similarities are those of `Kernel.pairs`, rounded to float32. With p >= M all misses, in index
    order. A miss with a NaN comes last, unless it is the one drawn. `misses` (M, L) are standardised descriptors, taken
    as float32.

    O(p M L) time at most, O(M L) memory, no p x M matrix. A largest similarity only grows, so that it need not be up to
    date to be known as not the smallest (lazy greedy: Minoux, Accelerated greedy algorithms for maximizing submodular
    set functions, 1978); and float32 decides wherever its error cannot.
    Raises ValueError for p < 0, and for descriptors that are not standardised.
    """
    m, device = len(misses.z), misses.z.device
    if p < 0:
        raise ValueError(f"expected p >= 0 centers, got {p}")
    if p >= m or p == 0:
        return torch.arange(min(p, m), device=device)
    drawn = torch.randint(m, (1,), generator=torch.Generator().manual_seed(seed)).to(device)
    sound_M = _all_finite(misses.z) & _all_finite(misses.g)
    sound, broken = _where(sound_M), _where(~sound_M)
    misses = (misses.rows(sound) if len(broken) else misses).to(torch.float32)
    check_standardised("misses", kernel.scale_lengths(misses))
    alone = drawn[~sound_M[drawn]]  # similar to nobody
    count = min(p - len(alone), len(sound))
    first = int(_where(sound == drawn)) if not len(alone) else None
    chosen = sound[_Greedy(kernel, misses, count).choose(first)] if count else sound[:0]
    return torch.cat([alone, chosen, broken[broken != drawn]])[:p]


def _all_finite(x_ML: Tensor) -> Tensor:
    return (x_ML.amin(1) > -torch.inf) & (x_ML.amax(1) < torch.inf)  # a NaN is neither


class _Greedy:
    """The distinct misses, what is known of their closeness, and in front the least close, of whom the most is known.

    Closeness is the largest similarity to a center so far. The bounds of a distinct miss are those by its first
    `_seen_U` centers: its `low` holds for all of them. Whoever is in front has seen all centers; the least of the
    others by (low, index) is `_rest`.
    """

    def __init__(self, kernel: Kernel, misses: Descriptors, count: int):
        if kernel.name == "pcc":
            misses = Descriptors(misses.z, misses.z[:, :0])  # no Fisher scores to carry along
        self._kernel, self._misses, self._count, self._error = kernel, misses, count, kernel.error_bound()
        self._queues = _Queues(_first_equals(kernel, misses))
        self._row_U = self._queues.next_U.clone()
        self._bounds = _Bounds.without_centers(len(self._row_U), misses.z.device)
        self._seen_U = torch.zeros_like(self._row_U)
        room = min(count, len(self._row_U))
        self._centers = Descriptors(*(x.new_empty(room, x.shape[1]) for x in misses))
        self._num_centers = 0

    def choose(self, first: int | None) -> Tensor:
        """`count` >= 1 misses in the order of choice; the first may be given."""
        u = 0 if first is None else self._queues.to_head(first)
        self._set_front(torch.tensor([u], device=self._row_U.device))
        chosen, at_once = [] if first is None else [self._choose(0)], 1
        while len(chosen) < self._count:
            low, index, place = self._least()
            if (low, index) >= self._rest:
                self._renew_front()
            elif low < float(self._front.high[place]):
                self._settle(place, at_once)
                at_once *= 2  # so that none is settled in vain where all are equal, and all soon where all are near
            else:
                chosen.append(self._choose(place))
                at_once = 1
        return torch.tensor(chosen, dtype=torch.int64, device=self._misses.z.device)

    def _least(self) -> tuple[float, int, int]:
        """Of those in front the least by (low, index), and its place there."""
        low = self._front.low.amin()
        place = self._front_next.masked_fill(self._front.low > low, NOBODY).argmin()
        return float(low), int(self._front_next[place]), int(place)

    def _choose(self, place: int) -> int:
        """Makes a center of the one in front at `place`, or of its equal who is next."""
        u = int(self._front_U[place])
        miss, is_new = self._queues.take(u)
        self._front_next[place] = self._queues.next_U[u]
        if self._queues.next_U[u] == NOBODY:
            self._front.low[place] = self._front.high[place] = torch.inf
        if is_new:  # another of the same changes nobody's closeness
            row = self._row_U[u]
            for centers_nL, misses_ML in zip(self._centers, self._misses, strict=True):
                centers_nL[self._num_centers] = misses_ML[row]
            self._absorb(self._front, self._front_misses, self._num_centers, self._num_centers + 1)
            self._num_centers += 1
        return miss

    def _absorb(self, bounds: "_Bounds", misses: Descriptors, start: int, stop: int) -> None:
        for first in range(start, stop, TILE):
            centers = self._centers.rows(slice(first, min(first + TILE, stop)))
            bounds.absorb(self._kernel.block(centers, misses), first, self._error)

    def _renew_front(self) -> None:
        """Brings those of the smallest `low` up to date until enough of them stay the smallest, who are then in front.

        One round need not be enough to find the least of all, but every round brings it nearer.
        """
        self._bounds.put(self._front_U, self._front)
        self._seen_U[self._front_U] = self._num_centers
        room = max(FRONT_LEAST, FRONT_NUMBERS // sum(x.shape[1] for x in self._misses))
        order_U = self._in_order(torch.arange(len(self._row_U), device=self._row_U.device))
        done = 0
        for batch in order_U.split(BATCH * room):
            self._bring_up_to_date(batch)
            done += len(batch)
            next_low = self._bounds.low[order_U[done : done + 1]]
            if done >= room and (self._bounds.low[order_U[:done]].kthvalue(room).values <= next_low).all():
                break
        self._set_front(self._in_order(order_U[:done])[:room])

    def _bring_up_to_date(self, index: Tensor) -> None:
        index = index[self._seen_U[index].argsort(stable=True)]
        seen, counts = self._seen_U[index].unique_consecutive(return_counts=True)
        for start, group in zip(seen.tolist(), index.split(counts.tolist()), strict=True):
            for tile in group.split(TILE) if start < self._num_centers else ():
                bounds = self._bounds.rows(tile)
                self._absorb(bounds, self._misses.rows(self._row_U[tile]), start, self._num_centers)
                self._bounds.put(tile, bounds)
        self._seen_U[index] = self._num_centers

    def _in_order(self, index: Tensor) -> Tensor:
        """By (low, index of the next miss)."""
        index = index[self._queues.next_U[index].argsort()]
        return index[self._bounds.low[index].argsort(stable=True)]

    def _set_front(self, index: Tensor) -> None:
        self._front_U, self._front_next, self._front = index, self._queues.next_U[index], self._bounds.rows(index)
        self._front_misses = self._misses.rows(self._row_U[index])
        low_U = self._bounds.low.index_fill(0, index, torch.inf)
        next_U = self._queues.next_U.index_fill(0, index, NOBODY)
        self._rest = float(low_U.amin()), int(next_U.masked_fill(low_U > low_U.amin(), NOBODY).amin())

    def _settle(self, place: int, at_once: int) -> None:
        """Makes exact the closeness of the one in front at `place`, and of up to so many who may be as little close."""
        low_T = self._front.low.masked_fill(self._front.low == self._front.high, torch.inf)
        low_T[place] = -torch.inf
        limit = min(at_once, len(low_T), 1 + COMPARED // self._num_centers)
        low, places = low_T.topk(limit, largest=False)
        places = places[low <= self._front.high[place]]
        exact_T = torch.full_like(low_T, -torch.inf)
        for centers, misses in self._nearest(places):
            similar_Q = self._kernel.pairs(self._centers, self._front_misses, centers, misses).float()
            exact_T.scatter_reduce_(0, misses, similar_Q, "amax")
        self._front.low[places] = self._front.high[places] = exact_T[places]

    def _nearest(self, places: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (center, place in front) (Q,) twice, of which the most similar decide the closeness at `places`."""
        center = self._front.center[places]
        known, unknown = center != NONE, places[center == NONE]
        if known.any():
            yield center[known], places[known]
        if len(unknown):
            centers = self._centers.rows(slice(self._num_centers))
            similar_Bn = self._kernel.block(self._front_misses.rows(unknown), centers)
            at, near = (similar_Bn + self._error >= self._front.low[unknown, None]).nonzero(as_tuple=True)
            yield near, unknown[at]


class _Bounds:
    """What is known of the closeness of n misses.

    It lies between `low` and `high` (n,) float32, and is known where they are equal. `center` (n,) int64 is the number
    of the closest center where only one can be the closest, else `NONE`.
    """

    def __init__(self, low: Tensor, high: Tensor, center: Tensor):
        self.low, self.high, self.center = low, high, center

    @classmethod
    def without_centers(cls, n: int, device: torch.device) -> "_Bounds":
        """Closeness -inf, and known."""
        low = torch.full((n,), -torch.inf, device=device)
        return cls(low, low.clone(), torch.full((n,), NONE, device=device))

    def rows(self, index: Tensor) -> "_Bounds":
        """A copy of some misses' bounds."""
        return _Bounds(self.low[index], self.high[index], self.center[index])

    def put(self, index: Tensor, other: "_Bounds") -> None:
        """Writes such a copy back."""
        self.low[index], self.high[index], self.center[index] = other.low, other.high, other.center

    def absorb(self, similar_nB: Tensor, first: int, error: float) -> None:
        """Takes in the similarities to centers `first`, `first` + 1, ..., each off by at most `error`."""
        if len(similar_nB) == 1:
            best_B, center_B = similar_nB[0], torch.full_like(self.center, first)
        else:
            two_B2, center_B2 = similar_nB.T.contiguous().topk(2, dim=1)
            best_B, tied_B = two_B2[:, 0], two_B2[:, 1] + error >= two_B2[:, 0] - error
            center_B = (center_B2[:, 0] + first).masked_fill_(tied_B, NONE)
        low_B, high_B = best_B - error, best_B + error
        keep_B = self.center.masked_fill(high_B >= self.low, NONE)
        self.center = torch.where(low_B > self.high, center_B, keep_B)
        self.low, self.high = torch.maximum(self.low, low_B), torch.maximum(self.high, high_B)


class _Queues:
    """The misses of each distinct one, who wait to be chosen in the order of their index.

    `next_U` int64 is the index of the next, `NOBODY` where all are chosen.
    """

    def __init__(self, first_M: Tensor):
        first_U, group_M, counts = first_M.unique(return_inverse=True, return_counts=True)
        self.next_U, self._group_M = first_U, group_M
        self._waiting = group_M.argsort(stable=True).cpu()
        self._end_U = counts.cumsum(0).cpu()
        self._begin_U = self._end_U - counts.cpu()
        self._turn_U = self._begin_U.clone()

    def to_head(self, miss: int) -> int:
        """Lets a miss go before its equals; returns the number of its queue."""
        u = int(self._group_M[miss])
        queue = self._waiting[self._begin_U[u] : self._end_U[u]]
        queue.copy_(torch.cat([queue[queue == miss], queue[queue != miss]]))
        return u

    def take(self, u: int) -> tuple[int, bool]:
        """The next miss of a queue, and whether it is the first taken of it."""
        turn = int(self._turn_U[u])
        self._turn_U[u] = turn + 1
        self.next_U[u] = self._waiting[turn + 1] if turn + 1 < self._end_U[u] else NOBODY
        return int(self._waiting[turn]), turn == int(self._begin_U[u])


def _first_equals(kernel: Kernel, misses: Descriptors) -> Tensor:
    """Of each miss the index (M,) of the first that is the same to the kernel.

    Where different misses share a hash by chance, equal ones may count as different, which costs time alone.
    """
    index_M = torch.arange(len(misses.z), device=misses.z.device)
    chunks = max(1, HASHED // sum(x.shape[1] for x in misses))
    hash_M = torch.cat([_hashes(_looks(kernel, misses.rows(c))) for c in index_M.split(chunks)])
    group_M = hash_M.unique(return_inverse=True)[1]
    first_M = index_M.clone().scatter_reduce_(0, group_M, index_M, "amin", include_self=False)[group_M]
    for c in _where(first_M != index_M).split(chunks):
        same = (_looks(kernel, misses.rows(c)) == _looks(kernel, misses.rows(first_M[c]))).all(1)
        first_M[c] = torch.where(same, first_M[c], c)
    return first_M


def _hashes(x_BL: Tensor) -> Tensor:
    """A hash (B,) int64 of the bits of each row of float32: their sum with odd multipliers, modulo 2^64."""
    generator = torch.Generator().manual_seed(0)
    odd_L = torch.randint(-(1 << 62), 1 << 62, x_BL.shape[1:], generator=generator) * 2 + 1
    return (x_BL.view(torch.int32) * odd_L.to(x_BL.device)).sum(1)


def _looks(kernel: Kernel, misses: Descriptors) -> Tensor:
    """What the kernel sees of misses (B, 2 L): of a product nothing where one factor is a zero vector. No -0."""
    z_BL, g_BL = misses
    if kernel.name == "pfk":
        z_BL, g_BL = z_BL.clone(), g_BL.clone()
        for span in kernel.spans:
            blind_B1 = ~(z_BL[:, span].any(1, keepdim=True) & g_BL[:, span].any(1, keepdim=True))
            z_BL[:, span].masked_fill_(blind_B1, 0.0)
            g_BL[:, span].masked_fill_(blind_B1, 0.0)
    return torch.cat([z_BL, g_BL], dim=1) + 0.0


def _where(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1)
