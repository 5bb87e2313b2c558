"""Acquire: P images, each with what asked for it: the center, rank and score of a kernel (4.4, line 10), or a score."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from raypfk import pfk, progress
from raypfk.errors import UserError
from raypfk.pool import Shard
from raypfk.run import Run
from raypfk.schema import CANDIDATES, SELECTION
from raypfk.stages.best import best, counts, described
from raypfk.stages.greedy import one_by_one
from raypfk.stages.score import picks
from raypfk.stages.stream import value
from raypfk.strategies import Strategy

_READERS = 16


def acquire(run: Run, round: int) -> dict:
    """Write round `round`'s selection.parquet: P images, fewer only when the pool is exhausted.

    With `elsewhere`, its share of them is drawn from what the strategy left.
    """
    budget, other = run.config.budget, run.elsewhere_budget
    chosen, facts = _ACQUIRE[run.strategy.kind](run, round, budget - other)
    if other:
        drawn = _drawn(run, round, run.elsewhere, other, chosen["image_id"])
        chosen, facts = pa.concat_tables([chosen, drawn], promote_options="default"), facts | {"elsewhere": len(drawn)}
    if len(chosen) < budget:
        progress.current().say(f"round {round}: the pool is exhausted, {len(chosen)} of {budget} images left")
    run.write(run.round(round).selection, _selection(_with_estimates(run, round, chosen)))
    return {"selected": len(chosen), **facts}


def _rank_by_rank(run: Run, round: int, count: int) -> tuple[pa.Table, dict]:
    """Rank by rank over the candidates; where they run out, K grows and the pool is scanned again."""
    scored, rescans = run.done(round, "score"), 0
    picked, k = pick(run.read(run.round(round).candidates, CANDIDATES), count), scored["k"]
    while picked.num_rows < count and k < scored["images"]:
        k, rescans = scored["images"] if count >= scored["images"] else min(4 * k, scored["images"]), rescans + 1
        picked = picks(run, round, k, count)
    return picked, {"k": k, "rescans": rescans}


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
    """The picks with the label that was estimated for each, or predicted; null where nothing was.

    UserError for a pick that the pool, or its descriptor shard, does not hold (any more).
    """
    if not run.describes(round):
        return picked
    column = "predicted" if run.strategy.kind in ("predictions", "adversary") else "estimated_label"
    shards = run.pool.locate(picked["image_id"].to_pylist())

    def read(shard: Shard) -> tuple[pa.Table, pa.Table]:
        estimated = described(run, round, shard, ["image_id", column])
        return run.pool.read_shard(shard, ["image_id"]), estimated.replace_schema_metadata()

    with ThreadPoolExecutor(_READERS) as threads:
        found = list(threads.map(read, shards))
    if not found:
        estimates = pa.array([], pa.int64())
    else:
        pool, estimated = (pa.concat_tables(tables) for tables in zip(*found, strict=True))
        _row_of(picked["image_id"], pool["image_id"], run.pool.uri)
        rows = _row_of(picked["image_id"], estimated["image_id"], run.round(round).descriptors)
        estimates = estimated[column].take(rows)
    return picked.append_column("estimated_label", estimates)


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


def _by_scores(run: Run, round: int, count: int) -> tuple[pa.Table, dict]:
    """The images of the best scores; where nothing is labelled yet that they could come from, by chance."""
    if not run.describes(round):
        return _by_chance(run, round, count)

    def read(run: Run, round: int, shard: Shard) -> pa.Table:
        return described(run, round, shard, ["image_id", "score"])

    def score(table: pa.Table, _own: np.ndarray) -> np.ndarray:
        return table["score"].to_numpy().astype(np.float64)

    return best(run, round, read, score, count, run.seed("ties", round)), {}


def _by_chance(run: Run, round: int, count: int) -> tuple[pa.Table, dict]:
    return _drawn(run, round, run.strategy, count), {}


def _drawn(run: Run, round: int, strategy: Strategy, count: int, taken: pa.ChunkedArray | None = None) -> pa.Table:
    """Ids drawn by the images' own numbers, whatever the order they are met in, from what is not labelled or `taken`.

    Where the round describes the pool, of what could be read of it. With weights: who comes first in a race of
    exponential clocks (Efraimidis and Spirakis, Weighted random sampling with a reservoir, 2006).
    """
    ids = [*run.labelled(round)["image_id"].chunks, *(taken.chunks if taken is not None else [])]
    out, by_class = ray.put(pa.concat_arrays([pa.array([], pa.string()), *ids])), "classes" in strategy.given
    seen, columns = run.describes(round), ["image_id", *(["estimated_label"] if by_class else [])]

    def read(run: Run, round: int, shard: Shard) -> pa.Table:
        table = described(run, round, shard, columns) if seen else run.pool.read_shard(shard, columns)
        return table.filter(pc.invert(pc.is_in(table["image_id"], value(out))))

    weights = strategy(counts(run, round, read)).numpy() if by_class else None

    def score(table: pa.Table, own: np.ndarray) -> np.ndarray:
        if weights is None:
            return np.zeros(len(own))  # all are equal: their own numbers decide
        return np.log((own + 0.5) / 2.0**64) / weights[table["estimated_label"].to_numpy()]

    return best(run, round, read, score, count, run.seed("random", round)).drop_columns("score")


_ACQUIRE: dict[str, Callable[[Run, int, int], tuple[pa.Table, dict]]] = {
    "kernel": _rank_by_rank,
    "predictions": _by_scores,
    "gradients": one_by_one,
    "adversary": _by_scores,
    "chance": _by_chance,
}
"""So many picks of a round, image_id and what else SELECTION has of them; and facts for the marker."""
