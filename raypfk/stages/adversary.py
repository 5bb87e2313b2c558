"""Adversary: what tells a round's labelled images from unlabelled ones, trained from random weights through Ray Train
(Sinha et al. 2019, Algorithm 1).

Every draw of randomness is seeded by (run, round, step): an interrupted training goes on to the same weights.
"""

import math
from dataclasses import dataclass

import ray
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor

from raypfk import models, progress, session, store
from raypfk.config import TrainConfig, VaalConfig
from raypfk.errors import RunError
from raypfk.pfk.vaal import Adversary
from raypfk.pool import Shard
from raypfk.run import ImageSpec, Run
from raypfk.stages import fitting
from raypfk.stages.stream import Decoder, adversary, adversary_of, decoded, normalise, rejects_of

KINDS = ("labelled", "unlabelled")
HOLD_BYTES = 1024**3
"""Images of either kind of up to so many bytes, decoded, are held in every worker's memory; of more, about as many are
drawn."""
LEG = 50
"""Steps between two states that may be kept: what an epoch is to `train.checkpoint_every`."""
LOSSES = ("vae_loss", "discriminator_loss")
KEPT = ("meta", "steps", "losses", "net", "vae", "discriminator")
"""Of an interrupted training."""


@dataclass(frozen=True)
class Job:
    """What a training worker is told. spread: over which workers. output, partial: where the weights go at the end, and
    what is needed to go on."""

    config: VaalConfig
    spread: TrainConfig
    image: ImageSpec
    seed: int
    output: str
    partial: str
    meta: dict


def train_adversary(run: Run, round: int) -> dict:
    """Write round `round`'s adversary.pt, unless it is there.

    Returns the passes it took, of an image each (a step of the discriminator takes the encoder's alone), and the mean
    losses of its last steps.
    """
    config, files = run.config.vaal, run.round(round)
    if not store.exists(files.adversary):
        meta = {"run": run.id, "round": round}
        seed = run.seed("adversary", round)
        _fit(run, Job(config, run.config.train, run.image, seed, files.adversary, files.adversary_training, meta))
    store.delete(files.adversary_training)
    _, meta = adversary_of(run, round)
    images = 2 * config.batch_size * config.steps
    passes = {"forward": images * (config.vae_steps + 1), "backward": images * config.vae_steps}
    return passes | {name: meta[name] for name in LOSSES}


def _fit(run: Run, job: Job) -> None:
    labelled, pool = run.labelled(job.meta["round"])["image_id"].combine_chunks(), run.pool
    ids, shards = ray.put(labelled), pool.locate(labelled.to_pylist())
    datasets = {
        "labelled": _images(run, job, shards, len(labelled), "labelled", keep=ids),
        "unlabelled": _images(run, job, pool.shards("pool"), pool.rows("pool") - len(labelled), "unlabelled", drop=ids),
    }

    def kept() -> str:
        done = _kept(job)["steps"]
        return f"step {done} of {job.config.steps}" if done else ""

    name = f"round-{job.meta['round']:03d}-adversary"
    facts = fitting.fit(run, name, adversary_worker, job, job.spread, datasets, [], kept)
    if not all(map(math.isfinite, facts["losses"])):
        said = f"the losses are {facts['losses']}; a smaller vaal.lr may help"
        raise RunError(f"the adversary's training diverged by step {facts['steps']}: {said}")


def _images(run: Run, job: Job, shards: list[Shard], count: int, kind: str, **which: ray.ObjectRef) -> ray.data.Dataset:
    """Of `count` images of a kind, decoded, about as many as are held."""
    held = HOLD_BYTES // (run.image.channels * run.image.size**2)
    rejects = run.round(job.meta["round"]).rejects(kind)
    decoder = Decoder(run.pool, run.image, rejects=rejects, share=held / max(1, count), seed=job.seed, **which)
    images = decoded(shards, decoder).materialize()
    rejects_of(run, "pool", rejects).look()
    if not images.count():
        raise RunError(f"{run.pool.uri}: none of {count} {kind} images can be read, why is in {rejects}")
    return images


def adversary_worker(settings: dict) -> dict:
    """One Ray Train worker: steps of Adam over its share of each batch; rank 0 keeps the weights.

    Returns the steps done, and the mean losses of the last leg. Losses that are not finite are for the driver to raise.
    """
    job: Job = settings["job"]
    with session.threads(job.spread.threads):
        return _train(job)


def _train(job: Job) -> dict:
    config, device, kept = job.config, fitting.device(job.spread), _kept(job)
    done, losses = kept["steps"], kept["losses"]
    net = models.seeded(lambda: adversary(config, job.image), job.seed)
    if done:
        models.restore(net, kept["net"], job.partial)
    net.to(device).train()
    optimizers = {name: torch.optim.Adam(part.parameters(), lr=config.lr) for name, part in net.named_children()}
    for name, optimizer in optimizers.items():
        if done:
            optimizer.load_state_dict(kept[name])
    held = [fitting.all_of(kind, "image")[0] for kind in KINDS]
    first = ray.train.get_context().get_world_rank() == 0
    bar = progress.current().bar("adversary", config.steps, "steps")
    with fitting.Keeper(job.partial, job.spread.checkpoint_every, first) as keeper, bar as advance:
        advance(done)
        while done < config.steps:
            steps = range(done, min(done + LEG, config.steps))
            losses, done = _leg(job, net, optimizers, held, steps, device), steps.stop
            if not all(map(math.isfinite, losses)):
                break
            last = done == config.steps
            if first and last:
                meta = job.meta | dict(zip(LOSSES, losses, strict=True))
                store.write_bytes(job.output, models.save(net, meta))
            state = {"meta": job.meta, "steps": done, "losses": losses, "net": net.state_dict()}
            state |= {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
            keeper.finished(state, -(-done // LEG), last)
            advance(len(steps))
    return {"steps": done, "losses": losses}


def _leg(
    job: Job, net: Adversary, optimizers: dict[str, torch.optim.Optimizer], held: list[Tensor], steps: range,
    device: torch.device,
) -> list[float]:  # fmt: skip
    """Some steps; the mean losses of both networks, over all workers."""
    config, world = job.config, ray.train.get_context().get_world_size()
    totals = torch.zeros(len(LOSSES), device=device)
    for step in steps:
        generator = torch.Generator().manual_seed(job.seed + step)
        for _ in range(config.vae_steps):
            labelled, unlabelled = (_drawn(job, images, generator, device) for images in held)
            # The divergence is a sum over the batch, and gradients are averaged over its parts.
            vae_loss = net.vae_loss(labelled, unlabelled, config.beta * world, config.adversary)
            _descend(optimizers["vae"], vae_loss)
        discriminator_loss = net.discriminator_loss(labelled[0], unlabelled[0])
        _descend(optimizers["discriminator"], discriminator_loss)
        totals += torch.stack([vae_loss, discriminator_loss]).detach()
    if dist.is_initialized():  # all workers come to the same losses, so all stop where one is not finite
        dist.all_reduce(totals)
    return (totals / (len(steps) * world)).tolist()


def _drawn(job: Job, images: Tensor, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """This worker's share of a batch, drawn with replacement, as the network sees it; and of the VAE's noise."""
    size = job.config.batch_size
    rows = torch.randint(len(images), (size,), generator=generator)
    noise = torch.randn(size, job.config.latent, generator=generator)
    mine = fitting.share(torch.arange(size), torch.zeros(1, dtype=torch.int64))
    return normalise(images[rows[mine]].to(device), job.image), noise[mine].to(device)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step, by the mean of all workers' gradients. (DistributedDataParallel takes one forward pass a step.)"""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    if dist.is_initialized():
        for parameter in parameters:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    optimizer.step()


def _kept(job: Job) -> dict:
    return fitting.kept(job.partial, job.meta, KEPT) or {"steps": 0, "losses": None}
