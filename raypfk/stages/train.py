"""Train: Ray Train on all labels bought so far, from the last round's weights (Algorithm 1, line 11); and before the
first round rotation pretraining (Gidaris et al. 2018), or random weights.

Every draw of randomness is seeded by (run, round, epoch): an interrupted training goes on to the same weights.
"""

import copy
import io
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import ray
import ray.train
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer, get_device, prepare_model

from raypfk import augment, models, progress, session, store
from raypfk.config import TrainConfig
from raypfk.errors import RunError
from raypfk.pool import Shard
from raypfk.rejects import Rejects, TooMany
from raypfk.run import ImageSpec, Run
from raypfk.stages.stream import Decoder, checkpoint_of, decoded, normalise, rejects_of

ROTATIONS = 4
HOLD_BYTES = 2 * 1024**3
"""Training images of up to so many bytes, decoded, are held in every worker's memory; more are streamed each epoch."""
SHUFFLE_ROWS = 16384
"""Rows of the local shuffle buffer when streaming."""
KEEP_SECONDS = 30.0
"""A finished epoch is kept if the last one kept is older. What a lost worker loses is bounded by this and an epoch, and
by nothing it could do at the end: Ray ends a process without a word to the thread that trains in it."""


KEPT = ("meta", "epochs", "loss", "net", "optimizer")
"""Of an interrupted training."""


@dataclass(frozen=True)
class Job:
    """What a training worker is told. seed: of the round. start: checkpoint bytes to begin from (by reference).

    classes: outputs of the network; `rotate` learns the rotation instead of a label.
    hold: the data set fits in memory. partial: where all goes that is needed to go on. output: where the weights go at
    the end, if anywhere else.
    """

    config: TrainConfig
    image: ImageSpec
    model: str
    classes: int
    rotate: bool
    seed: int
    start: ray.ObjectRef
    hold: bool
    output: str | None
    partial: str
    meta: dict


def pretrain(run: Run, round: int = 0) -> dict:
    """Write rounds/000's checkpoint: all layers but the last from rotation pretraining, or random weights."""
    config, image = run.config, run.image
    net = models.build(config.model.name, image.channels, run.classes, image.size, run.seed("weights"))
    if config.pretrain is None:
        store.write_bytes(run.round(0).checkpoint, models.save(net, _meta(run, 0)))
        return {"loss": None, "forward": 0, "backward": 0}
    models.replace_last_layer(net, ROTATIONS, run.seed("rotation layer"))
    rows = run.pool.rows("pool")
    job = _job(run, 0, config.pretrain, rows, models.save(net, _meta(run, 0)))
    job = replace(job, classes=ROTATIONS, rotate=True, output=None)  # the round's checkpoint has other outputs
    decoder = Decoder(run.pool, image, rejects=run.round(0).rejects("pool"))
    images = decoded(_order(run, job, run.pool.shards("pool")), decoder)
    facts = _fit(run, job, images)
    rejects = rejects_of(run, "pool", decoder.rejects)
    try:
        rejects.look()
    except TooMany:
        store.delete(job.partial)  # or the next try would find all epochs done
        raise
    models.restore(net, _kept(job)["net"], job.partial)
    models.replace_last_layer(net, run.classes, run.seed("last layer"))
    store.write_bytes(run.round(0).checkpoint, models.save(net, _meta(run, 0)))
    return facts | _passes(config.pretrain.epochs * (rows - rejects.count) * ROTATIONS)


def train(run: Run, round: int) -> dict:
    """Write round `round`'s checkpoint, trained on the labels of rounds 1..round from round-1's weights."""
    labels = run.labelled(round + 1)
    job = _job(run, round, run.config.train, labels.num_rows, checkpoint_of(run, round - 1))
    shards = _order(run, job, run.pool.locate(labels["image_id"].to_pylist()))
    wanted, rejects = ray.put(labels["image_id"].combine_chunks()), run.round(round).rejects("train")
    decoder = Decoder(run.pool, run.image, keep=wanted, rejects=rejects)
    # Read and decoded once: the labelled images lie scattered over the pool's shards.
    images = decoded(shards, decoder).map_batches(_Labels(ray.put(labels)), batch_size=None).materialize()
    count = images.count()
    if count < labels.num_rows:
        _leave_out(run, labels.num_rows, count, rejects)
    return _fit(run, job, images) | _passes(run.config.train.epochs * count)


def _leave_out(run: Run, labelled: int, readable: int, folder: str) -> None:
    """Images of a pool by reference that are gone since, or that `random` chose unread: said, unless too many are."""
    why = f"{labelled - readable} of {labelled} labelled images cannot be read, why is in {folder}"
    Rejects(f"{run.uri}: training", labelled, run.config.data.max_rejects, folder).look()
    if not readable:
        raise RunError(f"{run.pool.uri}: {why}")
    progress.current().say(f"{why}: training without them")


def _order(run: Run, job: Job, shards: list[Shard]) -> list[Shard]:
    """Shards as they are fed: shuffled where they are streamed, for neighbours in a pool are often of one class."""
    if job.hold:
        return shards
    return [shards[i] for i in torch.randperm(len(shards), generator=torch.Generator().manual_seed(job.seed))]


@dataclass(frozen=True)
class _Labels:
    """Joins the bought labels to decoded images."""

    table: ray.ObjectRef

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        table: pa.Table = ray.get(self.table)
        known = dict(zip(table["image_id"].to_pylist(), table["label"].to_pylist(), strict=True))
        return batch | {"label": np.array([known[i] for i in batch["image_id"]], np.int64)}


def _job(run: Run, round: int, config: TrainConfig, rows: int, start: bytes) -> Job:
    image, files = run.image, run.round(round)
    return Job(
        config, image, run.config.model.name, run.classes, False, run.seed("train", round), ray.put(start),
        rows * image.channels * image.size**2 <= HOLD_BYTES, files.checkpoint, files.training, _meta(run, round),
    )  # fmt: skip


def _meta(run: Run, round: int) -> dict:
    return {
        "run": run.id,
        "round": round,
        "name": run.config.model.name,
        "classes": run.classes,
        "channels": run.image.channels,
        "size": run.image.size,
    }


def _passes(images: int) -> dict:
    return {"forward": images, "backward": images}


def _fit(run: Run, job: Job, images: ray.data.Dataset) -> dict:
    config = job.config
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=(config.min_workers, config.workers) if config.min_workers else config.workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker=_per_worker(config),
        ),
        run_config=RunConfig(
            # Ray Train goes on silently with an earlier run of the same name: one name a round.
            name=f"{run.id[:12]}-round-{job.meta['round']:03d}",
            storage_path=config.storage or store.join(run.uri, "ray_train"),
            failure_config=FailureConfig(max_failures=3),  # Ray does not count nodes that said they would go
        ),
        datasets={"train": images},
        # Workers that hold the data see all of it and share each batch; streaming ones get equal splits.
        dataset_config=ray.train.DataConfig(datasets_to_split=[] if job.hold else "all"),
    )
    least = config.min_workers or config.workers
    session.require("training", CPU=least * config.threads, GPU=least * config.gpus_per_worker)
    with _interruptible():
        facts = _fit_while_it_goes_on(trainer, job)
    if not math.isfinite(facts["loss"]):
        loss, epoch = facts["loss"], facts["epochs"]
        raise RunError(f"training diverged in epoch {epoch}: the loss is {loss}; a smaller lr may help")
    return facts


def _fit_while_it_goes_on(trainer: TorchTrainer, job: Job) -> dict:
    """What the workers return. A long training may lose any number of them, but not too many in the same epochs."""
    while True:
        kept = _kept(job)["epochs"]
        if kept:
            progress.current().say(f"training goes on after epoch {kept} of {job.config.epochs}")
        try:
            return trainer.fit().return_value
        except WorkerGroupError:
            if _kept(job)["epochs"] == kept:
                raise


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ray Train answers Ctrl-C by ending the program as if all were well, and goes on doing so after it is done."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _per_worker(config: TrainConfig) -> dict[str, float]:
    return {"CPU": config.threads} | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {})


def train_worker(settings: dict) -> dict:
    """One Ray Train worker: epochs of SGD over its share of the data; rank 0 keeps the weights.

    Returns the epochs done and the mean loss of the last. A loss that is not finite is for the driver to raise: of what
    is raised here Ray Train thinks that it may not happen again.
    """
    job: Job = settings["job"]
    with _threads(job.config.threads):  # without workers this is the driver's own process
        return _train(job)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(job: Job) -> dict:
    config, context = job.config, ray.train.get_context()
    net, kept = _start(job)
    done, loss = kept["epochs"], kept["loss"]
    device = get_device() if config.gpus_per_worker else torch.device("cpu")
    model = prepare_model(net.to(device)) if context.get_world_size() > 1 or config.gpus_per_worker else net
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    if done:
        optimizer.load_state_dict(kept["optimizer"])
    data = _held(job) if job.hold else _streamed(job)
    bar = progress.current().bar("pretrain" if job.rotate else "train", config.epochs, "epochs")
    with _Keeper(job, context.get_world_rank() == 0) as keeper, bar as advance:
        advance(done)
        while done < config.epochs:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, done)
            loss = _epoch(job, model, optimizer, data(done), done, device)
            done += 1
            if not math.isfinite(loss):
                break
            keeper.epoch(net, optimizer, done, loss)
            advance(1)  # and nothing to ray.train.report, which takes 2 s an epoch, the period of its controller
    return {"loss": loss, "epochs": done}


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """The rate of an epoch counted from 0: decayed every `decay_every` epochs, or at each of the `milestones`."""
    steps = epoch // config.decay_every if config.decay_every else sum(epoch >= m for m in config.milestones or [])
    return config.lr * config.decay**steps


def rotations(image_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(4N, C, H, W) in 0, 90, 180, 270 degrees, and which it is (4N,) int64 (Gidaris et al. 2018, section 2)."""
    turned = torch.cat([torch.rot90(image_NCHW, k, (2, 3)) for k in range(ROTATIONS)])
    return turned, torch.arange(ROTATIONS, device=image_NCHW.device).repeat_interleave(len(image_NCHW))


def _epoch(job: Job, model, optimizer, batches: Iterator, epoch: int, device: torch.device) -> float:
    """One pass over the worker's data; the mean loss."""
    model.train()
    generator = torch.Generator().manual_seed(job.seed + epoch)
    total, count = torch.zeros((), device=device), 0
    for image, label in batches:
        image = augment.AUGMENTATIONS[job.config.augment](image, generator).to(device)
        if job.rotate:
            image, label = rotations(image)
        label = label.to(device)
        loss = F.cross_entropy(model(normalise(image, job.image)), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(label)
        count += len(label)
    sums = torch.stack([total, torch.full_like(total, count)])
    if dist.is_initialized():  # all workers come to the same loss, so all stop where it is not finite
        dist.all_reduce(sums)
    return float(sums[0] / sums[1].clamp(min=1))


def _held(job: Job):
    """All the data in memory, in the order of image_id whatever order it came in; epoch -> its batches."""
    parts = list(ray.train.get_dataset_shard("train").iter_batches(batch_size=None))
    ids = np.concatenate([p["image_id"] for p in parts])
    order = np.argsort(ids)
    image = torch.from_numpy(np.concatenate([p["image"] for p in parts])[order])
    none = np.zeros(len(ids), np.int64)
    label = torch.from_numpy(none if job.rotate else np.concatenate([p["label"] for p in parts])[order])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()

    def epoch_batches(epoch: int):
        shuffled = torch.randperm(len(image), generator=torch.Generator().manual_seed(job.seed + epoch))
        for rows in _batches_of(shuffled, job.config.batch_size, 2 * world):
            # Every worker has a like share of every batch, or gradient averaging would wait for ever.
            missing = -len(rows) % world
            rows = torch.cat([rows, shuffled[:1].expand(missing)])[rank::world]
            yield image[rows], label[rows]

    return epoch_batches


def _batches_of(rows: torch.Tensor, size: int, least: int) -> list[torch.Tensor]:
    """Split into batches; a last one of fewer than `least` rows joins the one before.

    Batch normalisation needs two rows a worker.
    """
    parts = list(rows.split(size))
    if len(parts) > 1 and len(parts[-1]) < least:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _streamed(job: Job):
    """Batches straight from Ray Data, shuffled through a seeded buffer; epoch -> its batches.

    Workers get equal splits, so up to `workers` - 1 images sit out an epoch, and a single last row does.
    """
    shard, world = ray.train.get_dataset_shard("train"), ray.train.get_context().get_world_size()

    def epoch_batches(epoch: int):
        for batch in shard.iter_batches(
            batch_size=max(1, job.config.batch_size // world),
            local_shuffle_buffer_size=SHUFFLE_ROWS,
            local_shuffle_seed=(job.seed + epoch) % 2**32,
        ):
            if len(batch["image"]) == 1 and job.config.batch_size > world:
                continue
            image = torch.from_numpy(batch["image"].copy())
            yield image, torch.from_numpy(batch["label"].copy()) if "label" in batch else torch.zeros(len(image))

    return epoch_batches


def _start(job: Job) -> tuple[torch.nn.Module, dict]:
    """The network to train and what is kept of an interrupted training of this very round, if there was one."""
    net = models.build(job.model, job.image.channels, job.classes, job.image.size, seed=0)
    kept = _kept(job)
    if kept["epochs"]:
        models.restore(net, kept["net"], job.partial)
    else:
        models.restore(net, models.load(ray.get(job.start), job.partial)[0], job.partial)
    return net, kept


def _kept(job: Job) -> dict:
    if store.exists(job.partial):
        kept = models.unpack(store.read_bytes(job.partial), job.partial, KEPT)
        if kept["meta"] == job.meta:
            return kept
    return {"epochs": 0, "loss": None}


class _Keeper:
    """Weights after the last epoch to `output`; now and then, and however it ends, all that is needed to go on to
    `partial`. writes: whether this worker does."""

    def __init__(self, job: Job, writes: bool):
        self._job, self._writes, self._last, self._not_kept = job, writes, time.monotonic(), None

    def __enter__(self) -> "_Keeper":
        return self

    def __exit__(self, *_) -> None:
        self.keep()

    def epoch(self, net: torch.nn.Module, optimizer: torch.optim.Optimizer, epochs: int, loss: float) -> None:
        if not self._writes:
            return
        job = self._job
        last = epochs == job.config.epochs
        if last and job.output:
            store.write_bytes(job.output, models.save(net, job.meta))
        state = {"meta": job.meta, "epochs": epochs, "loss": loss, "net": net.state_dict()}
        self._not_kept = copy.deepcopy(state | {"optimizer": optimizer.state_dict()})  # the next epoch changes them
        if last or epochs % job.config.checkpoint_every == 0 or time.monotonic() - self._last > KEEP_SECONDS:
            self.keep()

    def keep(self) -> None:
        """The last finished epoch, unless it is kept."""
        if self._not_kept:
            buffer = io.BytesIO()
            torch.save(self._not_kept, buffer)
            store.write_bytes(self._job.partial, buffer.getvalue())
            self._not_kept, self._last = None, time.monotonic()
