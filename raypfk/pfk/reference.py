"""The same mathematics in float64 loops over plain lists, slow and to be checked by eye: the oracle of the tests.

Vectors are lists of floats; a descriptor is a list of L numbers, its scales the slices that `lengths` cut.
"""

import copy
import math
from collections.abc import Callable, Sequence

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


def grid_means(t: Tensor, side: int) -> list[list[float]]:
    """Of each image (C, H, W) and channel, the means of side x side cells, row by row; of fewer, where H or W is less.

    Cell i of n over H rows has those from floor(i H / n) to before ceil((i + 1) H / n).
    """
    found = []
    for image in t.double():
        rows, columns = (min(side, extent) for extent in image.shape[1:])
        means = []
        for channel in image.tolist():
            for i in range(rows):
                for j in range(columns):
                    top, left = i * len(channel) // rows, j * len(channel[0]) // columns
                    bottom, right = -(-(i + 1) * len(channel) // rows), -(-(j + 1) * len(channel[0]) // columns)
                    cell = [channel[y][x] for y in range(top, bottom) for x in range(left, right)]
                    means.append(sum(cell) / len(cell))
        found.append(means)
    return found


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


def discriminant(z: Vector, train: Sequence[Vector], labels: Sequence[int], num_classes: int, ridge: float) -> Vector:
    """log p(y, z) of each class but for what is alike: Gaussians around the classes' means, all of one covariance, to
    whose variances `ridge` times their mean is added; -inf for a class without an example."""
    size, count = len(z), [labels.count(d) for d in range(num_classes)]
    means = [
        [sum(x[i] for x, y in zip(train, labels, strict=True) if y == d) / max(1, count[d]) for i in range(size)]
        for d in range(num_classes)
    ]
    apart = [[v - means[y][i] for i, v in enumerate(x)] for x, y in zip(train, labels, strict=True)]
    spread = [[sum(x[i] * x[j] for x in apart) / len(train) for j in range(size)] for i in range(size)]
    mean_variance = sum(spread[i][i] for i in range(size)) / size
    for i in range(size):
        spread[i][i] += ridge * mean_variance if mean_variance > 0 else 1.0
    found = []
    for d in range(num_classes):
        away = [v - m for v, m in zip(z, means[d], strict=True)]
        distance = sum(a * b for a, b in zip(away, _solved(spread, away), strict=True))
        found.append(math.log(count[d] / len(train)) - distance / 2 if count[d] else -math.inf)
    return found


def _solved(matrix: Sequence[Vector], right: Vector) -> Vector:
    """x of matrix x = right, by Gauss and Jordan, for a positive definite matrix."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(len(rows)):
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for j in range(len(rows)):
            if j != i:
                rows[j] = [a - rows[j][i] * b for a, b in zip(rows[j], rows[i], strict=True)]
    return [row[-1] for row in rows]


def vote(row: Vector, labels: Sequence[int], k: int) -> list[tuple[int, float]]:
    """(class, share) of the votes of the k largest scores: by votes descending, then by the class's first voter."""
    voters = [labels[index] for _, index in top_k(row, range(len(row)), k)]
    classes = sorted(set(voters), key=lambda label: (-voters.count(label), voters.index(label)))
    return [(label, voters.count(label) / len(voters)) for label in classes]


def mc_trace(z: Sequence[Vector], g: Sequence[Vector]) -> float:
    """tr(C_zg) of K samples of an image's features and one class's Fisher scores (section 4.3 c)."""
    if not _all_finite(z, g):
        return -math.inf
    c_zg = _covariance(_centred(z), _centred(g))
    return sum(c_zg[i][i] for i in range(len(c_zg)))


def mc_information(z: Sequence[Vector], g: Sequence[Vector], ridge: float) -> float:
    """0.5 log(|C_zz| |C_gg| / |C_zg,zg|) of the same, each at a mean variance of 1, ridge added (section 4.3 d)."""
    if not _all_finite(z, g):
        return -math.inf
    z, g = _of_unit_variance(z), _of_unit_variance(g)
    joint = [[*z_k, *g_k] for z_k, g_k in zip(z, g, strict=True)]
    log_zz, log_gg, log_joint = (_log_determinant(_covariance(x, x), ridge) for x in (z, g, joint))
    return 0.5 * (log_zz + log_gg - log_joint)


def _all_finite(*samples: Sequence[Vector]) -> bool:
    return all(math.isfinite(value) for x in samples for x_k in x for value in x_k)


def _centred(x: Sequence[Vector]) -> list[list[float]]:
    """Each channel less its mean over the K samples; zeros where it is constant to rounding."""
    channels = []
    for channel in zip(*x, strict=True):
        constant = max(channel) - min(channel) <= 4 * 2.0**-23 * max(map(abs, channel))
        mean = math.fsum(channel) / len(channel)
        channels.append([0.0 if constant else value - mean for value in channel])
    return [list(x_k) for x_k in zip(*channels, strict=True)]


def _of_unit_variance(x: Sequence[Vector]) -> list[list[float]]:
    x = _centred(x)
    variances = [sum(value**2 for value in channel) / (len(x) - 1) for channel in zip(*x, strict=True)]
    spread = math.sqrt(sum(variances) / len(variances)) or 1.0
    return [[value / spread for value in x_k] for x_k in x]


def _covariance(a: Sequence[Vector], b: Sequence[Vector]) -> list[list[float]]:
    """L x L, between the channels of K centred samples."""
    columns_a, columns_b = list(zip(*a, strict=True)), list(zip(*b, strict=True))
    return [[sum(p * q for p, q in zip(ca, cb, strict=True)) / (len(a) - 1) for cb in columns_b] for ca in columns_a]


def _log_determinant(matrix: list[list[float]], ridge: float) -> float:
    """Of a covariance with the ridge on its diagonal, by Gaussian elimination: the sum of the pivots' logarithms."""
    rows = [[value + ridge * (i == j) for j, value in enumerate(row)] for i, row in enumerate(matrix)]
    total = 0.0
    for i, pivot in enumerate(rows):
        total += math.log(pivot[i])
        for row in rows[i + 1 :]:
            factor = row[i] / pivot[i]
            for j in range(i, len(row)):
                row[j] -= factor * pivot[j]
    return total


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


def uncertainty(name: str, passes: Sequence[Sequence[Vector]]) -> list[float]:
    """The acquisition function of each image, from the logits of T passes, each N lists of D; -inf if not finite."""
    return [_uncertainty(name, rows) for rows in zip(*passes, strict=True)]


def _uncertainty(name: str, rows: Sequence[Vector]) -> float:
    if not all(math.isfinite(value) for row in rows for value in row):
        return -math.inf
    votes = [row.index(max(row)) for row in rows]
    if name == "variation_ratio":
        return 1 - max(votes.count(vote) for vote in votes) / len(votes)
    probabilities = [_softmax(row) for row in rows]
    mean = [math.fsum(column) / len(rows) for column in zip(*probabilities, strict=True)]
    if name == "max_entropy":
        return _entropy(mean)
    if name == "bald":
        return _entropy(mean) - math.fsum(map(_entropy, probabilities)) / len(rows)
    largest, second, *_ = sorted([*mean, 0.0], reverse=True)
    return {"margin": 1 - (largest - second), "least_confidence": 1 - largest}[name]


def _softmax(row: Vector) -> list[float]:
    odds = [math.exp(value - max(row)) for value in row]
    return [value / math.fsum(odds) for value in odds]


def _entropy(probabilities: Vector) -> float:
    return -math.fsum(p * math.log(p) for p in probabilities if p > 0)


def draw(salt: int, number: int) -> float:
    """In (0, 1): the 52 high bits, and a half, of output `number`, from 0, of the SplitMix64 that starts at `salt`."""
    x = (salt + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift)) * factor % 2**64
    return (((x ^ (x >> 31)) >> 12) + 0.5) / 2**52


def outer(slope: Vector, hidden: Vector) -> list[float]:
    """The gradient of one image's cross-entropy with respect to the last layer's weights."""
    return [s * h for s in slope for h in hidden]


def greedy(pool: Sequence[Vector], keys: Sequence[int], p: int, value: Callable[[int, list[int]], object]) -> list[int]:
    """Of those left always the one of the largest `value(n, chosen so far)`, of equals the smallest key.

    Vectors that are not finite come last, by key, and do not count as chosen.
    """
    finite = [all(map(math.isfinite, vector)) for vector in pool]
    chosen: list[int] = []
    while len(chosen) < min(p, len(pool)):
        rest = [n for n in range(len(pool)) if n not in chosen]
        worth = {n: value(n, [c for c in chosen if finite[c]]) for n in rest if finite[n]}
        chosen.append(max(worth or rest, key=lambda n, worth=worth: (worth.get(n, 0), -keys[n])))
    return [keys[n] for n in chosen]


def farthest_first(pool: Sequence[Vector], keys, salts, labelled: Sequence[Vector], p: int) -> list[int]:
    """Farthest from the nearest of those labelled and chosen; at first, where there are none, as the salts draw."""
    labelled = [vector for vector in labelled if all(map(math.isfinite, vector))]

    def value(n: int, chosen: list[int]) -> float:
        centers = [*labelled, *(pool[c] for c in chosen)]
        return min((_square(pool[n], c) for c in centers), default=draw(salts[n], 0))

    return greedy(pool, keys, p, value)


def k_means_plus_plus(pool: Sequence[Vector], keys, salts, p: int) -> list[int]:
    """The longest; then who is first in a race of times -log(u) / d^2; those at distance 0 after all others, by u."""

    def value(n: int, chosen: list[int]) -> tuple[bool, float]:
        if not chosen:
            return True, _square(pool[n], [0.0] * len(pool[n]))
        square = min(_square(pool[n], pool[c]) for c in chosen)
        return square > 0, math.log(draw(salts[n], len(chosen))) / (square or 1)

    return greedy(pool, keys, p, value)


def facility_location(pool: Sequence[Vector], keys, queries: Sequence[Vector], p: int) -> list[int]:
    """What adds most to sum_q max_j s_qj + sum_j max_q s_qj over the chosen j: s = (1 + cosine) / 2, to 24 bits."""
    similar = [[_similarity(vector, query) for query in queries] for vector in pool]

    def information(chosen: list[int]) -> float:
        covered = sum(max((similar[j][q] for j in chosen), default=0.0) for q in range(len(queries)))
        return covered + sum(max(similar[j]) for j in chosen)

    return greedy(pool, keys, p, lambda n, chosen: information([*chosen, n]) - information(chosen))


def mmd2(x: Sequence[Vector], y: Sequence[Vector]) -> float:
    """Eq. 3 of Gretton et al. 2012, with a Gaussian kernel as wide as the median distance of different images."""
    both = [*x, *y]
    squares = sorted(math.dist(a, b) ** 2 for i, a in enumerate(both) for b in both[:i])
    apart = [square for square in squares if square > 1e-12 * squares[-1]]
    width = 2 * apart[(len(apart) - 1) // 2] if apart else 1.0

    def mean(rows: Sequence[Vector], others: Sequence[Vector]) -> float:
        values = [math.exp(-(math.dist(a, b) ** 2) / width) for a in rows for b in others if a is not b]
        return math.fsum(values) / len(values)

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def mcnemar(missed_a: Sequence[bool], missed_b: Sequence[bool]) -> float:
    """Twice the chance of so few heads, or fewer, of as many fair coins as images that one of the two alone misses."""
    pairs = list(zip(missed_a, missed_b, strict=True))
    a, b = pairs.count((True, False)), pairs.count((False, True))
    ways = sum(math.comb(a + b, heads) for heads in range(min(a, b) + 1))
    return min(1.0, 2 * ways / 2 ** (a + b))


def power_law(labels: Sequence[int], errors: Vector) -> tuple[float, float]:
    """(log a, b) of err = a n^-b, by the normal equations of log err = log a - b log n."""
    x, y = [math.log(n) for n in labels], [math.log(error) for error in errors]
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    slope = math.fsum((u - mean_x) * (v - mean_y) for u, v in zip(x, y, strict=True))
    slope /= math.fsum((u - mean_x) ** 2 for u in x)
    return mean_y - slope * mean_x, -slope


def _square(a: Vector, b: Vector) -> float:
    """Of the distance, in 24 bits as float32 has them, but of any size."""
    mantissa, exponent = math.frexp(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
    return math.ldexp(round(mantissa * 2**24), exponent - 24)


def _similarity(a: Vector, b: Vector) -> float:
    if not all(map(math.isfinite, a)):
        return 0.0
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    cosine = sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0
    return round((1 + cosine) / 2 * 2**24) / 2**24


def vae_loss(image: Sequence[Vector], decoded: Sequence[Vector], mean, logvar, beta: float) -> float:
    """Of each image its numbers, those decoded, and those of q(z|x): mean squared error + beta sum of divergences."""
    squares = [(x - y) ** 2 for a, b in zip(image, decoded, strict=True) for x, y in zip(a, b, strict=True)]
    pairs = [pair for m, v in zip(mean, logvar, strict=True) for pair in zip(m, v, strict=True)]
    divergence = math.fsum(-(1 + v - m**2 - math.exp(v)) / 2 for m, v in pairs)
    return math.fsum(squares) / len(squares) + beta * divergence


def deceive(labelled: Vector, unlabelled: Vector) -> float:
    """The cross-entropies, each a mean, of calling both labelled."""
    return _mean([_surprise(x) for x in labelled]) + _mean([_surprise(x) for x in unlabelled])


def tell_apart(labelled: Vector, unlabelled: Vector) -> float:
    """The cross-entropies, each a mean, of calling the labelled so and the unlabelled not."""
    return _mean([_surprise(x) for x in labelled]) + _mean([_surprise(-x) for x in unlabelled])


def _surprise(logit: float) -> float:
    """-ln of the sigmoid, ln(1 + exp(-logit))."""
    return max(-logit, 0.0) + math.log1p(math.exp(-abs(logit)))


def _mean(values: Vector) -> float:
    return math.fsum(values) / len(values)


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).float().item()
