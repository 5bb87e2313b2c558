"""The same mathematics in float64 loops over plain lists, slow and to be checked by eye: the oracle of the tests.

Vectors are lists of floats; a descriptor is a list of L numbers, its scales the slices that `lengths` cut.
"""

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Vector = Sequence[float]


def spatial_mean(t: Tensor) -> list[list[float]]:
    """phi of section 4.1: of each image and channel, the mean over all places. (N, C, H, W), (N, T, C) or (N, C)."""
    t = t.double()
    if t.ndim == 3:
        t = t.transpose(1, 2)
    return [[sum(c.flatten().tolist()) / c.numel() for c in image] for image in t]


def fisher_scores(net: nn.Module, names: Sequence[str], images: Tensor, labels: Tensor) -> list[list[float]]:
    """Section 4.2: dL/d(tap output), averaged over places; one image at a time, autograd through the whole network."""
    net = copy.deepcopy(net).double().eval().requires_grad_(True)
    outputs: dict[str, Tensor] = {}

    def record(name: str):
        def hook(_module, _inputs, out):
            outputs[name] = out.clone()
            return outputs[name].clone()

        return hook

    for name in names:
        net.get_submodule(name).register_forward_hook(record(name))
    scores = []
    for image, label in zip(images.double(), labels, strict=True):
        label = label.double() if label.is_floating_point() else label
        loss = F.cross_entropy(net(image[None]), label[None])
        grads = torch.autograd.grad(loss, [outputs[name] for name in names])
        scores.append([value for grad in grads for value in spatial_mean(grad)[0]])
    return scores


def standardise(x: Vector, lengths: Sequence[int]) -> list[float]:
    """Each scale minus its mean, at unit length; zeros where it is constant to rounding, or not finite."""
    result: list[float] = []
    for part in split(x, lengths):
        result += _standardise_scale(part)
    return result


def _standardise_scale(part: Vector) -> list[float]:
    most = max(abs(value) for value in part)
    if not all(map(math.isfinite, part)) or max(part) - min(part) <= 4 * 2.0**-23 * most:
        return [0.0] * len(part)
    part = [value / most for value in part]
    mean = math.fsum(part) / len(part)
    length = math.sqrt(math.fsum((value - mean) ** 2 for value in part))
    return [(value - mean) / length for value in part]


def split(x: Vector, lengths: Sequence[int]) -> list[Vector]:
    """The scales of a descriptor."""
    parts, start = [], 0
    for length in lengths:
        parts.append(x[start : start + length])
        start += length
    return parts


def weight(length: int, kind: str) -> float:
    """w_j of a scale of this length."""
    return {"length": length - 1, "length-squared": (length - 1) ** 2, "equal": 1}[kind]


def score(name: str, lengths: Sequence[int], kind: str, z1: Vector, g1: Vector, z2: Vector, g2: Vector) -> float:
    """The kernel between two images, standardised features z1, z2 and Fisher scores g1, g2 (eq. 6, 11, 12)."""
    total = 0.0
    for j, length in enumerate(lengths):
        rz = sum(a * b for a, b in zip(split(z1, lengths)[j], split(z2, lengths)[j], strict=True))
        rg = sum(a * b for a, b in zip(split(g1, lengths)[j], split(g2, lengths)[j], strict=True))
        total += weight(length, kind) * {"pcc": rz, "pfk": rz * rg, "pfk-sum": rz + rg}[name]
    return total


def scores(name: str, lengths: Sequence[int], kind: str, centers, pool) -> list[list[float]]:
    """The kernel between every center and every pool image; each is a pair (z, g) of lists of vectors."""
    return [[score(name, lengths, kind, z1, g1, z2, g2) for z2, g2 in zip(*pool)] for z1, g1 in zip(*centers)]  # noqa: B905


def top_k(row: Vector, keys: Sequence[int], k: int) -> list[tuple[float, int]]:
    """A center's best (score rounded to float32, key) by (score descending, key ascending); NaN is dropped."""
    entries = [(_float32(value), key) for value, key in zip(row, keys, strict=True) if not math.isnan(value)]
    return sorted(entries, key=lambda entry: (-entry[0], entry[1]))[:k]


def neighbour(row: Vector) -> int:
    """The index of the largest score, of equals the first."""
    return top_k(row, range(len(row)), 1)[0][1]


def greedy_k_center(similar: Sequence[Vector], p: int, first: int) -> list[int]:
    """From `first`, always the one whose largest similarity to those chosen is smallest (M x M matrix, section 4.4)."""
    if p >= len(similar):
        return list(range(len(similar)))
    chosen = [first]
    while len(chosen) < p:
        rest = [i for i in range(len(similar)) if i not in chosen]
        chosen.append(min(rest, key=lambda i: (max(_float32(similar[c][i]) for c in chosen), i)))
    return chosen[:p]


def rank_by_rank(scores: Sequence[Vector], keys: Sequence[Sequence[int]], p: int) -> list[tuple[int, int, int, float]]:
    """(key, center, rank, score) of each pick: all bests in order of score, all second bests, ..., each key once."""
    picks: list[tuple[int, int, int, float]] = []
    for rank in range(len(keys[0]) if keys else 0):
        offers = [(-scores[c][rank], keys[c][rank], c) for c in range(len(keys)) if keys[c][rank] != -1]
        for minus_score, key, center in sorted(offers):
            if len(picks) < p and key not in [pick[0] for pick in picks]:
                picks.append((key, center, rank, -minus_score))
    return picks


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).float().item()
