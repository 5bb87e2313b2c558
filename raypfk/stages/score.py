"""Score: the kernel between all centers and all pool images, sharded over actors, kept as top-K per center.

The driver hands out chunks of descriptor shards, as many as there are actors to take them, and merges what comes back
in a tree of tasks; with each chunk go the floors that what is merged already sets, so that later chunks rescore little.
"""

import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayActorError

from raypfk import descriptor_files, pfk, progress, session, store
from raypfk.descriptor_files import Origin
from raypfk.errors import RunError
from raypfk.pfk import Descriptors, Kernel, TopK
from raypfk.run import Run
from raypfk.schema import CANDIDATES

_SHARD_BITS = 32
"""A pool image's key: shard number, then row. Shards are in the order of image_id, and so are the keys."""
_READERS = 16
_AHEAD = 4  # shards read while others are scored
_SEGMENT = 1 << 15  # images scored at once: more than a shard, so that tiles are full and floors are set rarely
_CHUNKS = 8  # per actor: enough that the last ones end together
_FAN_IN = 8  # parts that one merge takes
_CANDIDATES = 1 << 24  # of all centers that are looked at together, where K had to grow
_ATTEMPTS = 4  # at one chunk, where actors die of it

Numbered = tuple[int, str]
"""A shard's number and its descriptor file."""


class Scorer:
    """Actor: holds the centers; takes descriptor shards, gives each center's top-K among them.

    A call leaves nothing behind, so that a lost actor's call can be done by another.
    """

    def __init__(self, run: Run, kernel: Kernel, origin: Origin, z: np.ndarray, g: np.ndarray, threads: int):
        torch.set_num_threads(threads)
        self.run, self.kernel, self.origin = run, kernel, origin
        self.shards = run.pool.shards("pool")
        self.centers = Descriptors(_shared(z), _shared(g))

    def ready(self) -> None:
        """Returns when the actor is up."""

    def score(
        self, shards: Sequence[Numbered], k: int, rows: slice = slice(None), floor_M: np.ndarray | None = None
    ) -> tuple[tuple, dict]:
        """Top-K of `shards` for some of the centers, among scores of at least `floor_M`.

        Returns (scores (M, k) float32, keys (M, k) int64), and facts: images, shards, when it began, the K-th best
        scores as `floor` (M,), and the `counts` of `TopK`.
        """
        began, images = time.time(), 0
        centers = self.centers.rows(rows)
        floor = None if floor_M is None else torch.from_numpy(floor_M.copy())
        top = TopK(len(centers.z), k, floor_M=floor)
        for pool, keys in self._segments(shards):
            top.add(self.kernel, centers, pool, keys)
            images += len(keys)
        scores, keys = (t.numpy() for t in top.result())
        floor = scores[:, -1].copy()
        return (scores, keys), {
            "images": images, "shards": len(shards), "began": began, "floor": floor, "counts": dict(top.counts)
        }  # fmt: skip

    def _segments(self, shards: Sequence[Numbered]) -> Iterator[tuple[Descriptors, torch.Tensor]]:
        """Descriptors and keys of several shards at a time; the next shards are read while these are scored."""
        with ThreadPoolExecutor(1) as reader:
            todo, ahead, held, rows = iter(shards), deque(), [], 0
            for shard in todo:
                ahead.append(reader.submit(self._read, shard))
                if len(ahead) < _AHEAD:
                    continue
                held.append(ahead.popleft().result())
                rows += len(held[-1][1])
                if rows >= _SEGMENT:
                    yield _joined(held)
                    held, rows = [], 0
            held += [future.result() for future in ahead]
            if held:
                yield _joined(held)

    def _read(self, shard: Numbered) -> tuple[Descriptors, torch.Tensor]:
        number, path = shard
        images = descriptor_files.read_shard(self.run, path, self.shards[number], self.origin)
        return images, (number << _SHARD_BITS) + torch.arange(len(images.z))


def _shared(array: np.ndarray) -> torch.Tensor:
    """A tensor over an array of the object store, which all actors of a node share: it is only read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _joined(held: list[tuple[Descriptors, torch.Tensor]]) -> tuple[Descriptors, torch.Tensor]:
    if len(held) == 1:
        return held[0]
    parts, keys = zip(*held, strict=True)
    return Descriptors(*(torch.cat(x) for x in zip(*parts, strict=True))), torch.cat(keys)


def score(run: Run, round: int) -> dict:
    """Write round `round`'s candidates.parquet: of each center the `top_k` best pool images."""
    if run.config.strategy == "random":
        return {"skipped": "the strategy needs no scores"}
    with Scoring(run, round) as scoring:
        count = scoring.table.num_rows
        # K must at least let every center's share of the budget through.
        k = max(run.config.top_k, 2 * -(-run.config.budget // count))
        top = scoring.top_k(k)
    run.write(run.round(round).candidates, candidates_table(top, scoring.table, scoring.paths))
    return {"centers": count, "k": k, **scoring.facts()}


def picks(run: Run, round: int, k: int, budget: int) -> pa.Table:
    """The images that are chosen of every center's `k` best: (image_id, center_id, rank, score), in order of choice.

    Some centers at a time, so that memory is O(budget + `_CANDIDATES`) however large k must be.
    """
    with Scoring(run, round) as scoring:
        size, parts = max(1, _CANDIDATES // k), []
        for first in range(0, scoring.table.num_rows, size):
            top = scoring.top_k(k, slice(first, first + size))
            parts = [pfk.merge_picks([*parts, pfk.rank_by_rank(*top.result(), budget, first)], budget)]
    (chosen,) = parts
    return pa.table(
        {
            "image_id": _ids(chosen.keys.numpy(), scoring.paths),
            "center_id": scoring.table["image_id"].take(pa.array(chosen.centers.numpy())),
            "rank": pa.array(chosen.ranks.numpy().astype(np.int32)),
            "score": pa.array(chosen.scores.numpy()),
        }
    )


class Scoring:
    """A round's centers in actors, for one scan of the pool's descriptors or more."""

    def __init__(self, run: Run, round: int):
        self.run, self.start = run, time.time()
        self.table, self.centers, self.origin = descriptor_files.read_centers(run, round)
        folder = run.round(round).descriptors
        self.paths = [store.join(folder, shard.name) for shard in run.pool.shards("pool")]
        self.counts, self.began = Counter(), []

    def __enter__(self) -> "Scoring":
        threads = self.run.config.resources.score_threads
        count = self.run.config.resources.score_actors or max(1, session.cpus() // threads)
        count = min(len(self.paths), count)
        session.require("scoring", CPU=count * threads)
        z, g = (ray.put(x.numpy()) for x in self.centers)
        actor = ray.remote(Scorer).options(num_cpus=threads, max_restarts=4, max_task_retries=4)
        arguments = (self.run, self.run.stored_kernel(), self.origin, z, g, threads)
        self.actors = [actor.remote(*arguments) for _ in range(count)]
        return self

    def __exit__(self, *_) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def top_k(self, k: int, rows: slice = slice(None)) -> TopK:
        """The `k` best pool images of some of the centers; keys are shard number, then row."""
        shards = list(enumerate(self.paths))
        size = max(1, len(shards) // (_CHUNKS * len(self.actors)))
        chunks = [shards[i : i + size] for i in range(0, len(shards), size)]
        tree, self.counts["images"] = _Tree(len(range(self.table.num_rows)[rows])), 0
        with progress.current().bar("score", len(shards), "shards") as advance:
            for facts in _through(self.actors, chunks, (k, rows), tree):
                self.counts.update({"images": facts["images"], **facts["counts"]})
                self.began.append(facts["began"])
                advance(facts["shards"])
        scores, keys = tree.whole()
        return TopK.of(torch.from_numpy(scores.copy()), torch.from_numpy(keys.copy()))

    def facts(self) -> dict:
        """For the stage's marker: images, pairs by what was done with them, seconds until the first actor began."""
        pairs = {name: count for name, count in self.counts.items() if name != "images"}
        startup = round(min(self.began) - self.start, 3)
        return {"images": self.counts["images"], "pairs": pairs, "startup_seconds": startup}


def _through(actors: list, chunks: list[list[Numbered]], wanted: tuple[int, slice], tree: "_Tree") -> Iterator[dict]:
    """Every chunk once through an actor that is up; yields the facts of each, and puts its top-K into the tree.

    wanted: K, and which centers.

    Ray restarts an actor and calls it again; the chunk of one that it gave up goes to another. RunError without any.
    """
    todo, idle, died = deque(chunks), [], Counter()
    busy = {actor.ready.remote(): (actor, [], None) for actor in actors}
    while busy:
        (done,), _ = ray.wait(list(busy), num_returns=1)
        actor, chunk, top = busy.pop(done)
        try:
            facts = ray.get(done)
            idle.append(actor)
        except RayActorError as error:
            died.update(chunk[:1])
            if chunk and died[chunk[0]] == _ATTEMPTS:
                raise RunError(f"{chunk[0][1]}: {_ATTEMPTS} actors died of this or the next shards: {error}") from None
            todo.extend([chunk] if chunk else [])
            facts = None
        if facts:
            tree.add(top, facts.pop("floor"))
            yield facts
        while todo and idle:
            actor, chunk = idle.pop(), todo.popleft()
            top, facts = actor.score.options(num_returns=2).remote(chunk, *wanted, tree.floor)
            busy[facts] = (actor, chunk, top)
    if todo:
        raise RunError(f"all {len(actors)} scoring actors died; {sum(map(len, todo))} shards are not scored")


class _Tree:
    """Merges top-Ks, (scores, keys) in the object store, a few at a time wherever there is room; keeps their floors."""

    def __init__(self, num_centers: int):
        self.levels: list[list[ray.ObjectRef]] = []
        self.floors: list[ray.ObjectRef] = []
        self.floor = np.full(num_centers, -np.inf, np.float32)

    def add(self, top: ray.ObjectRef, floor: np.ndarray) -> None:
        """Takes in a part and its K-th best scores (M,), which no candidate of the whole may be below."""
        self._rise(top, 0)
        known, self.floors = ray.wait(self.floors, num_returns=len(self.floors), timeout=0) if self.floors else ([], [])
        self.floor = np.maximum.reduce([self.floor, floor, *ray.get(known)])

    def _rise(self, top: ray.ObjectRef, level: int) -> None:
        if level == len(self.levels):
            self.levels.append([])
        self.levels[level].append(top)
        if len(self.levels[level]) == _FAN_IN:
            merged, floor = _merge.remote(*self.levels[level])
            self.floors.append(floor)
            self.levels[level] = []
            self._rise(merged, level + 1)

    def whole(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores and keys (M, k) of all parts together."""
        parts = [part for level in self.levels for part in level]
        while len(parts) > 1:
            groups = [parts[i : i + _FAN_IN] for i in range(0, len(parts), _FAN_IN)]
            parts = [_merge.remote(*group)[0] if len(group) > 1 else group[0] for group in groups]
        return ray.get(parts[0])


@ray.remote(num_cpus=0, num_returns=2)
def _merge(*parts: tuple[np.ndarray, np.ndarray]) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Several (scores, keys) as one, and its K-th best scores."""
    first, *rest = (TopK.of(_shared(scores), _shared(keys)) for scores, keys in parts)
    for top in rest:
        first.merge(top)
    scores, keys = (t.numpy() for t in first.result())
    return (scores, keys), scores[:, -1].copy()


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
