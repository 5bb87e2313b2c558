"""One Ray Data pipeline, shared by extraction, evaluation and training: shards -> decoded images -> actors.

A block is one pool shard, from reading to writing: so an output file carries its input shard's name, a rerun knows
what is done, and nothing depends on which actor met which shard.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from raypfk import images, models, session, store
from raypfk.config import ResourcesConfig
from raypfk.errors import UserError
from raypfk.run import ImageSpec, Run
from raypfk.schema import REJECTS
from raypfk.stages.pool import Pool, Shard

Maybe = Any
"""A value, or Ray's reference to it: large constants travel once."""


def value(held: Maybe) -> Any:
    return ray.get(held) if isinstance(held, ray.ObjectRef) else held


@dataclass(frozen=True)
class Decoder:
    """Reads one shard and decodes it: the CPU side of the pipeline.

    keep: if given, only these image ids; drop: never these (Arrow arrays, or references to them).
    An image that cannot be decoded goes to `rejects`/SHARD with its reason; the others go on.
    """

    pool: Pool
    image: ImageSpec
    columns: tuple[str, ...] = ("image_id", "image")
    keep: Maybe = None
    drop: Maybe = None
    rejects: str | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """{"item": [one Shard]} -> columns of its images; `image` becomes (N, C, S, S) uint8, `shard` its name."""
        shard: Shard = batch["item"][0]
        table = self._wanted(self.pool.read_shard(shard, list(self.columns)))
        spec, decoded, good, bad = self.image, [], [], []
        for i, data in enumerate(table["image"]):
            try:
                decoded.append(
                    images.load(
                        data.as_py(), size=spec.size, resize=spec.resize, channels=spec.channels,
                        max_pixels=spec.max_pixels,
                    ).numpy()
                )  # fmt: skip
                good.append(i)
            except images.BadImage as error:
                bad.append({"image_id": table["image_id"][i].as_py(), "reason": str(error)})
        if bad and self.rejects:
            store.write_table(store.join(self.rejects, shard.name), pa.Table.from_pylist(bad, REJECTS))
        shape = (0, spec.channels, spec.size, spec.size)
        table = table.drop_columns("image").take(pa.array(good, pa.int64()))
        return {
            "shard": np.array([shard.name] * len(good), dtype=object),
            "image": np.stack(decoded) if decoded else np.empty(shape, np.uint8),
            **{name: table[name].to_numpy() for name in table.column_names},
        }

    def _wanted(self, table: pa.Table) -> pa.Table:
        if self.keep is not None:
            table = table.filter(pc.is_in(table["image_id"], value(self.keep)))
        if self.drop is not None:
            table = table.filter(pc.invert(pc.is_in(table["image_id"], value(self.drop))))
        return table


@dataclass(frozen=True)
class NetworkSpec:
    """How an actor makes its network: a checkpoint's bytes and where they came from."""

    name: str
    classes: int
    image: ImageSpec
    checkpoint: Maybe
    origin: str
    gpu: bool = False
    """Whether Ray gives the actor a GPU: one that gives none still shows them all."""
    weights: str = ""
    """The first 16 hex digits of the checkpoint's SHA-256."""

    def load(self) -> tuple[torch.nn.Module, torch.device]:
        image = self.image
        net = models.build(self.name, image.channels, self.classes, image.size, seed=0)
        state, _ = models.load(value(self.checkpoint), self.origin)
        net.load_state_dict(state)
        device = torch.device("cuda" if self.gpu else "cpu")
        return net.to(device).eval(), device


def network_of(run: Run, round: int) -> NetworkSpec:
    """The network that round `round` ended with. UserError if its checkpoint is another run's or network's."""
    data, origin = checkpoint_of(run, round), run.round(round).checkpoint
    gpu = session.gpus_per_actor(run.config.resources.extract_gpus) > 0
    weights = store.sha256(data)[:16]
    return NetworkSpec(run.config.model.name, run.classes, run.image, ray.put(data), origin, gpu, weights)


def checkpoint_of(run: Run, round: int) -> bytes:
    """A round's checkpoint file. UserError if it is another run's, round's or network's."""
    path = run.round(round).checkpoint
    data = store.read_bytes(path)
    _, meta = models.load(data, path)
    expected = {"run": run.id, "round": round, "name": run.config.model.name, "classes": run.classes}
    for name, value in expected.items():
        if meta.get(name) != value:
            raise UserError(f"{path}: {name} is {meta.get(name)!r}, expected {value!r} of {run.uri}")
    return data


def normalise(image_NCHW: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    """uint8 pixels -> float32 (x / 255 - mean) / std."""
    shape = (1, -1, 1, 1)
    mean = torch.tensor(spec.mean, device=image_NCHW.device).view(shape)
    std = torch.tensor(spec.std, device=image_NCHW.device).view(shape)
    return (image_NCHW.float() / 255 - mean) / std


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
    """The shards' images as a Ray dataset, one block a shard."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None  # a block is a shard: never split it
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True  # a wrapped one loses, on its way here, what it was raised from
    return ray.data.from_items(list(shards), override_num_blocks=max(1, len(shards))).map_batches(decoder, batch_size=1)


def through_actors(
    shards: Sequence[Shard], decoder: Decoder, actor: type, kwargs: dict[str, Any], resources: ResourcesConfig
) -> Iterator[dict[str, np.ndarray]]:
    """Run the shards through an actor pool; yields what the actors return for each shard, as it comes.

    actor: class whose __call__ takes and returns a batch of columns, one shard at a time.
    """
    if not shards:
        return
    gpus = session.gpus_per_actor(resources.extract_gpus)
    wanted = resources.extract_actors or (int(session.gpus() / gpus) if gpus else session.cpus())
    count = max(1, min(wanted, len(shards)))
    session.require("one actor of extraction", GPU=gpus, CPU=1)
    dataset = decoded(shards, decoder).map_batches(
        actor,
        batch_size=None,
        # One actor is enough to begin: a cluster may have fewer places than were asked for, or grow.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=count, initial_size=count),
        fn_constructor_kwargs=kwargs,
        num_gpus=gpus or None,
    )
    yield from dataset.iter_batches(batch_size=None)
