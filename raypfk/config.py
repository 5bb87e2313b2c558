"""What a run is: one YAML file, strictly validated into these objects.

A field's docstring stands beside it. Everything is part of the run's identity (the same run directory with another
value is refused) but `rounds`, which may grow, `resources` and `data.max_rejects`, which never change what is selected,
and how a training is spread and kept (`SPREAD`), which must follow the machines that are there.
"""

import re
import reprlib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from raypfk import store, strategies
from raypfk.errors import UserError

Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Share = int | float
"""A number of images (int) or a share of what is there (float in (0, 1))."""

LONGEST = 1 << 20
"""Bytes of a configuration."""
MOST_ALIASES = 32
ESTIMATORS = ("true", "predicted", "neighbour", "vote", "soft", "discriminant", "mc-trace", "mc-information")

Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ImbalanceConfig(Section):
    """Class imbalance made at pool build: images of the `classes` are cut to (all the others' images) / `ratio`."""

    ratio: Annotated[float, Field(ge=1)]
    classes: list[int] | None = None
    """The rare classes, by index. Or, in their place:"""
    random_classes: Positive | None = None
    """How many classes, drawn by the seed, become rare (the paper's ImageNet: 500 of 1,000)."""

    @model_validator(mode="after")
    def _one(self):
        if (self.classes is None) == (self.random_classes is None):
            raise ValueError("give either `classes` or `random_classes`")
        return self


class ColumnsConfig(Section):
    """Names in tables of images: sources `parquet` and `manifest`."""

    image: str = "image"
    """`parquet`: encoded images."""
    uri: str = "uri"
    """`manifest`: where an image lies; a relative path is relative to the manifest."""
    id: str | None = None
    """null: `image_id`, if a manifest has it; else the file's path and the row (`parquet`), or the URI (`manifest`)."""
    label: str | None = None
    """Class names or indices; null: `label`, if it is there."""


TREES = ("folder", "webdataset", "parquet", "manifest")
FILES = (*TREES, "ilsvrc")


class DataConfig(Section):
    """Where the images come from: an existing pool, or a source that the run makes its pool of, once."""

    pool: str | None = None
    source: Literal[*FILES, "mnist", "svhn", "cifar10", "digits"] | None = None
    root: str | None = None
    """Where the source lies: a folder of images, of tars or of Parquet files (or one of them), a CSV or Parquet list
    of images, the folder with ILSVRC's train, val and devkit, or that which torchvision's data set takes as root."""
    validation_root: str | None = None
    """Likewise the trusted validation images, with labels (else `validation` are taken from `root`)."""
    test_root: str | None = None
    """Likewise the test images (else `test` are taken from `root`)."""
    columns: ColumnsConfig = ColumnsConfig()
    labels: str | None = None
    """CSV or Parquet file with the columns image_id and label: labels in place of the source's own."""
    by_reference: bool = False
    """The pool keeps ids and places, not images: these are fetched, many at once, whenever they are needed."""
    validation: Share | None = None
    """Images (int) or share (float) of the labelled training images kept as validation set, evenly over classes."""
    test: Share | None = None
    """Likewise, for sources without a test split of their own."""
    imbalance: ImbalanceConfig | None = None
    shard_rows: Positive = 1024
    """Images per pool shard: the unit of work of extraction and of resuming."""
    max_pixels: Positive = 100_000_000
    """An image with more pixels is rejected, unread."""
    max_rejects: Share = 0.1
    """Images (int), or share (float) of those that a stage reads, that may be rejected before it stops (10 may)."""

    def of_pool(self, uri: str) -> "DataConfig":
        """The same images as they lie in the pool that was built of them."""
        return DataConfig(pool=uri, max_pixels=self.max_pixels, max_rejects=self.max_rejects)

    @model_validator(mode="after")
    def _one_origin(self):
        if (self.pool is None) == (self.source is None):
            raise ValueError("give either `pool` (an existing pool) or `source` (what to build one from)")
        if self.pool:
            names = (
                "root",
                "validation_root",
                "test_root",
                "labels",
                "validation",
                "test",
                "imbalance",
                "by_reference",
            )
            if given := [name for name in names if getattr(self, name)]:
                raise ValueError(f"`{given[0]}` says how to build a pool: beside `pool` it has no meaning")
        if self.source not in (None, "digits") and self.root is None:
            raise ValueError(f"source {self.source!r} needs `root`, the place it lies in (--set data.root=...)")
        if self.source not in TREES and (self.validation_root or self.test_root):
            raise ValueError(f"`validation_root` and `test_root` go with {', '.join(TREES)} only")
        if self.source not in FILES and self.by_reference:
            raise ValueError(f"`by_reference` goes with {', '.join(FILES)} only")
        for name in ("validation", "test"):
            share = getattr(self, name)
            if share is not None and (share <= 0 or (isinstance(share, float) and share >= 1)):
                raise ValueError(f"`{name}` must be a number of images (int >= 1) or a share (0 < float < 1): {share}")
        if self.max_rejects < 0 or (isinstance(self.max_rejects, float) and self.max_rejects > 1):
            raise ValueError(f"`max_rejects` must be a number of images or a share (0 to 1.0): {self.max_rejects}")
        return self


class ImageConfig(Section):
    """What a network sees: shorter side resized, centre cropped, scaled to 0..1, then (x - mean) / std."""

    size: Positive | None = None
    """Side of the square crop in pixels; null: the pool's own size, if all its images have one."""
    resize: Positive | None = None
    """Length of the shorter side before the crop; null: `size`."""
    channels: Literal[1, 3] | None = None
    """null: 1 if every image of the pool is greyscale, else 3; 3 for a pool by reference."""
    mean: list[float] = [0.5]
    std: list[Annotated[float, Field(gt=0)]] = [0.5]
    """One value, or one per channel."""


class ModelConfig(Section):
    name: str
    """lenet, resnet10, resnet18, or any classification network of torchvision."""
    taps: Annotated[list[str], Field(min_length=1)]
    """Layers whose output is read, in the order of the descriptor's scales; dotted names as in named_modules()."""
    batch_size: Positive = 256
    """Images per forward pass of extraction and evaluation. Part of the run: a batch's shape decides its rounding."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the last layer's inputs that are dropped in training, and in each pass of an uncertainty strategy."""


class DescriptorsConfig(Section):
    """How the pool's descriptors are stored (section 4.1); the validation set's are float32, in full."""

    dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    """Of a number; int8 is relative to the largest of its scale. docs/storage.md: what each does to a selection."""
    pca: Positive | None = None
    """Numbers kept of each scale's features and of its Fisher scores, along the validation set's main directions."""


class VoteConfig(Section):
    """Label estimators `vote` and `soft`: the nearest validation images, by `pcc`, vote for an image's class."""

    neighbours: Positive = 10
    power: Annotated[float, Field(gt=0)] = 1.0
    """`vote`: a score with a center of class y is multiplied by (share of the votes for y) to this power."""
    grid: Positive = 1
    """The nearest are found by features of so many by so many places of the image, side by side; 1: their mean."""


class DiscriminantConfig(Section):
    """Label estimator `discriminant`: linear discriminants of the validation set's features, with a temperature."""

    grid: Positive = 4
    """Of features of so many by so many places of the image, side by side; 1: of their mean. The memory and the time of
    the driver grow with the square and the third power of how many numbers that are."""
    shrinkage: Annotated[float, Field(gt=0)] = 0.01
    """Times the mean variance, added to each variance."""
    classes: Positive = 10
    """Likeliest classes of an image that are kept; of the others the probability counts as 0."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """A score with a center of class y is multiplied by (probability of y) to this power."""


class MonteCarloConfig(Section):
    """Label estimators `mc-trace` and `mc-information` (section 4.3): samples around each image."""

    samples: Annotated[int, Field(ge=2)] = 8
    """K. Each costs a forward pass and one backward for each class."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 5.0
    """Degrees, to either side, uniform (the authors' program passes 5 to a cosine, as radians)."""
    noise: Annotated[float, Field(ge=0)] = 0.1
    """Standard deviation of the Gaussian noise added to what the network sees."""


class UncertaintyConfig(Section):
    """Strategies by predictions: variation-ratio, max-entropy, bald, margin, least-confidence."""

    passes: Positive = 32
    """K, forward passes with dropout; one, where the network has none."""
    members: Positive = 1
    """E, networks of an ensemble: all are trained each round, the first is evaluated (Beluch et al. 2018)."""


class ElsewhereConfig(Section):
    """A hybrid: a share of each round's budget that another strategy spends, where the first one does not look."""

    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the budget, to a whole image; 0: no hybrid."""
    strategy: str = "random"
    """A strategy by chance: random, class-balanced, or one's own."""


class VaalConfig(Section):
    """Strategy `vaal`: the variational autoencoder (VAE) and the discriminator that are trained each round, by the
    workers of `train`. What is not said to be ours is the authors' program's."""

    steps: Positive = 500
    """Each is `vae_steps` updates of the VAE and one of the discriminator. Ours, as a CPU can: the program's are 100
    epochs of all images, labelled or not, 39,062 of CIFAR-10's 50,000."""
    batch_size: Annotated[int, Field(ge=2, le=2**31 - 1)] = 128
    """Labelled images of an update, and as many unlabelled ones, over all workers."""
    lr: Annotated[float, Field(gt=0)] = 5e-4
    """Of Adam, for both networks."""
    width: Positive = 16
    """Channels after the VAE's first convolution; three more double them. Ours, as a CPU can: the program's are 128."""
    latent: Positive = 32
    """Numbers of an image that the discriminator sees."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the VAE's divergence: the sum over a batch, beside the mean squared error of its pixels."""
    adversary: Annotated[float, Field(ge=0)] = 1.0
    """Weight of deceiving the discriminator."""
    vae_steps: Positive = 2
    """Updates of the VAE in a step."""


class TrainConfig(Section):
    epochs: Positive
    batch_size: Positive
    """Images per step, over all workers (rotation pretraining shows each in 4 rotations)."""
    lr: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decay: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The learning rate is multiplied by it at each step."""
    decay_every: Positive | None = None
    """A step after every so many epochs. Or, in its place:"""
    milestones: list[Positive] | None = None
    """Steps after these epochs."""
    augment: Literal["none", "flip", "crop-flip"] = "none"
    """Random horizontal flip; random resized crop (area 0.35 to 1) and flip."""
    balanced: bool = False
    """Draw an epoch's images with replacement, every class with the same chance."""
    monitor: bool = False
    """Test accuracy after every epoch, kept in metrics.json. Nothing is chosen by it: the last epoch counts."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Ray Train worker processes; 0 trains in the driver's process, which saves tens of seconds a round. Another number
    rounds differently; beyond that, batch normalisation sees a worker's share, and a streaming worker shuffles its own.
    """
    min_workers: Positive | None = None
    """Where machines are lost, a training goes on with as few, and grows again; null: it waits for all `workers`."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    threads: Positive = 1
    """CPU threads of a worker; small networks lose with more, and much where other work runs beside them."""
    storage: str | None = None
    """Ray Train's storage path; null: `ray_train` in the run directory."""
    checkpoint_every: Positive = 10
    """Epochs between the checkpoints that a killed training goes on from; a long epoch is always followed by one."""

    @model_validator(mode="after")
    def _workers(self):
        if self.min_workers and self.min_workers > self.workers:
            raise ValueError(f"`min_workers` is {self.min_workers}, more than the {self.workers} `workers`")
        return self

    @model_validator(mode="after")
    def _one_schedule(self):
        if self.decay_every and self.milestones:
            raise ValueError("give either `decay_every` or `milestones`")
        return self


SPREAD = ("workers", "min_workers", "gpus_per_worker", "threads", "checkpoint_every")
"""How a training is spread over machines and kept: may change while a run goes on."""


class ResourcesConfig(Section):
    """Share of the cluster; changes the speed and never the selection."""

    extract_actors: Positive | None = None
    """null: one per GPU; without any, one task per CPU core at a time does what an actor would."""
    extract_gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs per actor; null: 1 where the cluster has any, else 0."""
    score_actors: Positive | None = None
    """null: one per GPU, or one per CPU core; for a small pool none, as the driver scores it before they start."""
    score_gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs per actor; null: 1 where the cluster has any, else 0."""
    score_threads: Positive = 1
    """Threads, and CPUs asked for, of one scoring actor; with a GPU they read ahead."""


class Config(Section):
    """One run."""

    data: DataConfig
    image: ImageConfig = ImageConfig()
    model: ModelConfig
    pretrain: TrainConfig | None = None
    """Rotation pretraining (Gidaris et al. 2018) on the unlabelled pool; null: random weights."""
    train: TrainConfig
    strategy: str = "pfk"
    """One of raypfk/strategies, or one's own as `package.module:function`."""
    elsewhere: ElsewhereConfig = ElsewhereConfig()
    label_estimator: Literal[ESTIMATORS] = "neighbour"
    """S, what stands in for the unknown labels of pool images (section 4.3; docs/strategies.md)."""
    vote: VoteConfig = VoteConfig()
    discriminant: DiscriminantConfig = DiscriminantConfig()
    monte_carlo: MonteCarloConfig = MonteCarloConfig()
    uncertainty: UncertaintyConfig = UncertaintyConfig()
    vaal: VaalConfig = VaalConfig()
    scale_weight: Literal["length", "length-squared", "equal"] = "length"
    """w_j of a tap of L_j channels in a strategy's kernel: L_j - 1 (the paper's vectors of unit variance),
    (L_j - 1)^2 (eq. 12 to the letter), or 1. Label estimators find neighbours by `length`, whatever it is."""
    descriptors: DescriptorsConfig = DescriptorsConfig()
    budget: Positive
    """P, images bought per round."""
    rounds: Positive = 10
    """B."""
    top_k: Positive = 32
    """Candidates kept per center to begin with; grows where they run out."""
    oracle: Literal["simulated", "file"] = "simulated"
    """simulated: the pool's hidden labels; file: a person's answers in rounds/NNN/labels.csv."""
    seed: Annotated[int, Field(ge=0)] = 0
    resources: ResourcesConfig = ResourcesConfig()

    @field_validator("pretrain")
    @classmethod
    def _rotations(cls, pretrain: TrainConfig | None) -> TrainConfig | None:
        if pretrain and (asked := [name for name in ("balanced", "monitor") if getattr(pretrain, name)]):
            raise ValueError(f"`{asked[0]}` goes with `train` only: rotations are learnt without labels")
        return pretrain

    @field_validator("strategy")
    @classmethod
    def _known(cls, name: str) -> str:
        if ":" not in name and name not in strategies.names():
            raise ValueError(f"expected {', '.join(strategies.names())} or package.module:function, found {name!r}")
        return name


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (PyYAML reads 1e-1 as a string); each key once (PyYAML takes the last); few aliases (nine levels
    of nine of them are a billion values)."""

    aliases = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > MOST_ALIASES:
                mark = self.peek_event().start_mark
                raise yaml.MarkedYAMLError(problem=f"more than {MOST_ALIASES} aliases", problem_mark=mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(path: str, overrides: dict[str, Any] | None = None, *settings: dict[str, Any]) -> Config:
    """Read and validate a run's YAML file.

    path: file. overrides: top-level fields, None where one is not overridden. settings: values by `dotted.key`, later
    ones over earlier ones. Raises UserError that names the file, the dotted path, what was expected and what came.
    """
    tree = read_tree(path)
    for layer in settings:
        for key, value in layer.items():
            _set(tree, key, value)
    tree |= {k: v for k, v in (overrides or {}).items() if v is not None}
    return _absolute_paths(validate(tree, path))


def read_tree(path: str) -> dict[str, Any]:
    """A YAML file of settings. UserError where it is none."""
    tree = _parse(_text(path), path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    return tree


def assigned(assignments: Iterable[str]) -> dict[str, Any]:
    """Values by dotted key, of `dotted.key=value` strings whose value is YAML."""
    settings = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"--set {assignment}: expected dotted.key=value")
        settings[key] = _parse(value, f"--set {assignment}")
    return settings


def validate(tree: dict, origin: str) -> Config:
    return checked(Config, tree, origin)


def checked(kind: type[Model], tree: Any, origin: str) -> Model:
    """The tree as this kind of object. UserError with a line for each field that is not as it must be."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(f"{origin}: {_explain(e)}" for e in error.errors())) from None


def identity(config: Config) -> Config:
    """The configuration with all that may change while a run goes on, but `rounds`, as it is by default."""
    sections = {"resources": ResourcesConfig(), "data": _by_default(config.data, ["max_rejects"])}
    for name in ("train", "pretrain"):
        if section := getattr(config, name):
            sections[name] = _by_default(section, SPREAD)
    return config.model_copy(update=sections)


def _by_default(section: Model, names: Iterable[str]) -> Model:
    return section.model_copy(update={name: type(section).model_fields[name].default for name in names})


def differences(old: Config, new: Config) -> list[str]:
    """Dotted fields in which `new` is another run than `old`, as `field: old -> new`."""
    found: list[str] = []
    _differ(identity(old).model_dump(), identity(new).model_dump(), "", found)
    return found


def _differ(old: Any, new: Any, path: str, found: list[str]) -> None:
    if path == "rounds" and new >= old:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old:
            _differ(old[key], new[key], f"{path}.{key}".lstrip("."), found)
    elif old != new:
        found.append(f"{path}: {old!r} there, {new!r} now")


def _text(path: str) -> str:
    try:
        with open(path, "rb") as stream:  # a pipe will do; a device that never ends will not
            data = stream.read(LONGEST + 1)
        if len(data) > LONGEST:
            raise UserError(f"{path}: expected a YAML file of at most {LONGEST} bytes, found more")
        return data.decode()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected YAML text, found binary data") from None


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise UserError(f"{origin}: not YAML that can be read: nested too deep") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{origin}: not YAML: {' '.join((error.problem or '').split())}{where}") from None
    except Exception as error:  # tags make the parser raise anything: !!bool maybe, a date with month 13
        message = " ".join(str(error).split())
        raise UserError(f"{origin}: not YAML: {message[:200] or type(error).__name__}") from None


def _set(tree: dict, key: str, value: Any) -> None:
    """Sections on the way are copied: an alias's, or a settings' own, are not this tree's alone."""
    node = tree
    *parents, last = key.split(".")
    for name in parents:
        section = {} if node.get(name) is None else node[name]
        if not isinstance(section, dict):
            raise UserError(f"{key}: {name!r} is a value, not a section")
        node[name] = section = dict(section)
        node = section
    node[last] = value


_BRIEF = reprlib.Repr()  # what aliases make of a short file would fill a disk
_BRIEF.maxstring = _BRIEF.maxother = 200


def _explain(error: dict) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key"
    if error["type"] == "missing":
        return f"{where}: missing"
    came = "" if isinstance(error["input"], dict) else f", found {_BRIEF.repr(error['input'])}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{where}: expected {message}{came}" if error["msg"].startswith("Input should") else f"{where}: {message}"


def _absolute_paths(config: Config) -> Config:
    """Paths are resolved where the command was given: workers run elsewhere."""
    data = {
        name: store.absolute(value)
        for name in ("pool", "root", "validation_root", "test_root", "labels")
        if (value := getattr(config.data, name)) is not None
    }
    sections = {"data": config.data.model_copy(update=data)}
    for name in ("train", "pretrain"):
        if (section := getattr(config, name)) and section.storage:
            sections[name] = section.model_copy(update={"storage": store.absolute(section.storage)})
    return config.model_copy(update=sections)
