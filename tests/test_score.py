"""Handing shards to scoring actors, and merging what they give."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import ray
import torch

from raypfk import loop
from raypfk.errors import RunError
from raypfk.pfk import TopK
from raypfk.stages import score
from tests import tiny

pytestmark = pytest.mark.usefixtures("ray_session")

M, K = 5, 3
EVERY = [[(i, f"shard{i}")] for i in range(30)]


def part(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A made-up top-K, with ties among parts."""
    generator = torch.Generator().manual_seed(number)
    scores = torch.randint(-4, 5, (M, K), generator=generator).float().sort(dim=1, descending=True).values
    return scores.numpy(), (torch.arange(K).expand(M, K) + 1000 * number).numpy()


@ray.remote(num_cpus=0)
class Fake:
    """Gives `part`s; dies at the shards named in `deadly`, and at any call after `calls`."""

    def __init__(self, deadly: tuple[int, ...] = (), calls: int = 1000):
        self.deadly, self.calls = deadly, calls

    def ready(self):
        pass

    def score(self, shards, k, rows, floor):
        self.calls -= 1
        (number, _), *_ = shards
        if number in self.deadly or self.calls < 0:
            os._exit(1)
        scores, keys = (x[rows] for x in part(number))
        return (scores, keys), {"shards": 1, "images": K, "floor": scores[:, -1].copy(), "number": number}

    def merge(self, *parts):
        self.calls -= 1
        if self.calls < 0:
            os._exit(1)
        return score.Scorer.merge(None, *parts)


def whole() -> TopK:
    top = TopK(M, K)
    for ((number, _),) in EVERY:
        top.merge(TopK.of(*map(torch.from_numpy, part(number))))
    return top


def run(actors) -> tuple[Counter[int], score.Tree]:
    tree, images = score.Tree(M), Counter()
    try:
        for facts in score.through(actors, [shard for (shard,) in EVERY], [score._FIRST] * 30, K, range(M), tree):
            images[facts["number"]] += facts["images"]
        return images, tree
    finally:
        for actor in actors:
            ray.kill(actor)


def check(actors):
    images, tree = run(actors)
    scores, keys = whole().result()
    assert images == dict.fromkeys(range(30), K)
    got = tree.whole()
    assert np.array_equal(got[0], scores.numpy()) and np.array_equal(got[1], keys.numpy())
    assert (tree.floor <= scores[:, -1].numpy()).all() and (tree.floor > -np.inf).all()


def test_the_tree_merges_every_part_once():
    """Thirty parts through actors and a tree of merges: the top-K of all; floors never above its K-th best."""
    check([Fake.remote() for _ in range(2)])
    check([Fake.remote() for _ in range(M + 2)])


def test_a_lost_actors_chunk_goes_to_another():
    """Actors that die for good, at once or later, cost nothing but their chunk's time."""
    check([Fake.remote(calls=0), Fake.remote(calls=3), Fake.remote()])
    check([*(Fake.remote(calls=0) for _ in range(4)), Fake.remote()])  # four deaths, but at four jobs


def test_the_driver_goes_on_with_its_own_threads(tmp_path):
    """Scoring in the driver takes as many as an actor would, for as long as it scores."""
    run = tiny.begin(tiny.config(), tmp_path / "run")
    loop.do_stage(run, 1, "extract")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        loop.do_stage(run, 1, "score")
        assert torch.get_num_threads() == 3 != run.config.resources.score_threads
    finally:
        torch.set_num_threads(before)


def test_without_actors_it_is_said():
    """When all are dead the error counts what is left; a chunk that kills whoever takes it is named."""
    with pytest.raises(RunError, match=r"all 2 scoring actors died; \d+ shards are not scored"):
        run([Fake.remote(calls=2) for _ in range(2)])
    with pytest.raises(RunError, match="shard7: 4 actors died"):
        run([Fake.remote(deadly=(7,)) for _ in range(6)])


@pytest.mark.slow
def test_a_node_lost_while_it_scores(tmp_path):
    """A node of a cluster vanishes with its actors and the top-Ks it held: the candidates are those of one machine."""
    command = [sys.executable, "-m", "tests.lose_a_node", str(tmp_path)]
    root = os.path.dirname(os.path.dirname(__file__))
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same candidates" in done.stdout
