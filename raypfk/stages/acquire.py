"""Acquire: P images, each with what asked for it: the center, rank and score of a kernel (4.4, line 10), or a score."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from raypfk import pfk, progress, store
from raypfk.errors import UserError
from raypfk.pool import Shard
from raypfk.run import Run
from raypfk.salts import salts
from raypfk.schema import CANDIDATES, SELECTION
from raypfk.stages.best import best, counts, described
from raypfk.stages.greedy import one_by_one
from raypfk.stages.score import picks

_READERS = 16


def acquire(run: Run, round: int) -> dict:
    """Write round `round`'s selection.parquet: P images, fewer only when the pool is exhausted."""
    budget = run.config.budget
    selection, facts = _ACQUIRE[run.strategy.kind](run, round)
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


def _with_estimates(run: Run, round: int, picked: pa.Table, column: str = "estimated_label") -> pa.Table:
    """The selection: each pick with its position and the label that was estimated for it, or predicted.

    UserError for a pick that the pool, or its descriptor shard, does not hold (any more).
    """
    shards = run.pool.locate(picked["image_id"].to_pylist())
    folder, columns = run.round(round).descriptors, ["image_id", column]

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
        estimates = described[column].take(_row_of(picked["image_id"], described["image_id"], folder))
    return _selection(picked.append_column("estimated_label", estimates))


def _selection(picked: pa.Table) -> pa.Table:
    """In order of choice, with positions; null what the strategy does not say."""
    columns = {name: picked[name] for name in picked.column_names}
    columns["position"] = pa.array(np.arange(picked.num_rows, dtype=np.int32))
    nothing = {f.name: pa.nulls(picked.num_rows, f.type) for f in SELECTION if f.name not in columns}
    return pa.table(columns | nothing).select(SELECTION.names).cast(SELECTION)


def _row_of(ids: pa.ChunkedArray, known: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    rows = pc.index_in(ids, known)
    if rows.null_count:
        raise UserError(f"{where}: no image {ids.filter(pc.is_null(rows))[0].as_py()!r}, which was selected")
    return rows


def _by_predictions(run: Run, round: int) -> tuple[pa.Table, dict]:
    """The images of the best scores; for an estimated label they have the class that was predicted."""

    def read(run: Run, round: int, shard: Shard) -> pa.Table:
        return run.read(store.join(run.round(round).descriptors, shard.name), columns=["image_id", "score"])

    chosen = best(run, round, read, lambda table: table["score"].to_numpy().astype(np.float64))
    return _with_estimates(run, round, chosen, "predicted"), {}


def _by_gradients(run: Run, round: int) -> tuple[pa.Table, dict]:
    chosen, facts = one_by_one(run, round)
    return _with_estimates(run, round, chosen), facts


def _by_chance(run: Run, round: int) -> tuple[pa.Table, dict]:
    """Images drawn by their own numbers, whatever the order they are met in.

    With weights: who comes first in a race of exponential clocks (Efraimidis and Spirakis, Weighted random sampling
    with a reservoir, 2006).
    """
    seed = run.seed("random", round)
    if "classes" not in run.strategy.given:
        taken = set(run.labelled(round)["image_id"].to_pylist())

        def read(run: Run, round: int, shard: Shard) -> pa.Table:
            table = run.pool.read_shard(shard, ["image_id"])
            return table.filter(pa.array([i not in taken for i in table["image_id"].to_pylist()], pa.bool_()))

        chosen = best(run, round, read, lambda table: -salts(table["image_id"].to_pylist(), seed).astype(np.float64))
        return _selection(chosen.drop_columns("score")), {}

    weights = run.strategy(counts(run, round)).numpy()

    def score(table: pa.Table) -> np.ndarray:
        uniform = (salts(table["image_id"].to_pylist(), seed) + 0.5) / 2.0**64
        return np.log(uniform) / weights[table["estimated_label"].to_numpy()]

    return _with_estimates(run, round, best(run, round, described, score).drop_columns("score")), {}


_ACQUIRE: dict[str, Callable[[Run, int], tuple[pa.Table, dict]]] = {
    "kernel": _rank_by_rank,
    "predictions": _by_predictions,
    "gradients": _by_gradients,
    "chance": _by_chance,
}
