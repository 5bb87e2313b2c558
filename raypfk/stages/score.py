"""Score: the kernel between all centers and all pool images, sharded over actors, kept as top-K per center.

The first images are dear, as nobody knows yet what a score must reach: of these, actors share the centers. Then the
driver hands out chunks of descriptor shards, as many as there are actors to take them, and lets actors merge what comes
back, in a tree; with each chunk go the floors that all before it set, so that few images are rescored.
"""

import threading
import time
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayActorError

from raypfk import descriptor_files, pfk, progress, session
from raypfk.descriptor_files import Origin
from raypfk.errors import RunError
from raypfk.pfk import Descriptors, Kernel, TopK, Votes
from raypfk.run import Run
from raypfk.schema import CANDIDATES
from raypfk.stages.keys import ids_of, keys_of

_CALLS = 2  # of an actor at once: the shards of one are read while the other's are scored
_AHEAD = 4  # shards of a call that are read, by each thread that reads, before it needs them
_SEGMENT = {"cpu": 1 << 12, "cuda": 1 << 16}  # images scored at once, at least: smaller shards are copied together
_FIRST = 1 << 14  # images whose scores set the first floors
_CHUNKS = 8  # per actor: enough that the last ones end together
_FAN_IN = 8  # parts that one merge takes
_CANDIDATES = 1 << 24  # of all centers that are looked at together, where K had to grow
_ATTEMPTS = 4  # at one chunk, where actors die of it
_HERE = 1 << 26  # pairs that are scored sooner than an actor is up


class Images(NamedTuple):
    """B images as scoring takes them."""

    described: Descriptors
    keys: torch.Tensor
    """(B,) int64."""
    votes: tuple[torch.Tensor, torch.Tensor] | None
    """Classes (B, V) int64 and shares (B, V) float32, where the label estimator keeps them."""


Numbered = tuple[int, str]
"""A shard's number and its descriptor file."""


class Scan(NamedTuple):
    """Shards to score, and for which centers."""

    shards: list[Numbered]
    rows: slice

    @property
    def name(self) -> str:
        return self.shards[0][1]


class Merge(NamedTuple):
    """Parts of a level of the tree, to be one of the next."""

    parts: list[ray.ObjectRef]
    level: int

    @property
    def name(self) -> str:
        return f"a merge of {len(self.parts)} parts"


class Scorer:
    """Actor: holds the centers; takes descriptor shards, gives each center's top-K among them.

    A lost actor's call can be done by another: all that a call leaves behind is how high floors are known to be.
    """

    def __init__(
        self, run: Run, kernel: Kernel, origin: Origin, z: np.ndarray, g: np.ndarray, threads: int, gpu: bool = False,
        labels: np.ndarray | None = None,
    ):  # fmt: skip
        self.run, self.kernel, self.origin = run, kernel, origin
        self.shards = run.pool.shards("pool")
        self.device = torch.device("cuda" if gpu else "cpu")
        self.centers = Descriptors(_shared(z), _shared(g)).to(self.device)
        self.labels = None if labels is None else _shared(labels).to(self.device)
        self.threads, self.readers, self.turn = threads, threads if gpu else 1, threading.Lock()
        self.known, self.best = None, None

    def ready(self) -> None:
        """Returns when the actor is up."""

    def score(
        self, shards: Sequence[Numbered], k: int, rows: slice = slice(None), floor_M: np.ndarray | None = None
    ) -> tuple[tuple, dict]:
        """Top-K of `shards` for some of the centers, among scores of at least `floor_M`.

        Returns (scores (M, k) float32, keys (M, k) int64), and facts: images, shards, when it began, the K-th best
        scores as `floor` (M,), and the `counts` of `TopK`.
        """
        with ThreadPoolExecutor(self.readers) as reader:  # reads while an earlier call is scoring, then in this one
            some = _AHEAD * self.readers
            ahead = deque(reader.submit(self._read, shard) for shard in shards[:some])
            with self.turn, session.threads(self.threads):
                return self._score(self._arriving(reader, ahead, shards[some:]), len(shards), k, rows, floor_M)

    def _score(self, arriving, num_shards: int, k: int, rows: slice, floor_M: np.ndarray | None) -> tuple[tuple, dict]:
        began, images, centers = time.time(), 0, self.centers.rows(rows)
        if self.known != (k, rows):
            self.known, self.best = (k, rows), TopK(len(centers.z), k, self.device)
        floor = self.best.floor()
        if floor_M is not None:
            floor = torch.maximum(floor, torch.from_numpy(floor_M.copy()).to(self.device))
        top = TopK(len(centers.z), k, self.device, floor)
        for part in _segments(arriving, _SEGMENT[self.device.type]):
            pool, keys = part.described.to(self.device), part.keys.to(self.device)
            top.add(self.kernel, centers, pool, keys, self._votes(part, rows))
            images += len(keys)
        self.best.merge(top)
        return _arrays(top), {
            "images": images, "shards": num_shards, "began": began, "floor": self.best.floor().cpu().numpy(),
            "counts": dict(top.counts),
        }  # fmt: skip

    def _votes(self, part: Images, rows: slice) -> Votes | None:
        if part.votes is None:
            return None
        classes, shares = (x.to(self.device) for x in part.votes)
        return Votes(classes, shares, self.labels[rows], self.run.estimation.power)

    def merge(self, *parts: tuple[np.ndarray, np.ndarray]) -> tuple[tuple, dict]:
        """Several (scores, keys) as one, and its `floor`."""
        first, *rest = (TopK.of(_shared(scores), _shared(keys)) for scores, keys in parts)
        for top in rest:
            first.merge(top)
        return _arrays(first), {"floor": first.floor().numpy()}

    def _arriving(
        self, reader: ThreadPoolExecutor, ahead: deque[Future], shards: Sequence[Numbered]
    ) -> Iterator[Images]:
        """What is being read and then these shards, in order; few are in memory at once."""
        for shard in shards:
            yield ahead.popleft().result()
            ahead.append(reader.submit(self._read, shard))
        while ahead:
            yield ahead.popleft().result()

    def _read(self, shard: Numbered) -> Images:
        number, path = shard
        table, described = descriptor_files.read_shard(self.run, path, self.shards[number], self.origin)
        keys = keys_of(number, len(described.z))
        return Images(described, keys, descriptor_files.votes_of(table) if self.origin.votes else None)


def _arrays(top: TopK) -> tuple[np.ndarray, np.ndarray]:
    scores, keys = top.result()
    return scores.cpu().numpy(), keys.cpu().numpy()


def _shared(array: np.ndarray) -> torch.Tensor:
    """A tensor over an array of the object store, which all actors of a node share: it is only read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _segments(arriving: Iterator[Images], least: int) -> Iterator[Images]:
    """Shards, small ones several at a time."""
    held, count = [], 0
    for images in arriving:
        held.append(images)
        count += len(images.keys)
        if count >= least:
            yield _joined(held)
            held, count = [], 0
    if held:
        yield _joined(held)


def _joined(held: list[Images]) -> Images:
    if len(held) == 1:
        return held[0]
    described, keys, votes = zip(*held, strict=True)
    described = Descriptors(*map(torch.cat, zip(*described, strict=True)))
    return Images(described, torch.cat(keys), votes[0] and tuple(map(torch.cat, zip(*votes, strict=True))))


def score(run: Run, round: int) -> dict:
    """Write round `round`'s candidates.parquet: of each center the `top_k` best pool images."""
    if run.strategy.kind != "kernel":
        return {"skipped": "the strategy has no kernel"}
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
            "image_id": ids_of(chosen.keys.numpy(), scoring.paths),
            "center_id": scoring.table["image_id"].take(pa.array(chosen.centers.numpy())),
            "rank": pa.array(chosen.ranks.numpy().astype(np.int32)),
            "score": pa.array(chosen.scores.numpy()),
        }
    )


class Scoring:
    """A round's centers in actors, or here where they and the pool are few, for one scan of its descriptors or more."""

    def __init__(self, run: Run, round: int):
        self.run, self.start = run, time.time()
        self.table, self.centers, self.origin = descriptor_files.read_centers(run, round)
        files = run.round(round)
        self.paths = [files.described(shard.name) for shard in run.pool.shards("pool")]
        self.counts, self.began, self.actors, self.here = Counter(), [], [], None

    def __enter__(self) -> "Scoring":
        resources = self.run.config.resources
        threads, gpus = resources.score_threads, session.gpus_per_actor(resources.score_gpus)
        count = resources.score_actors or (int(session.gpus() / gpus) if gpus else session.cpus() // threads)
        count = min(len(self.paths), max(1, count))
        told = (self.run, self.run.stored_kernel(), self.origin)
        z, g = (x.numpy() for x in self.centers)
        labels = self.table["label"].to_numpy() if self.origin.votes else None
        pairs = self.table.num_rows * self.run.pool.rows("pool")
        if pairs <= _HERE and not gpus and not resources.score_actors:
            self.here = Scorer(*told, z, g, threads, labels=labels)
            return self
        session.require("scoring", CPU=count * threads, GPU=count * gpus)
        z, g, labels = ray.put(z), ray.put(g), None if labels is None else ray.put(labels)
        self.actors = [start(*told, z, g, threads, gpus, labels) for _ in range(count)]
        return self

    def __exit__(self, *_) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def top_k(self, k: int, rows: slice = slice(None)) -> TopK:
        """The `k` best pool images of some of the centers; keys are shard number, then row."""
        sizes = [shard.rows for shard in self.run.pool.shards("pool")]
        centers, shards, self.counts["images"] = range(self.table.num_rows)[rows], list(enumerate(self.paths)), 0
        if self.here:
            top, facts = self.here.score(shards, k, rows)
            self._note(facts)
        else:
            with progress.current().bar("score", len(shards), "shards") as advance:
                tree = Tree(len(centers))
                for facts in through(self.actors, shards, sizes, k, centers, tree):
                    self._note(facts)
                    advance(facts["shards"])
            top = tree.whole()
        return TopK.of(*(torch.from_numpy(x.copy()) for x in top))

    def _note(self, facts: dict) -> None:
        self.counts.update({"images": facts["images"], **facts["counts"]})
        self.began.append(facts["began"])

    def facts(self) -> dict:
        """For the stage's marker: images, pairs by what was done with them, seconds until the first actor began."""
        pairs = {name: count for name, count in self.counts.items() if name != "images"}
        startup = round(min(self.began) - self.start, 3)
        return {"images": self.counts["images"], "pairs": pairs, "startup_seconds": startup}


def start(
    run: Run, kernel: Kernel, origin: Origin, z: ray.ObjectRef, g: ray.ObjectRef, threads: int, gpus: float = 0,
    labels: ray.ObjectRef | None = None,
):  # fmt: skip
    """A scoring actor. labels: the centers' classes, which votes are for."""
    options = {"num_cpus": threads, "max_concurrency": _CALLS, "max_restarts": 4, "max_task_retries": 4}
    actor = ray.remote(Scorer).options(num_gpus=gpus or None, **options)
    return actor.remote(run, kernel, origin, z, g, threads, gpus > 0, labels)


def through(
    actors: list, shards: list[Numbered], sizes: list[int], k: int, centers: range, tree: "Tree"
) -> Iterator[dict]:
    """Puts the top-K of all shards, of `sizes` images, for some of the centers into the tree; yields facts."""
    count = 1 + int(np.searchsorted(np.cumsum(sizes), _FIRST))
    step, tops = -(-len(centers) // len(actors)), {}
    starts = range(centers.start, centers.stop, step)
    todo = deque(Scan(shards[:count], slice(start, min(start + step, centers.stop))) for start in starts)
    for job, top, facts in _do(actors, todo, k, lambda: None, calls=1):
        tops[job.rows.start] = top
        yield facts if job.rows.start == centers.start else facts | {"images": 0, "shards": 0}
    scores, keys = (np.concatenate(x) for x in zip(*ray.get([tops[start] for start in starts]), strict=True))
    tree.add(ray.put((scores, keys)), scores[:, -1])
    rest = shards[count:]
    size = max(1, len(rest) // (_CHUNKS * len(actors)))
    rows = slice(centers.start, centers.stop)
    todo = deque(Scan(rest[i : i + size], rows) for i in range(0, len(rest), size))
    for job, top, facts in _do(actors, todo, k, lambda: tree.floor):
        todo.extendleft(tree.add(top, facts["floor"], job))
        if isinstance(job, Scan):
            yield facts
    while todo := deque(tree.rest()):
        for job, top, facts in _do(actors, todo, k, lambda: None):
            todo.extendleft(tree.add(top, facts["floor"], job))


def _do(
    actors: list, todo: deque[Scan | Merge], k: int, floor: Callable[[], np.ndarray | None], calls: int = _CALLS
) -> Iterator[tuple[Scan | Merge, ray.ObjectRef, dict]]:
    """Every job once by an actor that is up, with the floors of when it starts; yields it, its top-K and its facts.

    An actor has up to `calls` at once; jobs may be added meanwhile. Ray restarts an actor and calls it again; the job
    of one that it gave up goes to another. RunError without any.
    """
    idle, died = deque(), []
    busy = {actor.ready.remote(): (actor, None, None) for actor in actors}
    while busy:
        (done,), _ = ray.wait(list(busy), num_returns=1)
        actor, job, top = busy.pop(done)
        try:
            facts = ray.get(done)
            idle.extend([actor] * (1 if job else calls))
        except RayActorError as error:
            facts = None
            idle = deque(other for other in idle if other is not actor)
            if job:
                todo.append(job)
                died.append(job)
                if sum(other is job for other in died) == _ATTEMPTS:
                    what = f"{_ATTEMPTS} actors died of this or the next shards"
                    raise RunError(f"{job.name}: {what}: {error}") from None
        if facts:
            yield job, top, facts
        while todo and idle:
            actor, job = idle.popleft(), todo.popleft()
            if isinstance(job, Merge):
                top, facts = actor.merge.options(num_returns=2).remote(*job.parts)
            else:
                top, facts = actor.score.options(num_returns=2).remote(job.shards, k, job.rows, floor())
            busy[facts] = (actor, job, top)
    if todo:
        left = sum(len(job.shards) for job in todo if isinstance(job, Scan))
        raise RunError(f"all {len(actors)} scoring actors died; {left} shards are not scored")


class Tree:
    """Top-Ks, (scores, keys) in the object store, by how many merges they went through; and their floors."""

    def __init__(self, num_centers: int):
        self.levels: defaultdict[int, list[ray.ObjectRef]] = defaultdict(list)
        self.floor = np.full(num_centers, -np.inf, np.float32)

    def add(self, top: ray.ObjectRef, floor: np.ndarray, job: Scan | Merge | None = None) -> list[Merge]:
        """Takes in a part and scores (M,) that no candidate of the whole may be below; returns what is to be merged."""
        level = job.level + 1 if isinstance(job, Merge) else 0
        self.floor = np.maximum(self.floor, floor)
        self.levels[level].append(top)
        return [Merge(self.levels.pop(level), level)] if len(self.levels[level]) == _FAN_IN else []

    def rest(self) -> list[Merge]:
        """What is still to be merged, where more than one part is left."""
        parts, top = [part for level in self.levels.values() for part in level], max(self.levels)
        if len(parts) == 1:
            return []
        self.levels.clear()
        return [Merge(parts[i : i + _FAN_IN], top) for i in range(0, len(parts), _FAN_IN)]

    def whole(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores and keys (M, k) of all parts together."""
        ((part,),) = self.levels.values()
        return ray.get(part)


def candidates_table(top: TopK, centers: pa.Table, paths: list[str]) -> pa.Table:
    """candidates: (center_id, rank from 0, image_id, score), centers in the order of their id."""
    scores, keys = (t.numpy() for t in top.result())
    center, rank = np.nonzero(keys >= 0)
    keys = keys[center, rank]
    columns = [
        centers["image_id"].take(pa.array(center)),
        pa.array(rank.astype(np.int32)),
        ids_of(keys, paths),
        pa.array(scores[center, rank]),
    ]
    return pa.table(columns, schema=CANDIDATES)
