"""Images chosen one after another from a pool in parts: core-set, BADGE and facility location, greedily.

A part holds the vectors of some images. In each step every part proposes its best image, whoever drives them takes the
best proposal of all, and every part absorbs the vector of that image: `choose` says it in a loop.

The choice is that of one part that holds the whole pool, to the last bit. Sums in any order are exact to far less than
what a number is rounded to before it is compared; where the rounding could still go either way, sums in fixed order
decide. And what an image is worth only falls with what is absorbed, so that a value from before bounds today's: only
the largest are brought up to date (lazy greedy: Minoux, Accelerated greedy algorithms for maximizing submodular set
functions, 1978).

Shapes: N images of a part, R some of them, S in doubt, B chosen images, Q queries, E pairs, L numbers of a vector; of
the last layer D classes and H inputs.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from raypfk.pfk.draws import uniform
from raypfk.pfk.sums import fold_

AT_ONCE, GROWTH = 64, 8  # images brought up to date before it is asked whether more must be, and how many more then
TILE = 1024  # images, or chosen ones, of one block
SIMILARITIES = 1 << 20  # of one block of images and all queries
NUMBERS = 1 << 19  # multiplied and summed at once in fixed order
STEPS = 2**24  # similarities are whole multiples of 1 / STEPS
LEAST_SQUARE = 1e-300  # no square of a distance between float32 gradients is as small, but 0


class Features(NamedTuple):
    """Features of N images as vectors."""

    z: Tensor
    """(N, L) floating."""

    def rows(self, index: slice | Tensor) -> "Features":
        """The vectors of some images: a slice, int64 indices or a mask."""
        return Features(self.z[index])


class LastLayer(NamedTuple):
    """Gradients of the cross-entropy of N images with respect to the last layer's weights, as vectors.

    Each is the outer product of the two, D H numbers, which are never written out: <a, b> is the product of the two
    factors' inner products.
    """

    slope: Tensor
    """(N, D) floating, d loss / d logits: `descriptors.logit_slope`."""
    hidden: Tensor
    """(N, H) floating, the last layer's input."""

    def rows(self, index: slice | Tensor) -> "LastLayer":
        """The vectors of some images: a slice, int64 indices or a mask."""
        return LastLayer(self.slope[index], self.hidden[index])

    def with_bias(self) -> "LastLayer":
        """The same, and the gradients with respect to the layer's bias."""
        return LastLayer(self.slope, torch.cat([self.hidden, torch.ones_like(self.hidden[:, :1])], dim=1))


Vectors = Features | LastLayer


class Proposal(NamedTuple):
    """What a part would choose next."""

    value: float
    """What it is worth, as the part's class says; -inf for an image whose vector is not finite."""
    key: int
    """The image."""
    vector: Vectors
    """Its vector, of one row, float32: what every part must absorb when it is chosen."""


def best(proposals: Iterable[Proposal | None]) -> Proposal | None:
    """The first by (value descending, key ascending) of those that are there; None where none is."""
    return min((p for p in proposals if p is not None), key=lambda p: (-p.value, p.key), default=None)


def choose(parts: Sequence["Part"], p: int) -> list[Proposal]:
    """The next p images of a pool in parts, in order of choice; fewer only when the pool is exhausted.

    Raises ValueError for p < 0.
    """
    if p < 0:
        raise ValueError(f"expected p >= 0 images, got {p}")
    chosen: list[Proposal] = []
    while len(chosen) < p and (proposal := best(part.propose() for part in parts)):
        for part in parts:
            part.take(proposal.key)
            part.absorb(proposal.vector)
        chosen.append(proposal)
    return chosen


class Part(ABC):
    """Some images of the pool, by their `keys` (N,) int64, distinct in the whole pool, and their `vectors`.

    Vectors are taken as float32. An image whose vector is not finite is proposed after all others, in order of keys.
    Raises ValueError for vectors, keys or salts whose shapes or dtypes do not fit.
    """

    def __init__(self, vectors: Vectors, keys: Tensor):
        self._pool = _measure(vectors)
        self._keys_N = _check_integers("keys", keys, len(self._pool))
        self._sound_N = self._pool.square.isfinite()
        self._open_N = torch.ones_like(self._sound_N)
        self._seen_N = torch.zeros_like(self._keys_N)  # how many of those absorbed its value takes in
        self._absorbed = 0

    def propose(self) -> Proposal | None:
        """The best of its images by (value descending, key ascending); None where all are taken."""
        if not self._open_N.any():
            return None
        values_N = self._settled()
        rows = (self._open_N & (values_N == values_N[self._open_N].amax())).nonzero().squeeze(1)
        row = rows[self._keys_N[rows].argmin()]
        return Proposal(float(values_N[row]), int(self._keys_N[row]), self._pool.rows(row[None]).vectors)

    def take(self, key: int) -> None:
        """Proposes this image no more, if it is one of its own."""
        self._open_N &= self._keys_N != key

    def absorb(self, chosen: Vectors) -> None:
        """Takes in the vectors of chosen images, of whatever part, one or many at a time; each image once.

        All parts must absorb the same. A vector that is not finite changes nothing. Raises ValueError for vectors of
        another kind or length.
        """
        finite = self._finite(chosen)
        if len(finite):
            self._take_in(finite)
            self._absorbed += len(finite)

    def _finite(self, vectors: Vectors) -> "_Measured":
        """Those that are finite, on the pool's device."""
        own, widths = self._pool.vectors, [x.shape[1:] for x in self._pool.vectors]
        if type(vectors) is not type(own) or [x.shape[1:] for x in vectors] != widths:
            got = f"{type(vectors).__name__} {[tuple(x.shape) for x in vectors]}"
            raise ValueError(f"expected {type(own).__name__} of {[*map(tuple, widths)]} numbers, got {got}")
        measured = _measure(type(own)(*(x.to(own[0].device) for x in vectors)))
        return measured.rows(measured.square.isfinite())

    def _settled(self) -> Tensor:
        """Values (N,) float64: the largest of the open images, and all that equal it; a bound on each of the others."""
        live_N, at_once = self._open_N & self._sound_N, AT_ONCE
        values_N = self._values(slice(None)).masked_fill(~self._sound_N, -torch.inf)
        while True:
            known_N = live_N & (self._seen_N == self._absorbed)
            reached = values_N.masked_fill(~known_N, -torch.inf).amax()
            rows = (live_N & ~known_N & (values_N >= reached)).nonzero().squeeze(1)
            if not len(rows):
                return values_N
            rows = rows[values_N[rows].topk(min(at_once, len(rows))).indices]
            self._bring_up_to_date(rows)
            self._seen_N[rows] = self._absorbed
            values_N[rows] = self._values(rows)
            at_once *= GROWTH

    @abstractmethod
    def _take_in(self, chosen: "_Measured") -> None:
        """Notes what is chosen."""

    @abstractmethod
    def _values(self, rows: slice | Tensor) -> Tensor:
        """Values (R,) float64 by what these images have seen."""

    @abstractmethod
    def _bring_up_to_date(self, rows: Tensor) -> None:
        """Lets these images see all that is absorbed."""


class _Nearest(Part):
    """Knows the square of the distance between each image and the nearest of those absorbed that it has seen.

    Squares are |a|^2 + |b|^2 - 2 <a, b> in float64, rounded to the 24 bits of a float32 though not to its range: what
    this cancels is less than what the rounding to float32 vectors cost. Between equal vectors they are exactly 0.
    `salts` (N,) int64: a number of each image's own, such as a hash of its id and a seed.
    """

    def __init__(self, vectors: Vectors, keys: Tensor, salts: Tensor):
        super().__init__(vectors, keys)
        self._salts_N = _check_integers("salts", salts, len(keys))
        self._square_N = torch.full_like(self._pool.square, torch.inf)
        self._blocks: list[_Measured] = []  # all absorbed, in order: TILE in each block but the last

    def _take_in(self, chosen: "_Measured") -> None:
        chosen = _joined(self._blocks.pop(), chosen) if self._blocks else chosen
        self._blocks += [chosen.rows(slice(i, i + TILE)) for i in range(0, len(chosen), TILE)]

    def _bring_up_to_date(self, rows: Tensor) -> None:
        for tile in rows[self._seen_N[rows].argsort()].split(TILE):
            first, skip = divmod(int(self._seen_N[tile[0]]), TILE)
            images, square_R = self._pool.rows(tile), self._square_N[tile]
            for block in self._blocks[first:]:
                square_R = _nearest(images, block.rows(slice(skip, None)), square_R)
                skip = 0
            self._square_N[tile] = square_R


class FarthestFirst(_Nearest):
    """Core-set by greedy k-center: next is the image that is farthest from all that is absorbed.

    Sener and Savarese, Active learning for convolutional neural networks: a core-set approach, ICLR 2018, Algorithm 1.
    Absorb the labelled images first. A proposal's value is the square of its Euclidean distance to the nearest of those
    absorbed; while nothing is, the image's own random number in (0, 1).
    """

    def _values(self, rows: slice | Tensor) -> Tensor:
        return self._square_N[rows] if self._absorbed else uniform(self._salts_N[rows], 0)


class KMeansPlusPlus(_Nearest):
    """BADGE: next is an image drawn with a probability proportional to the square of its distance to all absorbed.

    Ash et al., Deep batch active learning by diverse, uncertain gradient lower bounds, ICLR 2020, with the seeding of
    Arthur and Vassilvitskii, k-means++, SODA 2007. Vectors are the `LastLayer` of the predicted classes. The first, as
    in the authors' program, is the longest; a proposal's value is then the square of its length.

    Later draws are a race: -log(u) / d^2 is the time of an image with the random number u and the squared distance d^2,
    and the first to arrive is each with a probability proportional to d^2, whoever looks. A value is a time's negative.
    Images at distance 0 come after all others, by u alone. u is number n of those of the image's salt (`uniform`), n
    the number of vectors absorbed.
    """

    def _values(self, rows: slice | Tensor) -> Tensor:
        if not self._absorbed:
            return _rounded(self._pool.square[rows])
        return _log(uniform(self._salts_N[rows], self._absorbed)) / self._square_N[rows].clamp(min=LEAST_SQUARE)


class FacilityLocation(Part):
    """Facility location mutual information (FLQMI): images that are like the queries, and together like all of them.

    Next is the image that adds most to: sum over queries i of max over chosen j of s_ij, plus sum over chosen j of max
    over queries i of s_ij. Kothawade et al., SIMILAR, NeurIPS 2021, section 3, after Iyer et al., Submodular
    combinatorial information measures, ALT 2021, with eta = 1. As in the authors' program (DISTIL, `fl2mi`), s is
    (1 + cosine) / 2 of `LastLayer` gradients, that of the bias included, by true labels for queries and predicted ones
    for the pool; 1/2 for a zero vector. Rounded to a multiple of 2^-24, it makes all sums exact. A proposal's value is
    what the image adds.

    `queries`: vectors of the pool's kind, the same in all parts; one that is not finite asks for nothing.
    Raises ValueError where no finite query is left.
    """

    def __init__(self, vectors: Vectors, keys: Tensor, queries: Vectors):
        super().__init__(vectors, keys)
        queries = self._finite(queries)
        if not len(queries):
            raise ValueError("expected one or more queries with finite vectors, got none")
        self._queries = type(vectors)(*(x.double() for x in queries.vectors))  # once, not with every tile
        self._length_Q = _lengths(queries.square)
        self._best_Q = torch.zeros_like(queries.square)
        self._gain_N = torch.full_like(self._pool.square, torch.inf)
        self._seen_N.fill_(-1)
        self._tile = max(1, SIMILARITIES // len(queries))

    def _take_in(self, chosen: "_Measured") -> None:
        for i in range(0, len(chosen), self._tile):
            similar_RQ = self._similar(chosen.rows(slice(i, i + self._tile)))
            self._best_Q = torch.maximum(self._best_Q, similar_RQ.amax(0))

    def _values(self, rows: slice | Tensor) -> Tensor:
        return self._gain_N[rows] / STEPS

    def _bring_up_to_date(self, rows: Tensor) -> None:
        for tile in rows.split(self._tile):
            similar_RQ = self._similar(self._pool.rows(tile))
            self._gain_N[tile] = similar_RQ.amax(1) + similar_RQ.sub_(self._best_Q).clamp_(min=0).sum(1)

    def _similar(self, images: "_Measured") -> Tensor:
        """Similarities (R, Q) float64 with the queries, in steps of 2^-24."""
        length_R = _lengths(images.square)
        steps_RQ = _in_steps(_products(images.vectors, self._queries), length_R[:, None] * self._length_Q)
        similar_RQ = steps_RQ.round()
        doubt = steps_RQ.sub_(similar_RQ).abs_() > 0.5 - _slack(self._queries) * STEPS / 2
        r, q = doubt.nonzero(as_tuple=True)
        if len(r):
            exact_E = _exact_products(images.vectors, self._queries, r, q)
            similar_RQ[r, q] = _in_steps(exact_E, length_R[r] * self._length_Q[q]).round()
        return similar_RQ


@dataclass(frozen=True)
class _Measured:
    """Vectors (float32) and the squares (N,) float64 of their lengths, summed in fixed order."""

    vectors: Vectors
    square: Tensor

    def __len__(self) -> int:
        return len(self.square)

    def rows(self, index: slice | Tensor) -> "_Measured":
        return _Measured(self.vectors.rows(index), self.square[index])


def _measure(vectors: Vectors) -> _Measured:
    shapes = [tuple(x.shape) for x in vectors]
    fit = all(x.ndim == 2 and x.is_floating_point() and x.shape[1] and len(x) == len(vectors[0]) for x in vectors)
    if not fit:
        raise ValueError(f"expected floating vectors (N, L), one or more numbers in each, got {shapes}")
    vectors = type(vectors)(*(x.to(torch.float32) for x in vectors))
    every = torch.arange(len(vectors[0]), device=vectors[0].device)
    return _Measured(vectors, _exact_products(vectors, vectors, every, every))


def _joined(a: _Measured, b: _Measured) -> _Measured:
    vectors = type(a.vectors)(*map(torch.cat, zip(a.vectors, b.vectors, strict=True)))
    return _Measured(vectors, torch.cat([a.square, b.square]))


def _check_integers(name: str, x: Tensor, n: int) -> Tensor:
    if x.shape != (n,) or x.dtype != torch.int64:
        raise ValueError(f"expected {name} ({n},) int64, got {tuple(x.shape)} {x.dtype}")
    return x


def _nearest(images: _Measured, chosen: _Measured, limit_R: Tensor) -> Tensor:
    """Squares (R,) of the distances to the nearest of the chosen; `limit_R` where that is less."""
    rest_RB = _products(images.vectors, chosen.vectors).mul_(-2).add_(chosen.square)
    least_R = rest_RB.amin(1) + images.square
    slack_R = _slack(images.vectors) * (images.square + chosen.square.amax())
    low_R, high_R = (_rounded(x.clamp(min=0)) for x in (least_R - slack_R, least_R + slack_R))
    nearest_R = torch.minimum(low_R, limit_R)
    doubt = ((low_R < high_R) & (low_R < limit_R)).nonzero().squeeze(1)
    if len(doubt):
        reach_S1 = (least_R + 2 * slack_R - images.square)[doubt, None]
        s, b = (rest_RB[doubt] <= reach_S1).nonzero(as_tuple=True)
        r = doubt[s]
        exact_E = images.square[r] + chosen.square[b] - 2 * _exact_products(images.vectors, chosen.vectors, r, b)
        nearest_R[doubt] = limit_R[doubt].scatter_reduce(0, s, _rounded(exact_E.clamp(min=0)), "amin")
    return nearest_R


def _products(a: Vectors, b: Vectors) -> Tensor:
    """Inner products (R, B) float64 of all pairs, summed in any order."""
    return reduce(torch.mul, (x.double() @ y.double().T for x, y in zip(a, b, strict=True)))


def _exact_products(a: Vectors, b: Vectors, rows: Tensor, cols: Tensor) -> Tensor:
    """Inner products (E,) float64 of a[rows[e]] and b[cols[e]], summed in fixed order."""
    size = max(1, NUMBERS // max(x.shape[1] for x in a))
    products = [
        reduce(torch.mul, (fold_(x[r].double().mul_(y[c]), 1) for x, y in zip(a, b, strict=True)))
        for r, c in zip(rows.split(size), cols.split(size), strict=True)
    ]
    return torch.cat(products)


def _slack(vectors: Vectors) -> float:
    """How far sums in any order and in fixed order may lie apart, as a share of |a|^2 + |b|^2, or of 2 |a| |b|.

    Each is off by at most n u / (1 - n u) of the sum of the terms' sizes, n counting terms and roundings, u = 2^-53
    (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1 and lemma 3.3). This is twice that.
    """
    return 4 * (sum(x.shape[1] for x in vectors) + 8) * 2.0**-53


def _rounded(x: Tensor) -> Tensor:
    """float64 to the nearest of 24 bits, by Veltkamp's splitting: a rounding to float32 would lose small numbers."""
    high = x * (2.0**29 + 1)
    return high - (high - x)


def _in_steps(product: Tensor, length: Tensor) -> Tensor:
    return (product / length).add_(1).mul_(STEPS / 2)


def _lengths(square: Tensor) -> Tensor:
    """Square roots, 1 for 0. Not torch's, which are not correctly rounded on every machine."""
    return torch.tensor([math.sqrt(x) or 1.0 for x in square.tolist()], dtype=torch.float64, device=square.device)


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of float64 in (0, 1): sums, products and quotients alone, of which every bit is fixed.

    x = 2^e m with m in [1/2, 1), log m = 2 artanh z with z = (m - 1) / (m + 1), |z| <= 1/3: its series to z^35.
    """
    m, e = torch.frexp(x)
    z = (m - 1) / (m + 1)
    square, series = z * z, torch.full_like(z, 1 / 35)
    for n in range(33, 0, -2):
        series.mul_(square).add_(1 / n)
    return e.double() * math.log(2) + 2 * z * series
