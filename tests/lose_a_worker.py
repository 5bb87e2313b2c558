"""Trains on two nodes, of which one vanishes meanwhile; says on how many workers, and from which epochs.

In a process of its own.
"""

import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import ray
import torch
from ray.cluster_utils import Cluster

from raypfk import models, store
from raypfk.stages import train
from tests import tiny

EPOCHS = 20


def main(out: str) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
    ray.init(address=cluster.address, log_to_driver=False)
    other = cluster.add_node(num_cpus=3)
    cluster.wait_for_nodes()
    settings = {"epochs": EPOCHS, "workers": 2, "min_workers": 1, "threads": 2, "checkpoint_every": 1}
    run = tiny.labelled(Path(out), budget=16, train=tiny.TREE["train"] | settings)
    kept, began = Path(run.round(1).training), Path(out, "began.txt")

    def lose() -> None:
        while not kept.exists():
            time.sleep(0.01)
        cluster.remove_node(other, allow_graceful=False)

    threading.Thread(target=lose, daemon=True).start()
    train.train_worker = _watched(train.train_worker, str(began))
    train.train(run, 1)
    lines = [tuple(map(int, line.split())) for line in began.read_text().splitlines()]
    assert lines[0] == (2, 0) and lines[-1][0] == 1 and lines[-1][1] > 0, lines
    weights, _ = models.load(store.read_bytes(run.round(1).checkpoint), "")
    kept.unlink()
    plain = run.config.train.model_copy(update={"workers": 0, "min_workers": None})
    train.train(replace(run, config=run.config.model_copy(update={"train": plain})), 1)
    expected, _ = models.load(store.read_bytes(run.round(1).checkpoint), "")
    assert all(torch.allclose(value, expected[name], atol=1e-4) for name, value in weights.items())
    print("same weights", lines, flush=True)
    ray.shutdown()
    cluster.shutdown()


def _watched(worker, began: str):
    """A worker that says that it begins, and whose epochs last long enough to be lost."""

    def watched(settings: dict) -> dict:
        context = ray.train.get_context()
        if context.get_world_rank() == 0:
            with open(began, "a") as file:
                print(context.get_world_size(), train._kept(settings["job"])["epochs"], file=file)
        epoch = train._epoch

        def slow(*args):
            time.sleep(0.5 if context.get_world_size() > 1 else 0)
            return epoch(*args)

        train._epoch = slow
        return worker(settings)

    return watched


if __name__ == "__main__":
    main(sys.argv[1])
