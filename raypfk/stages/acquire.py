"""Acquire: P images out of the candidates, each with the center, rank and score that asked for it (4.4, line 10)."""

import hashlib
import heapq
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from raypfk import pfk, progress, store
from raypfk.errors import UserError
from raypfk.pool import Shard
from raypfk.run import Run
from raypfk.schema import CANDIDATES, SELECTION
from raypfk.stages.score import picks

_READERS = 16


def acquire(run: Run, round: int) -> dict:
    """Write round `round`'s selection.parquet: P images, fewer only when the pool is exhausted."""
    budget = run.config.budget
    if run.config.strategy == "random":
        selection, facts = _random(run, round), {}
    else:
        selection, facts = _rank_by_rank(run, round)
    if selection.num_rows < budget:
        progress.current().say(f"round {round}: the pool is exhausted, {selection.num_rows} of {budget} images left")
    run.write(run.round(round).selection, selection)
    return {"selected": selection.num_rows, **facts}


def _rank_by_rank(run: Run, round: int) -> tuple[pa.Table, dict]:
    """Rank by rank over the candidates; where they run out, K grows and the pool is scanned again."""
    scored, budget, rescans = run.done(round, "score"), run.config.budget, 0
    picked, k = pick(run.read(run.round(round).candidates, CANDIDATES), budget), scored["k"]
    while picked.num_rows < budget and k < scored["images"]:
        k, rescans = scored["images"] if budget >= scored["images"] else min(4 * k, scored["images"]), rescans + 1
        picked = picks(run, round, k, budget)
    return _with_estimates(run, round, picked), {"k": k, "rescans": rescans}


def pick(candidates: pa.Table, budget: int) -> pa.Table:
    """candidates (schema.CANDIDATES) -> (image_id, center_id, rank, score): at most `budget`, in order of choice."""
    if not candidates.num_rows:
        return candidates.select(["image_id", "center_id", "rank", "score"])
    ids, image = np.unique(candidates["image_id"].to_numpy(), return_inverse=True)  # sorted: index order is id order
    centers, center = np.unique(candidates["center_id"].to_numpy(), return_inverse=True)
    rank = candidates["rank"].to_numpy().copy()
    shape = (len(centers), int(rank.max()) + 1)
    scores = torch.full(shape, -torch.inf)
    keys = torch.full(shape, -1, dtype=torch.int64)
    scores[center, rank] = torch.from_numpy(candidates["score"].to_numpy().copy())
    keys[center, rank] = torch.from_numpy(image)
    chosen = pfk.rank_by_rank(scores, keys, budget)
    return pa.table(
        {
            "image_id": pa.array(ids[chosen.keys.numpy()], pa.string()),
            "center_id": pa.array(centers[chosen.centers.numpy()], pa.string()),
            "rank": pa.array(chosen.ranks.numpy().astype(np.int32)),
            "score": pa.array(chosen.scores.numpy()),
        }
    )


def _with_estimates(run: Run, round: int, picked: pa.Table) -> pa.Table:
    """The selection: each pick with its position and the label that was estimated for it.

    UserError for a pick that the pool, or its descriptor shard, does not hold (any more).
    """
    shards = run.pool.locate(picked["image_id"].to_pylist())
    folder, columns = run.round(round).descriptors, ["image_id", "estimated_label"]

    def read(shard: Shard) -> tuple[pa.Table, pa.Table]:
        described = run.read(store.join(folder, shard.name), columns=columns)
        return run.pool.read_shard(shard, ["image_id"]), described.replace_schema_metadata()

    with ThreadPoolExecutor(_READERS) as threads:
        found = list(threads.map(read, shards))
    if not found:
        estimates = pa.array([], pa.int64())
    else:
        pool, described = (pa.concat_tables(tables) for tables in zip(*found, strict=True))
        _row_of(picked["image_id"], pool["image_id"], run.pool.uri)
        estimates = described["estimated_label"].take(_row_of(picked["image_id"], described["image_id"], folder))
    table = picked.append_column("position", pa.array(np.arange(picked.num_rows, dtype=np.int32)))
    return table.append_column("estimated_label", estimates).select(SELECTION.names).cast(SELECTION)


def _row_of(ids: pa.ChunkedArray, known: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    rows = pc.index_in(ids, known)
    if rows.null_count:
        raise UserError(f"{where}: no image {ids.filter(pc.is_null(rows))[0].as_py()!r}, which was selected")
    return rows


def _random(run: Run, round: int) -> pa.Table:
    """P images uniformly: those whose hash with the round's seed is smallest, whatever the order they are met in."""
    taken = set(run.labelled(round)["image_id"].to_pylist())
    salt = run.seed("random", round).to_bytes(8)

    def draws():
        for shard in run.pool.shards("pool"):
            for image_id in run.pool.read_shard(shard, ["image_id"])["image_id"].to_pylist():
                if image_id not in taken:
                    yield hashlib.blake2b(image_id.encode(), key=salt, digest_size=8).digest(), image_id

    chosen = [image_id for _, image_id in heapq.nsmallest(run.config.budget, draws())]
    positions = pa.array(np.arange(len(chosen), dtype=np.int32))
    columns = {"position": positions, "image_id": pa.array(chosen, pa.string())}
    nothing = {f.name: pa.nulls(len(chosen), f.type) for f in SELECTION if f.name not in columns}
    return pa.table({**columns, **nothing}).select(SELECTION.names).cast(SELECTION)
