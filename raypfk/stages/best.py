"""The best P images by a score of their own, from files that Ray tasks read; O(P) memory, whatever the pool's size."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray
import torch

from raypfk import session
from raypfk.pool import Shard
from raypfk.run import Run
from raypfk.salts import salts

_SCORED = pa.schema([("image_id", pa.string()), ("score", pa.float64()), ("own", pa.uint64())])
_CHUNKS = 4
"""Tasks for each CPU: enough that the last ones end together."""
Read = Callable[[Run, int, Shard], pa.Table]
"""Of a shard the ids, `image_id` string, and what else the scores are made of."""
Score = Callable[[pa.Table, np.ndarray], np.ndarray]
"""(table, the images' own numbers (N,) uint64) -> (N,) float64; NaN comes last."""


def best(run: Run, round: int, read: Read, score: Score, count: int, seed: int) -> pa.Table:
    """(image_id, score) of at most `count` images, in order: by score descending, of equals as the seed draws them."""
    job = _Job(run, round, read, score, count, seed)
    table = _SCORED.empty_table()
    for part in each(lambda shards: job.of(shards), run.pool.shards("pool")):
        table = job.first(pa.concat_tables([table, part]))
    return table.drop_columns("own")


def counts(run: Run, round: int, read: Read) -> torch.Tensor:
    """Images (D,) int64 of each class, as the label estimator has it, of what is read."""

    def of(shards: list[Shard]) -> np.ndarray:
        tables = (read(run, round, shard) for shard in shards)
        return sum(np.bincount(table["estimated_label"], minlength=run.classes) for table in tables)

    return torch.from_numpy(sum(each(of, run.pool.shards("pool"))))


def described(run: Run, round: int, shard: Shard, columns: list[str]) -> pa.Table:
    """What extraction wrote of a shard's images."""
    return run.read(run.round(round).described(shard.name), columns=columns)


def each(do: Callable[[list[Shard]], object], shards: list[Shard]) -> Iterator:
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
    count: int
    seed: int

    def of(self, shards: list[Shard]) -> pa.Table:
        return self.first(pa.concat_tables(self.scored(shard) for shard in shards))

    def scored(self, shard: Shard) -> pa.Table:
        """(image_id, score, own) of a shard, own: each image's own number."""
        table = self.read(self.run, self.round, shard)
        own = salts(table["image_id"].to_pylist(), self.seed)
        return pa.table({"image_id": table["image_id"], "score": self.score(table, own), "own": own})

    def first(self, table: pa.Table) -> pa.Table:
        """The best rows, each image's own number deciding between equals, and its id between equals in that."""
        score = np.nan_to_num(table["score"].to_numpy(), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        order = np.lexsort((table["image_id"].to_numpy(), table["own"].to_numpy(), -score))
        return table.take(pa.array(order[: self.count]))
