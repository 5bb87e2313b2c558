"""A training in Ray Train that may be interrupted: it is spread over workers as `TrainConfig` says, and goes on from
what was kept of it.
"""

import copy
import io
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray.data
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer, get_device

from raypfk import models, progress, session, store
from raypfk.config import TrainConfig
from raypfk.run import Run

KEEP_SECONDS = 30.0
"""A finished epoch is kept if the last one kept is older. What a lost worker loses is bounded by this and an epoch, and
by nothing it could do at the end: Ray ends a process without a word to the thread that trains in it."""


# -------------------------------------------------------------------------------------------------------- the driver


def fit(
    run: Run, name: str, worker: Callable[[dict], dict], job: Any, config: TrainConfig,
    datasets: dict[str, ray.data.Dataset], split: list[str], kept: Callable[[], str],
) -> dict:  # fmt: skip
    """What `worker({"job": job})` returns, by its first worker.

    name: of this training within the run. split: data sets of which each worker gets a part of its own. kept: says
    after what the training would go on, as "epoch 3 of 20"; "" at its beginning.
    """
    trainer = TorchTrainer(
        worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=(config.min_workers, config.workers) if config.min_workers else config.workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker=_per_worker(config),
        ),
        run_config=RunConfig(
            # Ray Train goes on silently with an earlier run of the same name: one name a training.
            name=f"{run.id[:12]}-{name}",
            storage_path=config.storage or store.join(run.uri, "ray_train"),
            failure_config=FailureConfig(max_failures=3),  # Ray does not count nodes that said they would go
        ),
        datasets=datasets,
        dataset_config=ray.train.DataConfig(datasets_to_split=split),
    )
    least = config.min_workers or config.workers
    session.require("training", CPU=least * config.threads, GPU=least * config.gpus_per_worker)
    with _interruptible():
        return _fit_while_it_goes_on(trainer, kept)


def _fit_while_it_goes_on(trainer: TorchTrainer, kept: Callable[[], str]) -> dict:
    """What the workers return. A long training may lose any number of them, but not too many at the same place."""
    while True:
        before = kept()
        if before:
            progress.current().say(f"training goes on after {before}")
        try:
            return trainer.fit().return_value
        except WorkerGroupError:
            if kept() == before:
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


# -------------------------------------------------------------------------------------------------------- its workers


def device(config: TrainConfig) -> torch.device:
    return get_device() if config.gpus_per_worker else torch.device("cpu")


def all_of(name: str, *columns: str) -> list[torch.Tensor]:
    """Columns of all of a data set, in the order of image_id whatever order it came in."""
    parts = list(ray.train.get_dataset_shard(name).iter_batches(batch_size=None))
    order = np.argsort(np.concatenate([p["image_id"] for p in parts]))
    return [torch.from_numpy(np.concatenate([p[column] for p in parts])[order]) for column in columns]


def share(rows: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """This worker's rows of a batch. spare: a row (1,) that fills the batch up where it is uneven.

    Every worker has a like share of every batch, or gradient averaging would wait for ever.
    """
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    missing = -len(rows) % world
    return torch.cat([rows, spare.expand(missing)])[rank::world]


# ------------------------------------------------------------------------------------------------------- what is kept


class Keeper:
    """Keeps a state at `path` now and then, and however the training ends: the one that was finished last.

    every: of so many states one is kept at once. writes: whether this worker does.
    """

    def __init__(self, path: str, every: int, writes: bool):
        self._path, self._every, self._writes = path, every, writes
        self._last, self._not_kept = time.monotonic(), None

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *_) -> None:
        self.keep()

    def finished(self, state: dict, number: int, last: bool) -> None:
        """The state after epoch (or what else is counted) `number`, from 1."""
        if not self._writes:
            return
        self._not_kept = copy.deepcopy(state)  # the next epoch changes it
        if last or number % self._every == 0 or time.monotonic() - self._last > KEEP_SECONDS:
            self.keep()

    def keep(self) -> None:
        """The last finished state, unless it is kept."""
        if self._not_kept:
            buffer = io.BytesIO()
            torch.save(self._not_kept, buffer)
            store.write_bytes(self._path, buffer.getvalue())
            self._not_kept, self._last = None, time.monotonic()


def kept(path: str, meta: dict, names: tuple[str, ...]) -> dict | None:
    """What is kept, under these names, of an interrupted training of just this `meta`, if there was one."""
    if store.exists(path):
        state = models.unpack(store.read_bytes(path), path, names)
        if state["meta"] == meta:
            return state
    return None
