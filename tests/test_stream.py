"""The pipeline's two ways to use decoded images: actors, which hold a GPU, and tasks."""

import numpy as np
import pytest

from raypfk.stages import stream
from raypfk.stages.evaluate import Evaluator
from raypfk.stages.stream import Decoder
from tests import tiny


@pytest.fixture(scope="module")
def run(ray_session, tmp_path_factory):
    return tiny.begin(tiny.config(data__shard_rows=64), tmp_path_factory.mktemp("run") / "run")


class Counter:
    """How many were made in this process, and which of them this is."""

    made = 0

    def __init__(self, what: str):
        Counter.made += 1
        self.what = what

    def __call__(self, shard: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            "what": np.array([self.what]),
            "made": np.array([Counter.made]),
            "images": np.array([len(shard["image"])]),
        }


def through(way, run, actor: type, kwargs: dict, count: int = 2) -> list[dict[str, np.ndarray]]:
    decoder = Decoder(run.pool, run.image, ("image_id", "label"))
    dataset = way(run.pool.shards("test"), decoder, actor, kwargs, count, 0)
    return list(dataset.iter_batches(batch_size=None))


def test_tasks_do_what_actors_do(run):
    """The same predictions of the same images, to be found in the same order."""
    kwargs = {"network": stream.network_of(run, 0), "batch_size": 64}
    actors, tasks = (through(way, run, Evaluator, kwargs) for way in (stream.by_actors, stream.by_tasks))
    assert len(actors) == len(tasks) == len(run.pool.shards("test")) > 2
    for one, other in zip(actors, tasks, strict=True):
        assert np.array_equal(one["label"], other["label"]) and np.array_equal(one["predicted"], other["predicted"])


def test_a_process_makes_one_actor_of_a_stage(run):
    """It serves all of the process's shards of a stage, and none of the next stage."""
    shards = len(run.pool.shards("test"))
    for what in ("first", "second"):
        done = through(stream.by_tasks, run, Counter, {"what": what}, count=1)
        assert [str(part["what"][0]) for part in done] == [what] * shards
        assert max(int(part["made"][0]) for part in done) <= 2
        assert sum(int(part["images"][0]) for part in done) == run.pool.rows("test")
