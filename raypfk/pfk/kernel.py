"""Match kernels between centers and pool images (equations 6, 11 and 12), in blocks and, exactly, in pairs.

Shapes: M centers, B pool images, L = sum of L_j descriptor length, Q pairs.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raypfk.pfk import fused, loops
from raypfk.pfk.descriptors import check_lengths
from raypfk.pfk.loops import MAX_LENGTH
from raypfk.pfk.sums import fold_

KernelName = Literal["pcc", "pfk", "pfk-sum"]
WeightKind = Literal["length", "length-squared", "equal"]

PAIR_NUMBERS = {"cpu": 1 << 19, "cuda": 1 << 25}  # numbers of one chunk of pairs: cache on a CPU, launches on a GPU
LENGTH_SLACK = 1.01  # > MAX_LENGTH ** 4: at most four vectors enter a score


class Descriptors(NamedTuple):
    """Standardised descriptors of N images: features and Fisher scores, each (N, L). For `pcc` alone, g may be z."""

    z: Tensor
    g: Tensor

    def rows(self, index: slice | Tensor) -> "Descriptors":
        """The descriptors of some images: a slice, int64 indices or a mask."""
        return Descriptors(self.z[index], self.g[index])

    def to(self, target: torch.dtype | torch.device | str) -> "Descriptors":
        """The same numbers in another dtype or on another device, as in `Tensor.to`."""
        z = self.z.to(target)
        return Descriptors(z, z if self.g is self.z else self.g.to(target))


def scale_weights(lengths: Sequence[int], kind: WeightKind = "length") -> tuple[float, ...]:
    """w_j of each scale: `length` L_j - 1 (vectors of unit variance), `length-squared` (L_j - 1)^2, or `equal` 1.

    Raises ValueError for another kind or a length below 1.
    """
    check_lengths(lengths)
    power = {"length": 1, "length-squared": 2, "equal": 0}
    if kind not in power:
        raise ValueError(f"expected scale weights {', '.join(power)}, got {kind!r}")
    return tuple(float((length - 1) ** power[kind]) for length in lengths)


@dataclass(frozen=True)
class Kernel:
    """A match kernel. rz_j and rg_j are the correlations of features and of Fisher scores in scale j:

    `pcc` sum_j w_j rz_j (eq. 6); `pfk` sum_j w_j rz_j rg_j (eq. 11, 12); `pfk-sum` sum_j w_j (rz_j + rg_j), what the
    authors' program computes. `lengths` are the L_j. `weight` is a kind, or the w_j themselves (of descriptors that
    were projected: theirs before). Raises ValueError for an unknown name or weight kind, or w_j that do not fit.
    """

    name: KernelName
    lengths: tuple[int, ...]
    weight: WeightKind | tuple[float, ...] = "length"

    def __post_init__(self):
        if self.name not in ("pcc", "pfk", "pfk-sum"):
            raise ValueError(f"expected kernel pcc, pfk or pfk-sum, got {self.name!r}")
        object.__setattr__(self, "lengths", tuple(self.lengths))
        self.weights  # noqa: B018 - checks lengths and weight kind

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """w_j of each scale."""
        if isinstance(self.weight, str):
            return scale_weights(self.lengths, self.weight)
        check_lengths(self.lengths)
        if len(self.weight) != len(self.lengths) or not all(w == 0 or 1e-12 <= w <= 1e12 for w in self.weight):
            raise ValueError(f"expected {len(self.lengths)} weights, each 0 or 1e-12 to 1e12, got {self.weight}")
        return tuple(map(float, self.weight))

    @cached_property
    def spans(self) -> list[slice]:
        """The columns of each scale."""
        ends = [sum(self.lengths[: j + 1]) for j in range(len(self.lengths))]
        return [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]

    @cached_property
    def used_scales(self) -> list[tuple[slice, float]]:
        """Columns and weight of the scales that count (a single number has weight 0 by `length`), at least one."""
        scales = list(zip(self.spans, self.weights, strict=True))
        return [(span, w) for span, w in scales if w] or scales[:1]

    def scale_lengths(self, part: Descriptors) -> Tensor:
        """(T, N) float32 the length of each vector in every scale, whatever its weight; NaN where it holds one."""
        return torch.cat([scale_lengths(x, self.spans) for x in (part if self.name != "pcc" else part[:1])])

    def block(self, centers: Descriptors, pool: Descriptors) -> Tensor:
        """Scores (M, B) of all pairs in the dtype of the descriptors; in float32 within `error_bound` of the exact."""
        w_L = torch.cat([centers.z.new_full((n,), w) for n, w in zip(self.lengths, self.weights, strict=True)])
        with torch.autocast(centers.z.device.type, enabled=False):  # half precision would break the bound
            if self.name == "pfk":
                return self._product_block(centers.z, centers.g * w_L, pool)
            scores_MB = (centers.z * w_L) @ pool.z.T
            return scores_MB.addmm_(centers.g * w_L, pool.g.T) if self.name == "pfk-sum" else scores_MB

    def _product_block(self, z_ML: Tensor, wg_ML: Tensor, pool: Descriptors) -> Tensor:
        scores_MB = z_ML.new_zeros(len(z_ML), len(pool.z))
        rz_MB, rg_MB = torch.empty_like(scores_MB), torch.empty_like(scores_MB)
        for span in self.spans:
            torch.mm(z_ML[:, span], pool.z[:, span].T, out=rz_MB)
            torch.mm(wg_ML[:, span], pool.g[:, span].T, out=rg_MB)
            scores_MB.addcmul_(rz_MB, rg_MB)
        return scores_MB

    def exact_block(self, centers: Descriptors, pool: Descriptors, factor_B: Tensor | None = None) -> Tensor:
        """Scores (M, B) of all pairs as `exact_pairs` gives them, for many pairs much faster.

        Products in float64 are exact to far less than the spacing of float32; where the rounding could still go either
        way, `pairs` decides.
        """
        scores_MB, bound = self.block(centers.to(torch.float64), pool.to(torch.float64)), 2 * self._bound(2.0**-53)
        scores_MB = scores_MB if factor_B is None else scores_MB * factor_B
        doubt_MB = (scores_MB - bound).float() != (scores_MB + bound).float()
        doubt_MB &= ~(self._scores_zero(centers)[:, None] | self._scores_zero(pool))
        rows, cols = doubt_MB.nonzero(as_tuple=True)
        scores_MB = scores_MB.float()
        if len(rows):
            decided = self.pairs(centers, pool, rows, cols)
            scores_MB[rows, cols] = (decided if factor_B is None else decided * factor_B[cols]).float()
        return scores_MB

    def _scores_zero(self, part: Descriptors) -> Tensor:
        """Mask (N,) of those that score 0 with everyone, without any rounding."""
        z_N, g_N = ((x == 0).all(1) for x in part)
        return {"pcc": z_N, "pfk": z_N | g_N, "pfk-sum": z_N & g_N}[self.name]

    def pairs(self, centers: Descriptors, pool: Descriptors, rows: Tensor, cols: Tensor) -> Tensor:
        """Scores (Q,) float64 of the pairs (centers[rows[q]], pool[cols[q]]); `rows`, `cols` (Q,) int64.

        The order of every sum is fixed, so a pair's score is the same to the last bit whatever else is asked for with
        it. Works in chunks: memory O(Q), not O(Q L).
        """
        size = max(1, PAIR_NUMBERS.get(rows.device.type, 1 << 22) // sum(self.lengths))
        chunks = zip(rows.split(size), cols.split(size), strict=True)
        return torch.cat([self._pair_chunk(centers, pool, r, c) for r, c in chunks])

    def exact_pairs(
        self, centers: Descriptors, pool: Descriptors, rows: Tensor, cols: Tensor, factor_Q: Tensor | None = None
    ) -> Tensor:
        """`pairs`, times `factor_Q` (Q,) float64 in 0..1 if given, rounded to float32: to the bit, but faster.

        Sums in any order are exact to far less than the spacing of float32; where the rounding could still go either
        way, `pairs` decides.
        """
        factor_Q = 1.0 if factor_Q is None else factor_Q
        scores_Q, bound = self._pair_scores(centers, pool, rows, cols) * factor_Q, 2 * self._bound(2.0**-53)
        doubt = ((scores_Q - bound).float() != (scores_Q + bound).float()).nonzero().squeeze(1)
        scores_Q = scores_Q.float()
        if len(doubt):
            factor = factor_Q if isinstance(factor_Q, float) else factor_Q[doubt]
            scores_Q[doubt] = (self.pairs(centers, pool, rows[doubt], cols[doubt]) * factor).float()
        return scores_Q

    def _pair_scores(self, centers: Descriptors, pool: Descriptors, rows: Tensor, cols: Tensor) -> Tensor:
        """Scores (Q,) float64 of distinct pairs, summed in any order."""
        on_cpu, fast = rows.device.type == "cpu", fused.available(rows.device)
        sampled = _sampled_on_cpu if on_cpu else fused.pair_products if fast else _sampled
        rz_SQ = sampled(centers.z, pool.z, self.spans, rows, cols)
        if self.name != "pcc":
            rg_SQ = sampled(centers.g, pool.g, self.spans, rows, cols)
            rz_SQ = rz_SQ * rg_SQ if self.name == "pfk" else rz_SQ + rg_SQ
        return rz_SQ.new_tensor(self.weights) @ rz_SQ

    def _pair_chunk(self, centers: Descriptors, pool: Descriptors, rows: Tensor, cols: Tensor) -> Tensor:
        rz_Qj = self._correlations(centers.z, pool.z, rows, cols)
        rg_Qj = self._correlations(centers.g, pool.g, rows, cols) if self.name != "pcc" else [0.0] * len(rz_Qj)
        terms = [
            w * (rz * rg if self.name == "pfk" else rz + rg)
            for w, rz, rg in zip(self.weights, rz_Qj, rg_Qj, strict=True)
        ]
        return sum(terms[1:], start=terms[0])

    def _correlations(self, a_ML: Tensor, b_BL: Tensor, rows: Tensor, cols: Tensor) -> list[Tensor]:
        products_QL = a_ML.index_select(0, rows).double().mul_(b_BL.index_select(0, cols))
        return [fold_(products_QL[:, span], 1) for span in self.spans]

    def error_bound(self) -> float:
        """A bound on |float32 `block` - exact score, rounded to float32| for standardised descriptors.

        A dot product of n terms, summed in any order, is off by at most gamma_n = n u / (1 - n u), u = 2^-24, times the
        sum of the terms' sizes (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1), and each
        further product or sum raises n by one (lemma 3.3). The sum of sizes is at most W = sum of w_j (Cauchy-Schwarz;
        twice that for pfk-sum), times `LENGTH_SLACK` as stored vectors are of unit length only to rounding. n also
        counts the rounding of w_j, of a factor and of the exact score, and a threshold's subtraction. Where torch may
        round the inputs of matrix products (to TF32, or to bfloat16), the bound is wide enough for that.
        Raises ValueError where the descriptors are too long for float32 to say anything.
        """
        inputs = 4 * 2.0**-8 * 1.05 if products_may_round_inputs() else 0.0
        return self._bound(2.0**-24, inputs)

    def _bound(self, unit: float, inputs: float = 0.0) -> float:
        total, scales = sum(self.lengths), len(self.lengths)
        terms = {"pcc": total, "pfk": 2 * max(self.lengths) + scales, "pfk-sum": 2 * total}
        nu = (terms[self.name] + 12) * unit
        if nu >= 0.5:
            raise ValueError(f"descriptors of {total} numbers are too long for a float32 kernel")
        size = sum(self.weights) * (2 if self.name == "pfk-sum" else 1) * LENGTH_SLACK
        return size * (nu / (1 - nu) + inputs * (1 + nu / (1 - nu))) + terms[self.name] * 2.0**-120


def products_may_round_inputs() -> bool:
    """Whether torch may multiply float32 matrices in TF32 or bfloat16."""
    settings = (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
    return any(setting not in ("none", "ieee") for setting in settings)


def check_standardised(name: str, lengths_TN: Tensor) -> Tensor:
    """Mask (N,) of those without a NaN; ValueError where one of their lengths is more than 1, or infinite."""
    if (lengths_TN > MAX_LENGTH).any():
        raise ValueError(f"{name}: expected standardised descriptors, got a scale longer than 1")
    return ~lengths_TN.isnan().any(0)


def scale_lengths(x_NL: Tensor, spans: list[slice]) -> Tensor:
    """(S, N) float32 the length of each scale of each vector; NaN where it holds one."""
    if x_NL.device.type != "cpu":
        return torch.stack([x_NL[:, span].norm(dim=1) for span in spans])
    lengths_SN = x_NL.new_empty(len(spans), len(x_NL))
    for span, lengths_N in zip(spans, lengths_SN, strict=True):
        loops.lengths(x_NL.contiguous().numpy(), span.start, span.stop, lengths_N.numpy())
    return lengths_SN


def _sampled_on_cpu(a_ML: Tensor, b_BL: Tensor, spans: list[slice], rows: Tensor, cols: Tensor) -> Tensor:
    """(S, Q) float64: the products of each scale of a[rows[q]] and b[cols[q]]."""
    out_SQ = a_ML.new_empty(len(spans), len(rows), dtype=torch.float64)
    a, b = a_ML.contiguous().numpy(), b_BL.contiguous().numpy()
    starts = np.array([*(span.start for span in spans), spans[-1].stop])
    loops.pair_products(a, b, starts, rows.numpy(), cols.numpy(), out_SQ.numpy())
    return out_SQ


def _sampled(a_ML: Tensor, b_BL: Tensor, spans: list[slice], rows: Tensor, cols: Tensor) -> Tensor:
    """As `_sampled_on_cpu`, on any device, without a copy of any row for each of its pairs."""
    order = cols.argsort(stable=True)
    hit, place = cols[order].unique_consecutive(return_inverse=True)
    starts = torch.zeros(len(hit) + 1, dtype=torch.int64, device=rows.device)
    starts[1:] = torch.bincount(place, minlength=len(hit)).cumsum(0)
    out_SQ = a_ML.new_empty(len(spans), len(rows), dtype=torch.float64)
    for out_Q, span in zip(out_SQ, spans, strict=True):
        a_Ml, b_Hl = a_ML[:, span].double(), b_BL[:, span].index_select(0, hit).double()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
            shape, zeros_Q = (len(hit), len(a_Ml)), b_Hl.new_zeros(len(rows))
            wanted = torch.sparse_csr_tensor(starts, rows[order], zeros_Q, shape, check_invariants=False)
            out_Q[order] = torch.sparse.sampled_addmm(wanted, b_Hl, a_Ml.T, beta=0.0).values()
    return out_SQ
