"""Score: the kernel between all centers and all pool images, sharded over actors, kept as top-K per center."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.util import ActorPool

from raypfk import progress, session, store
from raypfk.errors import RunError
from raypfk.pfk import Descriptors, Kernel, TopK
from raypfk.run import Run
from raypfk.schema import CANDIDATES, matrix

_SHARD_BITS = 32
"""A pool image's key: shard number, then row. Shards are in the order of image_id, and so are the keys."""
_READERS = 16


class Scorer:
    """Actor: holds the centers; takes descriptor shards, gives each center's top-K among them.

    A call leaves nothing behind, so that a lost actor's call can be done by another.
    """

    def __init__(self, run: Run, kernel: Kernel, centers_z: np.ndarray, centers_g: np.ndarray, threads: int):
        torch.set_num_threads(threads)
        self.run, self.kernel = run, kernel
        self.centers = Descriptors(torch.from_numpy(centers_z.copy()), torch.from_numpy(centers_g.copy()))

    def score(self, shards: list[tuple[int, str]], k: int) -> tuple[np.ndarray, np.ndarray, dict]:
        """[(number, path)] -> scores (M, k) float32, keys (M, k) int64 (-1: none), images scored and when it began."""
        began, top, rows = time.time(), TopK(len(self.centers.z), k), 0
        for number, path in shards:
            table = self.run.read(path, columns=["features", "fisher"])
            images = Descriptors(*(torch.from_numpy(matrix(table[name])) for name in ("features", "fisher")))
            keys = (number << _SHARD_BITS) + torch.arange(table.num_rows)
            top.add(self.kernel, self.centers, images, keys)
            rows += table.num_rows
        scores, keys = top.result()
        return scores.numpy(), keys.numpy(), {"images": rows, "shards": len(shards), "began": began}


def score(run: Run, round: int, k: int | None = None) -> dict:
    """Write round `round`'s candidates.parquet: of each center the `k` best pool images (default: `top_k`)."""
    if run.config.strategy == "random":
        return {"skipped": "the strategy needs no scores"}
    files = run.round(round)
    validation = run.read(files.validation)
    centers = validation.filter(validation["center"]).sort_by("image_id").combine_chunks()
    # K must at least let every center's share of the budget through.
    k = k or max(run.config.top_k, 2 * -(-run.config.budget // centers.num_rows))
    shards = [(i, store.join(files.descriptors, s.name)) for i, s in enumerate(run.pool.shards("pool"))]
    top, facts = _top_k(run, centers, shards, k)
    run.write(files.candidates, candidates_table(top, centers, [path for _, path in shards]))
    return {"centers": centers.num_rows, "k": k, **facts}


def _top_k(run: Run, centers: pa.Table, shards: list[tuple[int, str]], k: int) -> tuple[TopK, dict]:
    start, resources = time.time(), run.config.resources
    count = min(len(shards), resources.score_actors or max(1, session.cpus() // resources.score_threads))
    z, g = (ray.put(matrix(centers[name])) for name in ("features", "fisher"))
    session.require("scoring", CPU=count * resources.score_threads)
    actor = ray.remote(Scorer).options(num_cpus=resources.score_threads, max_restarts=4, max_task_retries=4)
    actors = [actor.remote(run, run.kernel(), z, g, resources.score_threads) for _ in range(count)]
    size = max(1, len(shards) // (4 * count))
    chunks = [shards[i : i + size] for i in range(0, len(shards), size)]
    top, images, began = TopK(centers.num_rows, k), 0, []
    try:
        with progress.current().bar("score", len(shards), "shards") as advance:
            results = ActorPool(actors).map_unordered(lambda a, chunk: a.score.remote(chunk, k), chunks)
            for scores, keys, facts in results:
                top.merge(TopK.of(torch.from_numpy(scores.copy()), torch.from_numpy(keys.copy())))
                images += facts["images"]
                began.append(facts["began"])
                advance(facts["shards"])
    finally:
        for a in actors:
            ray.kill(a)
    return top, {"images": images, "startup_seconds": round(min(began) - start, 3)}


def candidates_table(top: TopK, centers: pa.Table, paths: list[str]) -> pa.Table:
    """candidates: (center_id, rank from 0, image_id, score), centers in the order of their id."""
    scores, keys = (t.numpy() for t in top.result())
    center, rank = np.nonzero(keys >= 0)
    keys = keys[center, rank]
    columns = [
        centers["image_id"].take(pa.array(center)),
        pa.array(rank.astype(np.int32)),
        _ids(keys, paths),
        pa.array(scores[center, rank]),
    ]
    return pa.table(columns, schema=CANDIDATES)


def _ids(keys: np.ndarray, paths: list[str]) -> pa.Array:
    """Image ids of keys, from the shards that hold them."""
    shard, row = keys >> _SHARD_BITS, keys & ((1 << _SHARD_BITS) - 1)
    needed, inverse = np.unique(shard, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    rows = np.split(row[order], np.cumsum(np.bincount(inverse, minlength=len(needed)))[:-1])

    def read(part: tuple[int, np.ndarray]) -> pa.Array:
        ids = store.read_table(paths[part[0]], ["image_id"])["image_id"].combine_chunks()
        if part[1].max() >= len(ids):
            raise RunError(f"{paths[part[0]]}: became shorter while it was scored")
        return ids.take(pa.array(part[1]))

    with ThreadPoolExecutor(_READERS) as threads:
        found = list(threads.map(read, zip(needed, rows, strict=True))) if len(needed) else []
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return pa.concat_arrays([pa.array([], pa.string()), *found]).take(pa.array(back))
