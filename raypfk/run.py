"""A run and its directory: identity, what is done, and files that carry the run they belong to."""

import hashlib
import platform
import uuid
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

import raypfk
from raypfk import config as configs
from raypfk import lease, models, store, strategies
from raypfk.config import Config
from raypfk.errors import UserError
from raypfk.models import Architecture
from raypfk.pfk import Kernel, McDropout
from raypfk.pool import Pool
from raypfk.rehearsal import rehearse
from raypfk.schema import LABELS, RoundDir
from raypfk.stages import pool as stage
from raypfk.strategies import Strategy

FORMAT = 1


@dataclass(frozen=True)
class ImageSpec:
    """What a network sees, settled: sides in pixels, mean and std of length 1 or `channels` on the 0..1 scale."""

    size: int
    resize: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_pixels: int


class Passes(NamedTuple):
    """Of one network and one image: predictions; passes from the input; and from the first dropout."""

    each: int
    full: int
    partial: int


class Estimation(NamedTuple):
    """What a label estimator asks for. refers: it looks at the validation set. grid: side of the grid of places whose
    features it goes by. votes: classes of an image whose shares weigh its scores, 0 if it gives none; power: gamma of
    `pfk.Votes`."""

    refers: bool
    grid: int = 1
    votes: int = 0
    power: float = 1.0


@dataclass(frozen=True)
class Run:
    """An open run directory.

    uri: local path or URI. id: random, made once; every file of the run carries it. classes: D. command: what it was
    begun, or last gone on with, by; None if nobody wrote it down.
    """

    uri: str
    id: str
    config: Config
    pool: Pool
    image: ImageSpec
    classes: int
    command: str | None = None

    @classmethod
    def create_or_open(cls, config: Config, uri: str, pool: Pool, command: str | None = None) -> "Run":
        """The run at `uri`: made now, or gone on with. UserError that names the field if it is another run."""
        uri = store.absolute(uri)
        path = store.join(uri, "run.json")
        if store.exists(path):
            run = cls.open(uri, pool)
            run.refuse_other(config)
            _write(run.uri, run.id, config, run.pool, command or run.command)  # rounds may have grown
            return cls.open(uri, run.pool)
        run = cls(uri, uuid.uuid4().hex, config, pool, _image_spec(config, pool), pool.num_classes, command)
        _check(config, pool)
        run.check()
        _write(uri, run.id, config, pool, command)
        return run

    @classmethod
    def open(cls, uri: str, pool: Pool | None = None) -> "Run":
        uri = store.absolute(uri)
        path = store.join(uri, "run.json")
        if not store.exists(path):
            raise UserError(f"{uri}: no run here (run.json is missing)")
        record = store.read_record(path, {})
        if record.get("format") != FORMAT:
            raise UserError(f"{path}: format {record.get('format')!r}, expected {FORMAT}")
        store.require(path, record, {"id": str, "config": dict, "pool": dict})
        store.require(path, record["pool"], {"uri": str, "fingerprint": str})
        config = configs.validate(record["config"], path)
        pool = (pool or Pool.open(record["pool"]["uri"])).as_of(record["pool"]["fingerprint"], f"{uri} was begun on")
        spec, command = _image_spec(config, pool), record.get("command")
        return cls(uri, record["id"], config, pool, spec, pool.num_classes, command)

    def refuse_other(self, config: Config) -> None:
        """UserError that names the fields in which `config` is another run than this one."""
        if found := configs.differences(self.config, config):
            raise UserError(f"{self.uri} holds another run: " + "; ".join(found))

    def round(self, number: int) -> RoundDir:
        return RoundDir(self.uri, number)

    def done(self, number: int, stage: str) -> dict | None:
        """The facts that a finished stage left (its marker), or None."""
        path = self.round(number).marker(stage)
        return store.read_record(path, {"seconds": float}) if store.exists(path) else None

    def mark(self, number: int, stage: str, facts: dict[str, Any]) -> None:
        """Written after the stage's output is durable: the stage is done."""
        lease.check(self.uri)
        store.write_json(self.round(number).marker(stage), facts)

    def write(self, uri: str, table: pa.Table, compression: str = "zstd") -> None:
        store.write_table(uri, stamp(table, self.id), compression)

    def read(self, uri: str, schema: pa.Schema | None = None, columns: list[str] | None = None) -> pa.Table:
        """A table of this run; UserError naming both runs if it is another's."""
        table = store.read_table(uri, columns, schema)
        came = (table.schema.metadata or {}).get(b"raypfk.run", b"").decode()
        if came != self.id:
            raise UserError(f"{uri} belongs to the run {came or '(none)'}, expected {self.id} ({self.uri})")
        return table

    def labelled(self, before: int) -> pa.Table:
        """All labels bought in rounds 1 .. before-1, in the order of image_id."""
        tables = [self.read(self.round(n).labels, LABELS) for n in range(1, before)]
        table = pa.concat_tables([LABELS.empty_table(), *(t.replace_schema_metadata() for t in tables)])
        if pc.count_distinct(table["image_id"]).as_py() != table.num_rows:
            raise UserError(f"{self.uri}: an image is labelled twice in rounds 1 to {before - 1}")
        return table.sort_by("image_id")

    def check(self) -> None:
        """UserError for a model, a tap or a strategy that cannot be, before anything is written."""
        inputs = self.last_layer_inputs if self.strategy.kind == "gradients" else 0
        rehearse(self.strategy, self.lengths, self.config.scale_weight, self.classes, inputs)
        if "passes" in self.strategy.given and self.members * self.passes.each < 2:
            wanted = "uncertainty.passes and a network with dropout (model.dropout), or uncertainty.members"
            raise UserError(f"strategy: {self.config.strategy!r} compares predictions of the same image: set {wanted}")
        around = self.config.monte_carlo
        if self.config.label_estimator.startswith("mc-") and not around.rotation and not around.noise:
            raise UserError("monte_carlo: samples that are all the same tell no class: set `rotation` or `noise`")
        self._check_elsewhere()

    def _check_elsewhere(self) -> None:
        share, budget = self.config.elsewhere.share, self.config.budget
        if share and not 0 < self.elsewhere_budget < budget:
            found = f"{share} of {budget}, which is {self.elsewhere_budget}"
            raise UserError(f"elsewhere.share: expected an image or more for each of the two strategies, found {found}")
        if not (other := self.elsewhere):
            return
        if other.kind != "chance":
            raise UserError(f"elsewhere.strategy: expected random or another by chance, found {other.name!r}")
        rehearse(other, self.lengths, self.config.scale_weight, self.classes, 0)
        if "classes" in other.given and not self.estimates:
            estimates = f"{self.config.strategy!r} estimates none"
            raise UserError(f"elsewhere.strategy: {other.name!r} draws by estimated labels, and strategy {estimates}")

    @property
    def architecture(self) -> Architecture:
        """Of the run's networks."""
        model, image = self.config.model, self.image
        return Architecture(model.name, image.channels, self.classes, image.size, model.dropout)

    @cached_property
    def strategy(self) -> Strategy:
        return strategies.named(self.config.strategy)

    def describes(self, number: int) -> bool:
        """Whether round `number` looks at the pool's images: not where all are drawn with the same chance, as by
        predictions and by an adversary, too, as long as no image is labelled."""
        if self.strategy.kind in ("predictions", "adversary"):
            return self.labelled(number).num_rows > 0
        return self.strategy.kind != "chance" or bool(self.strategy.given)

    @property
    def estimates(self) -> bool:
        """Whether extraction writes down an estimated label of each pool image."""
        return self.strategy.kind == "kernel" or "classes" in self.strategy.given

    @cached_property
    def elsewhere(self) -> Strategy | None:
        """What spends a share of the budget beside the strategy, if any of it."""
        return strategies.named(self.config.elsewhere.strategy) if self.elsewhere_budget else None

    @property
    def elsewhere_budget(self) -> int:
        """Images of each round; the strategy chooses `budget` less these."""
        return round(self.config.elsewhere.share * self.config.budget)

    @property
    def members(self) -> int:
        """Networks that are trained each round: more than one are an ensemble, of which the first is evaluated."""
        return self.config.uncertainty.members if self.strategy.kind == "predictions" else 1

    @cached_property
    def passes(self) -> Passes:
        """What an uncertainty strategy makes each network do."""
        dropout = McDropout(self.architecture.build(), self.config.uncertainty.passes)
        return Passes(dropout.passes if dropout.active else 1, dropout.full, dropout.partial)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """L_j of the taps. UserError for a tap that the network does not have."""
        image = self.image
        return models.check_taps(self.architecture.build(), self.config.model.taps, image.channels, image.size)

    @property
    def estimation(self) -> Estimation:
        """What the run's label estimator asks for."""
        vote, discriminant = self.config.vote, self.config.discriminant
        match self.config.label_estimator:
            case "neighbour":
                return Estimation(refers=True)
            case "vote":
                return Estimation(True, vote.grid, min(vote.neighbours, self.classes), vote.power)
            case "soft":
                return Estimation(True, vote.grid)
            case "discriminant":
                return Estimation(True, discriminant.grid, min(discriminant.classes, self.classes), discriminant.power)
            case _:
                return Estimation(refers=False)

    @cached_property
    def grid_lengths(self) -> tuple[int, ...]:
        """Of the scales of the features that the label estimator goes by, where its grid is above 1; else none."""
        net, image, grid = self.architecture.build(), self.image, self.estimation.grid
        wanted = (self.config.model.taps, image.channels, image.size, grid)
        return models.check_taps(net, *wanted) if grid > 1 else ()

    @cached_property
    def last_layer_inputs(self) -> int:
        """Numbers that the last layer takes. UserError where it is not linear."""
        return models.last_layer(self.architecture.build()).in_features

    def kernel(self) -> Kernel:
        """Of descriptors in full."""
        return self.strategy(self.lengths, self.config.scale_weight)

    @property
    def stored_lengths(self) -> tuple[int, ...]:
        """Numbers that a pool image's descriptor keeps of each scale: L_j, or fewer with `descriptors.pca`."""
        dims = self.config.descriptors.pca
        return self.lengths if dims is None else tuple(min(dims, length) for length in self.lengths)

    def stored_kernel(self) -> Kernel:
        """Of descriptors as stored: a scale weighs what it weighs in full."""
        return replace(self.kernel(), lengths=self.stored_lengths, weight=self.kernel().weights)

    def seed(self, *names: str | int) -> int:
        """A seed below 2^63 for one use of randomness, the same wherever it is asked for."""
        text = "/".join(map(str, (self.config.seed, *names)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def stamp(table: pa.Table, run_id: str) -> pa.Table:
    """The table as this run's; what else its metadata says stays."""
    return table.replace_schema_metadata({**(table.schema.metadata or {}), b"raypfk.run": run_id})


def open_pool(config: Config, uri: str) -> Pool:
    """The pool that the config names, or the run's own, built from `data.source` once."""
    if config.data.pool:
        return Pool.open(config.data.pool)
    return stage.build(config.data, store.join(store.absolute(uri), "pool"), config.seed)


def _write(uri: str, run_id: str, config: Config, pool: Pool, command: str | None) -> None:
    versions = {"raypfk": raypfk.__version__, "python": platform.python_version()}
    versions |= {package: metadata.version(package) for package in ("ray", "torch", "torchvision", "pyarrow")}
    record = {
        "format": FORMAT,
        "id": run_id,
        "seed": config.seed,
        "command": command,
        "versions": versions,
        "pool": {"uri": pool.uri, "fingerprint": pool.fingerprint},
        "config": config.model_dump(),
    }
    store.write_json(store.join(uri, "run.json"), record)


def _check(config: Config, pool: Pool) -> None:
    """What only pool and config together can show."""
    for split, use in (("validation", "the trusted set that shows what must work"), ("test", "for the accuracy")):
        if not pool.rows(split):
            raise UserError(f"{pool.uri} has no {split} images ({use}): see data.{split} and data.{split}_root")
    if not pool.rows("pool"):
        raise UserError(f"{pool.uri} has no unlabelled images")
    labelled = pool.manifest["splits"]["pool"]["label_histogram"] is not None
    if not labelled and config.oracle == "simulated":
        raise UserError(f"oracle: 'simulated' needs a pool with hidden labels, {pool.uri} has none; use oracle: file")
    if not labelled and config.label_estimator == "true":
        raise UserError(f"label_estimator: 'true' needs a pool with hidden labels, {pool.uri} has none")


def _image_spec(config: Config, pool: Pool) -> ImageSpec:
    wanted, found = config.image, pool.manifest["image"]
    size = wanted.size or (found["width"] if found["width"] == found["height"] else None)
    if size is None:
        raise UserError(f"image.size: missing, and the images of {pool.uri} are not all squares of one size")
    resize = wanted.resize or size
    if resize < size:
        raise UserError(f"image.resize: {resize} is smaller than image.size {size}")
    channels = wanted.channels or found["channels"] or 3
    for name in ("mean", "std"):
        if len(getattr(wanted, name)) not in (1, channels):
            raise UserError(f"image.{name}: expected 1 or {channels} values, found {len(getattr(wanted, name))}")
    return ImageSpec(size, resize, channels, tuple(wanted.mean), tuple(wanted.std), config.data.max_pixels)
