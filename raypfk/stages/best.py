"""The best P images by a score of their own, from files that Ray tasks read; O(P) memory, whatever the pool's size."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray
import torch

from raypfk import session, store
from raypfk.pool import Shard
from raypfk.run import Run
from raypfk.salts import salts

_CHUNKS = 4
"""Tasks for each CPU: enough that the last ones end together."""
Read = Callable[[Run, int, Shard], pa.Table]
"""Of a shard the ids, `image_id` string, and what else the scores are made of."""
Score = Callable[[pa.Table], np.ndarray]
"""(N,) float64 of a table's images; NaN comes last."""


def best(run: Run, round: int, read: Read, score: Score) -> pa.Table:
    """(image_id, score) of at most P images, in order: by score descending, of equals as the seed draws them."""
    job = _Job(run, round, read, score)
    table = pa.table({"image_id": pa.array([], pa.string()), "score": pa.array([], pa.float64())})
    for part in _each(lambda shards: job.of(shards), run.pool.shards("pool")):
        table = job.first(pa.concat_tables([table, part]))
    return table


def counts(run: Run, round: int) -> torch.Tensor:
    """The pool's images (D,) int64 of each class, as the label estimator has it."""

    def of(shards: list[Shard]) -> np.ndarray:
        tables = (described(run, round, shard) for shard in shards)
        return sum(np.bincount(table["estimated_label"], minlength=run.classes) for table in tables)

    return torch.from_numpy(sum(_each(of, run.pool.shards("pool"))))


def described(run: Run, round: int, shard: Shard) -> pa.Table:
    """What extraction wrote of a shard, without its vectors."""
    path = store.join(run.round(round).descriptors, shard.name)
    return run.read(path, columns=["image_id", "predicted", "estimated_label"])


def _each(do: Callable[[list[Shard]], object], shards: list[Shard]) -> Iterator:
    """`do` of some shards at a time, in tasks; what they return, in the order of the shards."""
    size = max(1, len(shards) // (_CHUNKS * session.cpus()))
    task = ray.remote(do)
    return map(session.result, [task.remote(shards[i : i + size]) for i in range(0, len(shards), size)])


@dataclass(frozen=True)
class _Job:
    run: Run
    round: int
    read: Read
    score: Score

    def of(self, shards: list[Shard]) -> pa.Table:
        tables = [self.read(self.run, self.round, shard) for shard in shards]
        scored = [pa.table({"image_id": t["image_id"], "score": self.score(t)}) for t in tables]
        return self.first(pa.concat_tables(scored).replace_schema_metadata())

    def first(self, table: pa.Table) -> pa.Table:
        """The P best rows, each image's own number deciding between equals, and its id between equals in that."""
        score = np.nan_to_num(table["score"].to_numpy(), nan=-np.inf)
        own = salts(table["image_id"].to_pylist(), self.run.seed("ties", self.round))
        order = np.lexsort((table["image_id"].to_numpy(), own, -score))
        return table.take(pa.array(order[: self.run.config.budget]))
