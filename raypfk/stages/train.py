"""Train: Ray Train on all labels bought so far, from the last round's weights (Algorithm 1, line 11); and before the
first round rotation pretraining (Gidaris et al. 2018), or random weights.

Every draw of randomness is seeded by (run, round, epoch): an interrupted training goes on to the same weights.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import ray
import ray.train
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ray.train.torch import prepare_model

from raypfk import augment, models, progress, session, store
from raypfk.config import TrainConfig
from raypfk.errors import RunError, UserError
from raypfk.models import Architecture
from raypfk.pool import Shard
from raypfk.rejects import Rejects, TooMany
from raypfk.run import ImageSpec, Run
from raypfk.stages import fitting
from raypfk.stages.stream import Decoder, checkpoint_of, decoded, normalise, rejects_of

ROTATIONS = 4
HOLD_BYTES = 2 * 1024**3
"""Training images of up to so many bytes, decoded, are held in every worker's memory; more are streamed each epoch."""
MONITORED = 1024
"""Test images of a forward pass."""
SHUFFLE_ROWS = 16384
"""Rows of the local shuffle buffer when streaming."""
KEPT = ("meta", "epochs", "loss", "monitored", "net", "optimizer")
"""Of an interrupted training."""


@dataclass(frozen=True)
class Job:
    """What a training worker is told. seed: of the round. start: checkpoint bytes to begin from (by reference).

    rotate: learn the rotation instead of a label. hold: the data set fits in memory. partial: where all goes that is
    needed to go on. output: where the weights go at the end, if anywhere else.
    """

    config: TrainConfig
    image: ImageSpec
    architecture: Architecture
    rotate: bool
    seed: int
    start: ray.ObjectRef
    hold: bool
    output: str | None
    partial: str
    meta: dict


def pretrain(run: Run, round: int = 0) -> dict:
    """Write rounds/000's checkpoint: all layers but the last from rotation pretraining, or random weights.

    Of an ensemble (Beluch et al. 2018) each network: with a last layer of its own, or with weights of its own.
    """
    config, files = run.config, run.round(0)
    if config.pretrain is None:
        for member in range(run.members):
            net = run.architecture.build(_seed(run, "weights", member=member))
            store.write_bytes(files.checkpoint_of(member), models.save(net, _meta(run, 0, member)))
        return {"loss": None, "forward": 0, "backward": 0}
    net = run.architecture.build(run.seed("weights"))
    models.replace_last_layer(net, ROTATIONS, run.seed("rotation layer"))
    rows = run.pool.rows("pool")
    job = _job(run, 0, config.pretrain, rows, models.save(net, _meta(run, 0)))
    turned = replace(run.architecture, classes=ROTATIONS)
    job = replace(job, architecture=turned, rotate=True, output=None)  # the round's checkpoint has other outputs
    decoder = Decoder(run.pool, run.image, rejects=files.rejects("pool"))
    images = decoded(_order(run, job, run.pool.shards("pool")), decoder)
    facts = _fit(run, job, {"train": images})
    rejects = rejects_of(run, "pool", decoder.rejects)
    try:
        rejects.look()
    except TooMany:
        store.delete(job.partial)  # or the next try would find all epochs done
        raise
    models.restore(net, _kept(job)["net"], job.partial)
    _begin(run, net)
    return facts | _passes(config.pretrain.epochs * (rows - rejects.count) * ROTATIONS)


def adopt(run: Run, other: Run) -> dict:
    """Write rounds/000's checkpoint from that of another run of the same pool, network, pretraining and seed: the
    weights that `pretrain` would come to. UserError where the pool is another."""
    if other.pool.fingerprint != run.pool.fingerprint:
        found = f"those of {other.uri} are of the pool {other.pool.fingerprint[:12]}"
        raise UserError(f"{run.uri}: expected weights of the pool {run.pool.fingerprint[:12]}, {found}")
    net, origin = run.architecture.build(), other.round(0).checkpoint
    models.restore(net, models.load(checkpoint_of(other, 0), origin)[0], origin)
    _begin(run, net)
    return {"loss": None, "adopted": other.uri, "forward": 0, "backward": 0}


def _begin(run: Run, net: torch.nn.Module) -> None:
    """Pretrained layers, and a last one of each member's own."""
    for member in range(run.members):
        models.replace_last_layer(net, run.classes, _seed(run, "last layer", member=member))
        store.write_bytes(run.round(0).checkpoint_of(member), models.save(net, _meta(run, 0, member)))


def train(run: Run, round: int) -> dict:
    """Write round `round`'s checkpoint, trained on the labels of rounds 1..round from round-1's weights.

    Of an ensemble each network by itself, in its own order of the images; the facts are the first one's.
    """
    labels, config = run.labelled(round + 1), run.config.train
    members = range(run.members)
    jobs = [_job(run, round, config, labels.num_rows, checkpoint_of(run, round - 1, i), i) for i in members]
    shards = _order(run, jobs[0], run.pool.locate(labels["image_id"].to_pylist()))
    wanted, rejects = ray.put(labels["image_id"].combine_chunks()), run.round(round).rejects("train")
    decoder = Decoder(run.pool, run.image, keep=wanted, rejects=rejects)
    # Read and decoded once: the labelled images lie scattered over the pool's shards.
    images = decoded(shards, decoder).map_batches(_Labels(ray.put(labels)), batch_size=None).materialize()
    count = images.count()
    if count < labels.num_rows:
        _leave_out(run, labels.num_rows, count, rejects)
    datasets, monitored = {"train": images}, {}
    if config.monitor:
        datasets["test"] = _test_images(run, round)
        monitored["monitor_forward"] = config.epochs * datasets["test"].count()
    facts = [_fit(run, job, datasets) for job in jobs]
    return facts[0] | _passes(config.epochs * count * len(jobs)) | monitored


def _test_images(run: Run, round: int) -> ray.data.Dataset:
    decoder = Decoder(run.pool, run.image, ("image_id", "label"), rejects=run.round(round).rejects("test"))
    return decoded(run.pool.shards("test"), decoder).materialize()


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


def _job(run: Run, round: int, config: TrainConfig, rows: int, start: bytes, member: int = 0) -> Job:
    image, files = run.image, run.round(round)
    return Job(
        config, image, run.architecture, False, _seed(run, "train", round, member=member), ray.put(start),
        rows * image.channels * image.size**2 <= HOLD_BYTES, files.checkpoint_of(member), files.training_of(member),
        _meta(run, round, member),
    )  # fmt: skip


def _seed(run: Run, *names: str | int, member: int) -> int:
    """Of a member of the ensemble: the first has the seed of a network that is alone."""
    return run.seed(*names, *([member] if member else []))


def _meta(run: Run, round: int, member: int = 0) -> dict:
    return {
        "run": run.id,
        "round": round,
        "member": member,
        "name": run.config.model.name,
        "classes": run.classes,
        "channels": run.image.channels,
        "size": run.image.size,
    }


def _passes(images: int) -> dict:
    return {"forward": images, "backward": images}


def _fit(run: Run, job: Job, datasets: dict[str, ray.data.Dataset]) -> dict:
    config = job.config
    name = f"round-{job.meta['round']:03d}-{job.meta['member']}"
    # Workers that hold the data see all of it and share each batch; streaming ones get equal splits.
    split = [] if job.hold else ["train"]

    def kept() -> str:
        done = _kept(job)["epochs"]
        return f"epoch {done} of {config.epochs}" if done else ""

    facts = fitting.fit(run, name, train_worker, job, config, datasets, split, kept)
    if not math.isfinite(facts["loss"]):
        loss, epoch = facts["loss"], facts["epochs"]
        raise RunError(f"training diverged in epoch {epoch}: the loss is {loss}; a smaller lr may help")
    return facts


def train_worker(settings: dict) -> dict:
    """One Ray Train worker: epochs of SGD over its share of the data; rank 0 keeps the weights.

    Returns the epochs done, the mean loss of the last and, where it is monitored, the test accuracy after each. A loss
    that is not finite is for the driver to raise: of what is raised here Ray Train thinks that it may not happen again.
    """
    job: Job = settings["job"]
    with session.threads(job.config.threads), torch.random.fork_rng(devices=[]):
        return _train(job)


def _train(job: Job) -> dict:
    config, context = job.config, ray.train.get_context()
    net, kept = _start(job)
    done, loss, monitored = kept["epochs"], kept["loss"], kept["monitored"]
    device = fitting.device(config)
    model = prepare_model(net.to(device)) if context.get_world_size() > 1 or config.gpus_per_worker else net
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    if done:
        optimizer.load_state_dict(kept["optimizer"])
    data, monitor = _held(job) if job.hold else _streamed(job), _monitor(job, device)
    bar = progress.current().bar("pretrain" if job.rotate else "train", config.epochs, "epochs")
    first = context.get_world_rank() == 0
    with fitting.Keeper(job.partial, config.checkpoint_every, first) as keeper, bar as advance:
        advance(done)
        while done < config.epochs:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, done)
            loss = _epoch(job, model, optimizer, data(done), done, device)
            done += 1
            if not math.isfinite(loss):
                break
            monitored = [*monitored, *monitor(net)]
            last = done == config.epochs
            if first and last and job.output:
                store.write_bytes(job.output, models.save(net, job.meta))
            state = {"meta": job.meta, "epochs": done, "loss": loss, "monitored": monitored, "net": net.state_dict()}
            keeper.finished(state | {"optimizer": optimizer.state_dict()}, done, last)
            advance(1)  # and nothing to ray.train.report, which takes 2 s an epoch, the period of its controller
    return {"loss": loss, "epochs": done} | ({"monitored": monitored} if monitored else {})


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
    _seed_dropout(job, epoch)
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


def _seed_dropout(job: Job, epoch: int) -> None:
    """Masks of dropout: of this epoch and worker, whatever was drawn before."""
    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed((job.seed + (rank << 32) + epoch) ^ 0x5DEECE66D)


def _monitor(job: Job, device: torch.device):
    """The network -> [its accuracy on the test set], by the first worker; [] where it is not asked for, and of an
    ensemble's others, which are not evaluated."""
    asked = job.config.monitor and not job.meta["member"]
    if not asked or ray.train.get_context().get_world_rank():
        return lambda net: []
    image, label = fitting.all_of("test", "image", "label")

    def accuracy(net: torch.nn.Module) -> list[float]:
        net.eval()
        with torch.inference_mode():
            right = [
                (net(normalise(x.to(device), job.image)).argmax(1).cpu() == y).sum()
                for x, y in zip(image.split(MONITORED), label.split(MONITORED), strict=True)
            ]
        return [float(sum(right)) / len(label)]

    return accuracy


def _held(job: Job):
    """All the data in memory; epoch -> its batches."""
    image, *labels = fitting.all_of("train", "image", *([] if job.rotate else ["label"]))
    label = labels[0] if labels else torch.zeros(len(image), dtype=torch.int64)
    world = ray.train.get_context().get_world_size()

    def epoch_batches(epoch: int):
        shuffled = _shuffled(label, job.config.balanced, torch.Generator().manual_seed(job.seed + epoch))
        for rows in _batches_of(shuffled, job.config.batch_size, 2 * world):
            rows = fitting.share(rows, shuffled[:1])
            yield image[rows], label[rows]

    return epoch_batches


def _shuffled(label: torch.Tensor, balanced: bool, generator: torch.Generator) -> torch.Tensor:
    """As many rows as there are, in random order; balanced: drawn with replacement, each class with the same chance."""
    if not balanced:
        return torch.randperm(len(label), generator=generator)
    weight = 1 / torch.bincount(label).double()[label]
    return torch.multinomial(weight, len(label), replacement=True, generator=generator)


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

    Workers get equal splits, so up to `workers` - 1 images sit out an epoch, and a single last row does. Balanced,
    images are drawn among so many as the buffer holds.
    """
    shard, world = ray.train.get_dataset_shard("train"), ray.train.get_context().get_world_size()
    size = max(1, job.config.batch_size // world)
    balanced = job.config.balanced

    def epoch_batches(epoch: int):
        generator = torch.Generator().manual_seed(job.seed + epoch)
        for batch in shard.iter_batches(
            batch_size=SHUFFLE_ROWS if balanced else size,
            local_shuffle_buffer_size=SHUFFLE_ROWS,
            local_shuffle_seed=(job.seed + epoch) % 2**32,
        ):
            image = torch.from_numpy(batch["image"].copy())
            label = torch.from_numpy(batch["label"].copy()) if "label" in batch else torch.zeros(len(image))
            order = _shuffled(label, True, generator) if balanced else torch.arange(len(image))
            for rows in order.split(size):
                if len(rows) > 1 or size == 1:
                    yield image[rows], label[rows]

    return epoch_batches


def _start(job: Job) -> tuple[torch.nn.Module, dict]:
    """The network to train and what is kept of an interrupted training of this very round, if there was one."""
    net, kept = job.architecture.build(), _kept(job)
    if kept["epochs"]:
        models.restore(net, kept["net"], job.partial)
    else:
        models.restore(net, models.load(ray.get(job.start), job.partial)[0], job.partial)
    return net, kept


def _kept(job: Job) -> dict:
    return fitting.kept(job.partial, job.meta, KEPT) or {"epochs": 0, "loss": None, "monitored": []}
