"""One Ray Data pipeline, shared by extraction, evaluation and training: shards -> decoded images -> actors or tasks.

A block is one pool shard, from reading to writing: so an output file carries its input shard's name, a rerun knows
what is done, and nothing depends on which actor met which shard.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from raypfk import images, isolated, models, session, store
from raypfk.config import VaalConfig
from raypfk.errors import UserError
from raypfk.models import Architecture
from raypfk.pfk.vaal import Adversary
from raypfk.pool import Pool, Shard
from raypfk.rejects import Rejects
from raypfk.run import ImageSpec, Run
from raypfk.salts import salts
from raypfk.schema import REJECTS

_LOOK_S = 10.0
"""Seconds between two looks at what is rejected."""
Maybe = Any
"""A value, or Ray's reference to it: large constants travel once."""


def value(held: Maybe) -> Any:
    return ray.get(held) if isinstance(held, ray.ObjectRef) else held


@dataclass(frozen=True)
class Decoder:
    """Reads one shard and decodes it: the CPU side of the pipeline.

    columns: what goes along with the pixels.
    keep: if given, only these image ids; drop: never these (Arrow arrays, or references to them).
    share: of what is left, about this part, drawn from the ids by the seed.
    An image that cannot be decoded goes to `rejects`/SHARD with its reason; the others go on.
    """

    pool: Pool
    image: ImageSpec
    columns: tuple[str, ...] = ("image_id",)
    keep: Maybe = None
    drop: Maybe = None
    rejects: str | None = None
    share: float = 1.0
    seed: int = 0

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """{"item": [one Shard]} -> columns of its images; `image` becomes (N, C, S, S) uint8, `shard` its name."""
        shard: Shard = batch["item"][0]
        held = "uri" if self.pool.by_reference else "image"
        table = self._wanted(self.pool.read_shard(shard, [*self.columns, held]))
        spec, decoded, good, bad = self.image, [], [], []
        how = {name: getattr(spec, name) for name in ("size", "resize", "channels", "max_pixels")}
        mark = store.join(self.rejects, f"{shard.name}.trying") if self.rejects else None
        for i, pixels in enumerate(isolated.decoded(self.pool.images(table), how, mark)):
            if isinstance(pixels, images.BadImage):
                bad.append({"image_id": table["image_id"][i].as_py(), "reason": str(pixels)})
            else:
                decoded.append(pixels.numpy())
                good.append(i)
        if self.rejects:
            self._note(store.join(self.rejects, shard.name), bad)
        shape = (0, spec.channels, spec.size, spec.size)
        table = table.drop_columns(held).take(pa.array(good, pa.int64()))
        return {
            "shard": np.array([shard.name] * len(good), dtype=object),
            "image": np.stack(decoded) if decoded else np.empty(shape, np.uint8),
            **{name: table[name].to_numpy() for name in table.column_names},
        }

    @staticmethod
    def _note(path: str, bad: list[dict[str, str]]) -> None:
        if bad:
            store.write_table(path, pa.Table.from_pylist(bad, REJECTS))
        else:
            store.delete(path)  # an attempt that did not end may have met what is mended by now

    def _wanted(self, table: pa.Table) -> pa.Table:
        if self.keep is not None:
            table = table.filter(pc.is_in(table["image_id"], value(self.keep)))
        if self.drop is not None:
            table = table.filter(pc.invert(pc.is_in(table["image_id"], value(self.drop))))
        if self.share < 1:
            own = salts(table["image_id"].to_pylist(), self.seed)
            table = table.filter(pa.array(own < self.share * 2.0**64))
        return table


@dataclass(frozen=True)
class NetworkSpec:
    """How an actor makes its network: a checkpoint's bytes and where they came from."""

    architecture: Architecture
    image: ImageSpec
    checkpoint: Maybe
    origin: str
    gpu: bool = False
    """Whether Ray gives the actor a GPU: one that gives none still shows them all."""
    weights: str = ""
    """The first 16 hex digits of the checkpoint's SHA-256."""

    def load(self) -> tuple[torch.nn.Module, torch.device]:
        net = self.architecture.build()
        state, _ = models.load(value(self.checkpoint), self.origin)
        models.restore(net, state, self.origin)
        device = torch.device("cuda" if self.gpu else "cpu")
        return net.to(device).eval(), device


def networks_of(run: Run, round: int) -> list[NetworkSpec]:
    """The networks that round `round` ended with: one, or an ensemble's. UserError if a checkpoint is another's."""
    return [_network_of(run, round, member) for member in range(run.members)]


def network_of(run: Run, round: int) -> NetworkSpec:
    """The network that stands for the round: the only one, or the first of an ensemble."""
    return _network_of(run, round, 0)


def _network_of(run: Run, round: int, member: int) -> NetworkSpec:
    data, origin = checkpoint_of(run, round, member), run.round(round).checkpoint_of(member)
    gpu = session.gpus_per_actor(run.config.resources.extract_gpus) > 0
    return NetworkSpec(run.architecture, run.image, ray.put(data), origin, gpu, store.sha256(data)[:16])


def checkpoint_of(run: Run, round: int, member: int = 0) -> bytes:
    """A round's checkpoint file. UserError if it is another run's, round's or network's."""
    path = run.round(round).checkpoint_of(member)
    data = store.read_bytes(path)
    weights, meta = models.load(data, path)
    expected = {"run": run.id, "round": round, "name": run.config.model.name, "classes": run.classes, "member": member}
    _refuse_other(run, path, {"member": 0} | meta, expected)
    models.restore(run.architecture.build(), weights, path)
    return data


def adversary_of(run: Run, round: int) -> tuple[bytes, dict[str, Any]]:
    """A round's adversary file, and its `meta`. UserError if it is another run's, round's or network's."""
    path = run.round(round).adversary
    data = store.read_bytes(path)
    weights, meta = models.load(data, path)
    _refuse_other(run, path, meta, {"run": run.id, "round": round})
    models.restore(adversary(run.config.vaal, run.image), weights, path)
    return data, meta


def adversary(config: VaalConfig, image: ImageSpec) -> Adversary:
    """With random weights."""
    return Adversary(image.channels, image.size, config.width, config.latent)


def _refuse_other(run: Run, path: str, meta: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if meta.get(name) != value:
            raise UserError(f"{path}: {name} is {meta.get(name)!r}, expected {value!r} of {run.uri}")


def normalise(image_NCHW: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    """uint8 pixels -> float32 (x / 255 - mean) / std, channels last as the network's weights are."""
    shape = (1, -1, 1, 1)
    mean = torch.tensor(spec.mean, device=image_NCHW.device).view(shape)
    std = torch.tensor(spec.std, device=image_NCHW.device).view(shape)
    return ((image_NCHW.float() / 255 - mean) / std).to(memory_format=torch.channels_last)


def batches(
    image_NCHW: np.ndarray, spec: ImageSpec, size: int, device: torch.device
) -> Iterator[tuple[int, torch.Tensor]]:
    """(rows, network input) in batches of exactly `size`, the last one padded with black images.

    Libraries choose their algorithm, and so their rounding, by the batch's shape: one shape gives one answer.
    """
    for start in range(0, len(image_NCHW), size):
        part = torch.from_numpy(np.ascontiguousarray(image_NCHW[start : start + size])).to(device, non_blocking=True)
        rows = len(part)
        if rows < size:
            part = torch.cat([part, part.new_zeros((size - rows, *part.shape[1:]))])
        yield rows, normalise(part, spec)


def decoded(shards: Sequence[Shard], decoder: Decoder) -> ray.data.Dataset:
    """The shards' images as a Ray dataset, one block a shard. What was rejected of them before counts no more."""
    return _per_shard(shards, decoder, decoder.rejects)


def _per_shard(
    shards: Sequence[Shard], do: Callable[[dict], dict], rejects: str | None, tasks: int | None = None
) -> ray.data.Dataset:
    """tasks: at a time; None: as Ray Data sees fit."""
    if rejects:
        before = set(store.names(rejects, ".parquet"))
        for shard in shards:
            if shard.name in before:
                store.delete(store.join(rejects, shard.name))
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None  # a block is a shard: never split it
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True  # a wrapped one loses, on its way here, what it was raised from
    items = ray.data.from_items(list(shards), override_num_blocks=max(1, len(shards)))
    return items.map_batches(do, batch_size=1, compute=ray.data.TaskPoolStrategy(tasks))


def rejects_of(run: Run, split: str, folder: str) -> Rejects:
    return Rejects(f"{run.uri}: {split}", run.pool.rows(split), run.config.data.max_rejects, folder)


def through_actors(
    shards: Sequence[Shard], decoder: Decoder, actor: type, kwargs: dict[str, Any], run: Run, split: str
) -> Iterator[dict[str, np.ndarray]]:
    """Run shards of a split through actors, or tasks where there is no GPU; yields what they return, as it comes.

    actor: class whose __call__ takes and returns a batch of columns, one shard at a time.
    UserError where more images are rejected than `data.max_rejects` lets pass.
    """
    if not shards:
        return
    resources = run.config.resources
    gpus = session.gpus_per_actor(resources.extract_gpus)
    wanted = resources.extract_actors or (int(session.gpus() / gpus) if gpus else session.cpus())
    count = max(1, min(wanted, len(shards)))
    session.require("one actor of extraction", GPU=gpus, CPU=1)
    dataset = (by_actors if gpus else by_tasks)(shards, decoder, actor, kwargs, count, gpus)
    rejects = rejects_of(run, split, decoder.rejects)
    for batch in dataset.iter_batches(batch_size=None):
        yield batch
        rejects.look(every=_LOOK_S)
    rejects.look()


def by_actors(
    shards: Sequence[Shard], decoder: Decoder, actor: type, kwargs: dict[str, Any], count: int, gpus: float
) -> ray.data.Dataset:
    """Decoded by tasks, and used by so many actors with so many GPUs each."""
    return decoded(shards, decoder).map_batches(
        actor,
        batch_size=None,
        # One actor is enough to begin: a cluster may have fewer places than were asked for, or grow.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=count, initial_size=count),
        fn_constructor_kwargs=kwargs,
        num_gpus=gpus or None,
    )


def by_tasks(
    shards: Sequence[Shard], decoder: Decoder, actor: type, kwargs: dict[str, Any], count: int, _gpus: float = 0
) -> ray.data.Dataset:
    """Without a GPU to hold: in so many tasks at a time, whose processes Ray uses again in the next stage. The start of
    one (the import of torch alone takes seconds) costs more than a round on a small pool."""
    return _per_shard(shards, _Both(decoder, actor, ray.put(kwargs)), decoder.rejects, count)


@dataclass(frozen=True)
class _Both:
    """Decodes a shard and does with it what an actor would do; a process keeps the last `actor` that it made."""

    decoder: Decoder
    actor: type
    kwargs: ray.ObjectRef

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        global _kept
        if _kept[0] != self.kwargs:
            _kept = (self.kwargs, self.actor(**ray.get(self.kwargs)))
        return _kept[1](self.decoder(batch))


_kept: tuple[ray.ObjectRef | None, Any] = (None, None)
