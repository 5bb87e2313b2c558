"""Scores a round on one node, then on two of which one vanishes meanwhile; compares. In a process of its own."""

import sys
import threading
import time

import ray
from ray.cluster_utils import Cluster

from raypfk import loop
from raypfk.stages import score
from tests import tiny


def main(out: str) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    ray.init(address=cluster.address, log_to_driver=False)
    run = tiny.begin(tiny.config(data__shard_rows=8, resources={"extract_actors": 1, "score_actors": 1}), out)
    for stage in ("extract", "score"):
        loop.do_stage(run, 1, stage)
    expected = run.read(run.round(1).candidates)
    other = cluster.add_node(num_cpus=8)
    cluster.wait_for_nodes()
    busy = run.config.model_copy(update={"resources": run.config.resources.model_copy(update={"score_actors": 8})})
    object.__setattr__(run, "config", busy)
    lost = threading.Event()

    def lose() -> None:
        while len(seen) < 20:
            time.sleep(0.01)
        cluster.remove_node(other, allow_graceful=False)
        lost.set()

    seen, plain = [], score.Tree.add

    def add(self, top, floor, job=None):  # tells how far it is, and waits where the node must be lost before the end
        seen.append(top)
        merges = plain(self, top, floor, job)
        if len(seen) == 25:
            lost.wait(60)
        return merges

    score.Tree.add, score._FIRST = add, 1
    threading.Thread(target=lose, daemon=True).start()
    score.score(run, 1)
    assert lost.is_set()
    while sum(node["Alive"] for node in ray.nodes()) > 1:  # until heartbeats are missed
        time.sleep(0.1)
    assert run.read(run.round(1).candidates).equals(expected)
    print("same candidates", flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
