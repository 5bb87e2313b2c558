"""What extraction makes of images: a method is set up once in an actor, and takes batches to the columns of a file.

Each is two classes: what it is told, which travels, and what it is in the actor, with the network.
Shapes: n images, of a batch padded to B; L numbers of a descriptor, D classes, K samples or passes, V votes.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from raypfk import augment, descriptor_files, models, pfk, store
from raypfk.config import MonteCarloConfig, VaalConfig, VoteConfig
from raypfk.descriptor_files import Directions, Origin
from raypfk.pfk import Descriptors, Kernel, LastLayer, McDropout, TapReader
from raypfk.run import stamp
from raypfk.salts import salts
from raypfk.schema import GRID, SCORES
from raypfk.stages.stream import Maybe, NetworkSpec, adversary, value
from raypfk.strategies import Strategy

MONTE_CARLO_NUMBERS = 1 << 27
"""Of gradients and Fisher scores of samples and classes, held at once."""
Rows = dict[str, np.ndarray]
"""Columns of a batch's images, without the padding: image_id, and label if it is known."""
Columns = dict[str, Tensor]


class Method(Protocol):
    """What an actor is told to do."""

    schema: pa.Schema
    """Of its files."""

    def load(self, networks: list[NetworkSpec]) -> "Loaded": ...

    def table(self, image_id: pa.Array, columns: Columns) -> pa.Table:
        """The file of a shard's images."""
        ...

    def write(self, path: str, table: pa.Table, run_id: str) -> None: ...


class Loaded(Protocol):
    device: torch.device

    def __call__(self, x: Tensor, rows: Rows) -> Columns:
        """x: the network's input, (B, C, S, S), of which the first n are the images of `rows`. Tensors of n, on CPU."""
        ...


# -------------------------------------------------------------------------------------------------------- descriptors


@dataclass(frozen=True)
class Describe:
    """Features and Fisher scores, standardised, and the label that was estimated.

    fisher: False leaves the Fisher scores zero and costs no backward. seed: of the Monte Carlo samples.
    reference: for the estimators of neighbours, the validation set's features (M, L) float32 and labels (M,) int64; for
    `discriminant` what was learnt from them.
    grid: where it is above 1, these are grid features (M, L') of so many by so many places, which a description of the
    validation set, without reference, keeps.
    directions: if given, descriptors are projected on them once the label is estimated.
    """

    origin: Origin
    taps: tuple[str, ...]
    estimator: str
    fisher: bool
    vote: VoteConfig
    monte_carlo: MonteCarloConfig
    seed: int
    grid: int = 1
    reference: tuple[Maybe, Maybe] | None = None
    directions: Directions | None = None

    @property
    def schema(self) -> pa.Schema:
        return self.origin.schema()

    def load(self, networks: list[NetworkSpec]) -> "_Describer":
        return _Describer(self, *networks)

    def table(self, image_id: pa.Array, columns: Columns) -> pa.Table:
        described = Descriptors(columns.pop("features"), columns.pop("fisher"))
        votes = {name: columns.pop(name) for name in ("vote_classes", "vote_shares") if name in columns}
        grid = {GRID: descriptor_files.column(columns.pop(GRID))} if GRID in columns else {}
        others = {name: x.numpy() for name, x in columns.items()} | grid
        others |= {name: descriptor_files.votes_column(x) for name, x in votes.items()}
        return descriptor_files.encode({"image_id": image_id, **others}, described, self.origin)

    def write(self, path: str, table: pa.Table, run_id: str) -> None:
        descriptor_files.write(path, table, run_id, self.origin)


class _Describer:
    def __init__(self, told: Describe, network: NetworkSpec):
        net, self.device = network.load()
        self.told, self.reader, self.classes = told, TapReader(net, told.taps), network.architecture.classes
        if told.reference:
            self.reference = tuple(torch.from_numpy(value(held).copy()).to(self.device) for held in told.reference)

    def __call__(self, x: Tensor, rows: Rows) -> Columns:
        told, count = self.told, len(rows["image_id"])
        logits, taps = self.reader(x)
        lengths = pfk.lengths(taps)
        z = pfk.standardise(pfk.features(taps), lengths)
        near_BL, scales, columns = z, lengths, {}
        if told.grid > 1:
            near_BL, scales = pfk.grid_features(taps, told.grid)
            near_BL = pfk.standardise(near_BL, scales)
            columns = {} if told.reference else {GRID: near_BL}
        target, estimates = self._estimate(x, near_BL, pfk.predicted(logits), Kernel("pcc", scales), rows)
        g = pfk.standardise(pfk.fisher_scores(logits, taps, target), lengths) if told.fisher else torch.zeros_like(z)
        if told.directions:
            z, g = told.directions.project(Descriptors(z, g))
        columns |= {"features": z, "fisher": g} | estimates
        if "label" in rows:
            columns["label"] = torch.from_numpy(rows["label"].copy())
        return {name: tensor[:count].detach().cpu() for name, tensor in columns.items()}

    def _estimate(
        self, x: Tensor, near_BL: Tensor, predicted: Tensor, kernel: Kernel, rows: Rows
    ) -> tuple[Tensor, Columns]:
        """What the Fisher scores are of, classes (B,) or soft labels (B, D); and the columns about labels.

        near_BL, kernel: the features by which neighbours are found, and how alike two are.
        """
        told, more = self.told, {}
        match told.estimator:
            case "predicted":
                target = estimated = predicted
            case "true":
                target = estimated = _padded(rows["label"], predicted)
            case "neighbour":
                target = estimated = pfk.neighbour(near_BL, *self.reference, kernel)[0]
            case "vote" | "soft" | "discriminant":
                if told.estimator == "discriminant":
                    voted = pfk.Discriminant(*self.reference).vote(near_BL, told.origin.votes)
                else:
                    voted = pfk.vote(near_BL, *self.reference, kernel, told.vote.neighbours)
                estimated = voted.labels
                target = voted.soft(self.classes) if told.estimator == "soft" else estimated
                if told.origin.votes:
                    more = _votes(voted, told.origin.votes)
            case _:
                target = estimated = self._monte_carlo(x, rows)
        return target, {"predicted": predicted, "estimated_label": estimated, **more}

    def _monte_carlo(self, x: Tensor, rows: Rows) -> Tensor:
        """The class (B,) whose Fisher scores go with the features best around each image (section 4.3 c, d)."""
        told = self.told
        estimate = {"mc-trace": pfk.mc_trace, "mc-information": pfk.mc_information}[told.estimator]
        own = _salts(rows, told.seed, x)
        _, taps = self.reader(x[:1])
        # Of an image: gradients of one sample at all places of the taps' outputs, then their means of all samples.
        numbers = sum(tap.numel() for tap in taps) + told.monte_carlo.samples * sum(pfk.lengths(taps))
        size = min(len(x), max(1, MONTE_CARLO_NUMBERS // (self.classes * numbers)))
        more = -len(x) % size  # the last part is as large as the others: a network's last digits depend on it
        found = []
        for part, own_n in zip(*(torch.cat([held, held[:more]]).split(size) for held in (x, own)), strict=True):
            samples = [self._sample(part, own_n, k) for k in range(told.monte_carlo.samples)]
            z_KnL, g_KnDL = (torch.stack(held) for held in zip(*samples, strict=True))
            found.append(estimate(z_KnL, g_KnDL).argmax(1))
        return torch.cat(found)[: len(x)]

    def _sample(self, x: Tensor, own: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Features (n, L) and the Fisher scores of all classes (n, D, L) of the k-th sample around each image."""
        how = self.told.monte_carlo
        logits, taps = self.reader(augment.jitter(x, own, k, how.rotation, how.noise))
        return pfk.features(taps), pfk.class_scores(logits, taps)


def _votes(voted: pfk.Voted, most: int) -> Columns:
    """The first `most` classes of the votes, which are all of them: there are no more, or no more voters."""
    missing = max(0, most - voted.classes.shape[1])
    classes = F.pad(voted.classes, (0, missing), value=-1)[:, :most]
    return {"vote_classes": classes.int(), "vote_shares": F.pad(voted.shares, (0, missing))[:, :most]}


def _salts(rows: Rows, seed: int, x: Tensor) -> Tensor:
    """The images' own numbers (B,) int64, 0 for the padding."""
    own = salts(rows["image_id"], seed).view(np.int64)
    return _padded(own, torch.zeros(len(x), dtype=torch.int64, device=x.device))


def _padded(values: np.ndarray, like: Tensor) -> Tensor:
    """The images' values (n,), then zeros for the padding, as a tensor like `like` (B,)."""
    padded = torch.zeros_like(like)
    padded[: len(values)] = torch.from_numpy(values.copy()).to(like)
    return padded


# ---------------------------------------------------------------------------------------------------------- gradients


@dataclass(frozen=True)
class Differentiate:
    """The gradient by the last layer's weights, as its two factors, for the true label or the class predicted."""

    origin: Origin

    @property
    def schema(self) -> pa.Schema:
        return self.origin.schema()

    def load(self, networks: list[NetworkSpec]) -> "_Differentiator":
        return _Differentiator(*networks)

    def table(self, image_id: pa.Array, columns: Columns) -> pa.Table:
        vectors = LastLayer(columns.pop("slope"), columns.pop("hidden"))
        others = {name: x.numpy() for name, x in columns.items()}
        return descriptor_files.encode({"image_id": image_id, **others}, vectors, self.origin)

    def write(self, path: str, table: pa.Table, run_id: str) -> None:
        descriptor_files.write(path, table, run_id, self.origin)


class _Differentiator:
    def __init__(self, network: NetworkSpec):
        self.net, self.device = network.load()
        models.last_layer(self.net).register_forward_pre_hook(self._keep)

    def _keep(self, _layer: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        self.hidden = inputs[0]

    def __call__(self, x: Tensor, rows: Rows) -> Columns:
        count = len(rows["image_id"])
        with torch.inference_mode():
            logits = self.net(x)[:count]
            predicted = pfk.predicted(logits)
            label = torch.from_numpy(rows["label"].copy()).to(self.device) if "label" in rows else predicted
            slope, hidden = pfk.logit_slope(logits, label).float(), self.hidden[:count]
        columns = {"slope": slope, "hidden": hidden, "predicted": predicted, "estimated_label": label}
        if "label" in rows:
            columns["label"] = label
        return {name: tensor.cpu() for name, tensor in columns.items()}


# -------------------------------------------------------------------------------------------------------------- scores


class _Scores:
    """A file of scores."""

    schema = SCORES

    def table(self, image_id: pa.Array, columns: Columns) -> pa.Table:
        return pa.table({"image_id": image_id, **{name: x.numpy() for name, x in columns.items()}}).cast(SCORES)

    def write(self, path: str, table: pa.Table, run_id: str) -> None:
        store.write_table(path, stamp(table, run_id))


@dataclass(frozen=True)
class Predict(_Scores):
    """A strategy's scores of all networks' predictions, in so many passes of dropout each. seeds: of their masks."""

    strategy: Strategy
    passes: int
    seeds: tuple[int, ...]

    def load(self, networks: list[NetworkSpec]) -> "_Predictor":
        return _Predictor(self, networks)


class _Predictor:
    def __init__(self, told: Predict, networks: list[NetworkSpec]):
        loaded = [network.load() for network in networks]
        self.told, self.device = told, loaded[0][1]
        self.members = [McDropout(net, told.passes) for net, _ in loaded]

    def __call__(self, x: Tensor, rows: Rows) -> Columns:
        count, logits = len(rows["image_id"]), []
        for member, seed in zip(self.members, self.told.seeds, strict=True):
            with torch.inference_mode():
                logits.append(member(x, _salts(rows, seed, x)))
        logits_TND = torch.cat(logits)[:, :count]
        predicted = pfk.predicted(pfk.mean_probabilities(logits_TND))
        score = self.told.strategy(logits_TND)
        return {"predicted": predicted.cpu(), "score": score.float().cpu()}


@dataclass(frozen=True)
class Discriminate(_Scores):
    """A strategy's scores of the adversary's logits, and the class that the network predicts. checkpoint: the file at
    `origin`."""

    strategy: Strategy
    config: VaalConfig
    checkpoint: Maybe
    origin: str

    def load(self, networks: list[NetworkSpec]) -> "_Discriminator":
        return _Discriminator(self, *networks)


class _Discriminator:
    def __init__(self, told: Discriminate, network: NetworkSpec):
        self.net, self.device = network.load()
        self.told, self.adversary = told, adversary(told.config, network.image)
        weights, _ = models.load(value(told.checkpoint), told.origin)
        models.restore(self.adversary, weights, told.origin)
        self.adversary.to(self.device).eval()

    def __call__(self, x: Tensor, rows: Rows) -> Columns:
        count = len(rows["image_id"])
        with torch.inference_mode():
            predicted, logits_N = pfk.predicted(self.net(x)[:count]), self.adversary(x)[:count]
        return {"predicted": predicted.cpu(), "score": self.told.strategy(logits_N).float().cpu()}
