"""`raypfk verify`: a pool or a run counted again from its files, and what is wrong with it, in words.

Nothing is believed that the files do not show: every id once, every hash, every marker, selections within the pool,
labels within selections. Reads all of a pool's bytes; writes nothing.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import methodcaller
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypfk import descriptor_files, progress, store
from raypfk import pool as pools
from raypfk.errors import UserError
from raypfk.loop import STAGES
from raypfk.pool import File, Pool
from raypfk.run import Run
from raypfk.schema import CANDIDATES, LABELS, REJECTS, SELECTION, SPLITS
from raypfk.stages.pool import BEGUN
from raypfk.stages.stream import adversary_of, checkpoint_of

READERS = 8
_AS_PY = methodcaller("as_py")
SHOWN = 5
"""Images that one problem names."""
Problems = Iterator[str]


def verify(uri: str) -> list[str]:
    """What is wrong with the pool or run at `uri`, a sentence each; empty if nothing is.

    UserError where there is neither.
    """
    uri = store.absolute(uri)
    if store.exists(store.join(uri, "run.json")):
        return list(_run(uri))
    if store.exists(store.join(uri, pools.MANIFEST)) or store.exists(store.join(uri, pools.BUILDING)):
        return list(_pool(uri))
    raise UserError(f"{uri}: neither a run (run.json) nor a pool ({pools.MANIFEST}) is here")


# ------------------------------------------------------------------------------------------------------------ pool


class _Counted(NamedTuple):
    """What a file of a pool holds."""

    ids: pa.Array
    labels: pa.Array
    content: str
    problems: list[str]


def _pool(uri: str) -> Problems:
    try:
        pool = Pool.open(uri)
    except UserError as error:
        yield str(error)
        return
    contents, everywhere = {}, []
    for split in SPLITS:
        found, contents[split] = yield from _split(pool, split)
        everywhere.append(found)
    ids = pa.concat_arrays(everywhere)
    yield from (f"{uri}: image {i!r} is there {n} times" for i, n in _repeated(ids))
    if (came := pools.fingerprint(contents)) != pool.fingerprint:
        says = f"the manifest says {pool.fingerprint[:12]}"
        yield f"{uri}: the images and labels have the fingerprint {came[:12]}, {says}"
    yield from _rejects_of_pool(pool, ids)
    yield from _unfinished(pool)


def _split(pool: Pool, split: str) -> Iterator[str]:
    """Problems of a split; returns the ids that its files hold, and their content."""
    files, folder = pool.files(split), store.join(pool.uri, split)
    listed = {file.uri for file in files}
    for path in store.paths(folder):
        if path not in listed and not path.rpartition("/")[2].startswith("."):
            yield f"{path}: not in the manifest"
    ids, labels, contents = [pa.array([], pa.large_string())], [pa.array([], pa.int64())], []
    with (
        ThreadPoolExecutor(READERS) as threads,
        progress.current().bar(f"verify {split}", len(files), "files") as bar,
    ):
        for counted in threads.map(partial(_count, schema=pool.schema), files):
            yield from counted.problems
            contents.append(counted.content)
            ids.append(counted.ids)
            labels.append(counted.labels)
            bar(1)
    found = pa.concat_arrays(ids)
    yield from _ranges(pool, split, found)
    if len(found) != pool.rows(split):
        yield f"{folder}: {len(found)} images, the manifest says {pool.rows(split)}"
    yield from _histogram(pool, split, pa.concat_arrays(labels))
    return found, pools.contents(contents)


def _count(file: File, schema: pa.Schema) -> _Counted:
    nothing = pa.array([], pa.large_string()), pa.array([], pa.int64()), "0"
    try:
        data = store.read_bytes(file.uri)
    except UserError as error:
        return _Counted(*nothing, [str(error)])
    problems = []
    if store.sha256(data) != file.sha256:
        problems.append(f"{file.uri}: sha256 is {store.sha256(data)[:12]}, the manifest says {file.sha256[:12]}")
    try:
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
        table = table.select(schema.names).combine_chunks()
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        return _Counted(*nothing, [*problems, f"{file.uri}: expected a whole file of images: {error}"])
    ids, held = _ids(table["image_id"]), schema.names[1]
    content = pools.content((row["image_id"], row[held], row["label"]) for row in table.to_pylist())
    if table.num_rows != file.rows:
        problems.append(f"{file.uri}: {table.num_rows} images, the manifest says {file.rows}")
    if not pc.all(pc.less(ids[:-1], ids[1:]), min_count=0).as_py():
        problems.append(f"{file.uri}: ids are not ascending")
    return _Counted(ids, table["label"].combine_chunks(), content, problems)


def _ranges(pool: Pool, split: str, ids: pa.Array) -> Problems:
    """Of the shards: every id in one of them, as many as the manifest says, from its first to its last."""
    ids, shards = ids.take(pc.array_sort_indices(ids)), pool.shards(split)
    at = 0
    for before, shard in zip([None, *shards], shards, strict=False):
        if before and not before.last_id < shard.first_id:
            ends = f"{before.last_id!r}, where {before.name} ends"
            yield f"{shard.uri}: {shard.name} begins with {shard.first_id!r}, not after {ends}"
        start = bisect_left(ids, shard.first_id, lo=at, key=_AS_PY)
        stop = bisect_right(ids, shard.last_id, lo=start, key=_AS_PY)
        if start > at:
            yield f"{shard.uri}: image {ids[at].as_py()!r} is in no shard's range"
        at, found = stop, [ids[i].as_py() for i in (start, stop - 1)] if stop > start else [None, None]
        if found != [shard.first_id, shard.last_id] or stop - start != shard.rows:
            expected = f"{shard.rows} images, {shard.first_id!r} to {shard.last_id!r}"
            came = f"{stop - start}, {found[0]!r} to {found[1]!r}"
            yield f"{shard.uri}: {shard.name} has {came}; the manifest says {expected}"
    if at < len(ids):
        yield f"{store.join(pool.uri, split)}: image {ids[at].as_py()!r} is in no shard's range"


def _histogram(pool: Pool, split: str, labels: pa.Array) -> Problems:
    expected = pool.manifest["splits"][split]["label_histogram"]
    if expected is None or not len(labels):
        return
    if labels.null_count:
        yield f"{pool.uri}: {labels.null_count} images of {split} have no label, the manifest says that all have one"
        return
    known = labels.to_numpy()
    if known.min() < 0 or known.max() >= pool.num_classes:
        yield f"{pool.uri}: {split} has the label {known.max()}, expected 0 to {pool.num_classes - 1}"
        return
    counts = np.bincount(known, minlength=pool.num_classes).tolist()
    for name, count in zip(pool.classes, counts, strict=True):
        if count != expected[name]:
            yield f"{pool.uri}: {split} has {count} images of class {name!r}, the manifest says {expected[name]}"


def _unfinished(pool: Pool) -> Problems:
    """What a build has written beside the manifest's files. (One that was ended in its last step, when the manifest was
    there, leaves its notes; they harm nobody.)"""
    known = {f"{split}-{file.name.removesuffix('.parquet')}.json" for split in SPLITS for file in pool.files(split)}
    for name in store.names(store.join(pool.uri, pools.BUILDING), ".json"):
        if name in known or name == BEGUN:
            continue
        if store.read_record(store.join(pool.uri, pools.BUILDING, name), {"written": dict})["written"].get("file"):
            yield f"{pool.uri}: {pools.BUILDING}/{name}: of a build that was not finished, or is going on"


def _rejects_of_pool(pool: Pool, ids: pa.Array) -> Problems:
    path = store.join(pool.uri, pools.REJECTED)
    try:
        rejects = store.read_table(path, schema=REJECTS)
    except UserError as error:
        yield str(error)
        return
    if rejects.num_rows != pool.manifest["rejects"]:
        yield f"{path}: {rejects.num_rows} rejects, the manifest says {pool.manifest['rejects']}"
    yield from _inside(path, rejects["image_id"], ids, "is rejected, and in the pool too", want=False)


# ------------------------------------------------------------------------------------------------------------- run


def _run(uri: str) -> Problems:
    try:
        run = Run.open(uri)
    except UserError as error:
        yield str(error)
        return
    yield from _pool(run.pool.uri)
    try:
        pool_ids = run.pool.ids("pool", READERS)
    except UserError as error:
        yield str(error)  # of a pool that grew since, what it was then is not what was counted above
        return
    last = 0
    for number in range(run.config.rounds + 1):
        stages = ["train"] if number == 0 else list(STAGES)
        try:
            done = [stage for stage in stages if run.done(number, stage) is not None]
        except UserError as error:  # a marker that is none
            yield str(error)
            continue
        for stage in done:
            if missing := [s for s in stages[: stages.index(stage)] if s not in done]:
                yield f"{run.uri}: round {number}: {stage} is marked as done, {missing[0]} is not"
        if done and number > last + 1:
            yield f"{run.uri}: round {number} has begun, round {last + 1} has not"
        last = number if done else last
        for stage in done:
            yield from _stage(run, number, stage, pool_ids)


def _stage(run: Run, number: int, stage: str, pool_ids: pa.Array) -> Problems:
    try:
        if stage in _CHECKS:
            yield from _CHECKS[stage](run, number, pool_ids)
    except UserError as error:  # a file that is not there, damaged, or another run's
        yield str(error)


def _extracted(run: Run, number: int, pool_ids: pa.Array) -> Problems:
    """Every pool image is described, rejected, or labelled before: one of them, once."""
    strategy, files = run.strategy, run.round(number)
    if not run.describes(number):
        return
    if strategy.kind == "adversary":
        adversary_of(run, number)
    if strategy.kind == "kernel" or strategy.given & {"classes", "misses"}:
        validation = run.read(files.validation)["image_id"]
        yield from _all_once(files.validation, run, "validation", validation, files.rejects("validation"))
        weights = store.sha256(store.read_bytes(run.round(number - 1).checkpoint))[:16]
        descriptor_files.read_validation(run, number, weights)
    described = []
    for shard in run.pool.shards("pool"):
        path = files.described(shard.name)
        try:
            described.append(run.read(path, columns=["image_id"])["image_id"])
        except UserError as error:
            yield str(error)
    labelled = run.labelled(number)["image_id"]
    ids = pa.chunked_array([pa.array([], pa.string()), *(c for column in described for c in column.chunks)])
    yield from _all_once(files.descriptors, run, "pool", ids, files.rejects("pool"), labelled)


def _all_once(
    where: str, run: Run, split: str, described: pa.ChunkedArray, rejects: str, labelled: pa.ChunkedArray | None = None
) -> Problems:
    known, parts = run.pool.ids(split, READERS), [_ids(described)]
    for path in store.paths(rejects, ".parquet"):
        parts.append(_ids(store.read_table(path, schema=REJECTS)["image_id"]))
    if labelled is not None:
        parts.append(_ids(labelled))
    ids = pa.concat_arrays(parts)
    yield from (f"{where}: image {i!r} is accounted for {n} times" for i, n in _repeated(ids))
    yield from _inside(where, ids, known, "is not in the pool")
    yield from _inside(where, known, ids, "of the pool is neither described nor rejected")


def _scored(run: Run, number: int, pool_ids: pa.Array) -> Problems:
    if run.strategy.kind != "kernel":
        return
    files = run.round(number)
    table = run.read(files.candidates, CANDIDATES)
    validation = run.read(files.validation, columns=["image_id", "center"])
    centers = validation.filter(validation["center"])["image_id"].combine_chunks()
    yield from _inside(files.candidates, table["center_id"], centers, "is no center")
    yield from _inside(files.candidates, table["image_id"], pool_ids, "is not in the pool")
    labelled = run.labelled(number)["image_id"].combine_chunks()
    yield from _inside(files.candidates, table["image_id"], labelled, "was labelled before", want=False)
    table = table.sort_by([("center_id", "ascending"), ("rank", "ascending")])
    center, rank, score = (table[name].combine_chunks() for name in ("center_id", "rank", "score"))
    same = pc.equal(center[:-1], center[1:])
    steps = pc.equal(pc.subtract(rank[1:], rank[:-1]), 1)
    falls = pc.greater_equal(score[:-1], score[1:])
    if not pc.all(pc.or_(pc.invert(same), pc.and_(steps, falls)), min_count=0).as_py():
        yield f"{files.candidates}: ranks are not 0, 1, 2, ... by falling score for each center"


def _acquired(run: Run, number: int, pool_ids: pa.Array) -> Problems:
    path = run.round(number).selection
    table = run.read(path, SELECTION)
    ids, labelled = table["image_id"], run.labelled(number)["image_id"].combine_chunks()
    yield from (f"{path}: image {i!r} is selected {n} times" for i, n in _repeated(ids.combine_chunks()))
    yield from _inside(path, ids, pool_ids, "is not in the pool")
    yield from _inside(path, ids, labelled, "was labelled before", want=False)
    if table["position"].to_pylist() != list(range(table.num_rows)):
        yield f"{path}: positions are not 0 to {table.num_rows - 1}"
    most = min(run.config.budget, len(pool_ids) - len(labelled))
    rejected = sum(store.read_table(p).num_rows for p in store.paths(run.round(number).rejects("pool"), ".parquet"))
    if not most - rejected <= table.num_rows <= most:
        yield f"{path}: {table.num_rows} images are selected, expected {most}"


def _labelled(run: Run, number: int, pool_ids: pa.Array) -> Problems:
    path = run.round(number).labels
    labels, selected = run.read(path, LABELS), run.read(run.round(number).selection, SELECTION)
    ids = labels["image_id"].combine_chunks()
    yield from (f"{path}: image {i!r} is labelled {n} times" for i, n in _repeated(ids))
    chosen = selected["image_id"].combine_chunks()
    yield from _inside(path, ids, chosen, "was not selected")
    yield from _inside(path, chosen, ids, "was selected and has no label")
    wrong = [x for x in labels["label"].to_pylist() if x is None or not 0 <= x < run.classes]
    if wrong:
        yield f"{path}: the label {wrong[0]!r}, expected 0 to {run.classes - 1}"
    if run.config.oracle == "simulated":
        hidden = run.pool.labels_of(ids.to_pylist())
        for image_id, label in zip(ids.to_pylist(), labels["label"].to_pylist(), strict=True):
            if hidden[image_id] != label:
                yield f"{path}: image {image_id!r} has the label {label}, the pool says {hidden[image_id]}"


def _trained(run: Run, number: int, pool_ids: pa.Array) -> Problems:
    for member in range(run.members):
        checkpoint_of(run, number, member)
    yield from ()


def _evaluated(run: Run, number: int, pool_ids: pa.Array) -> Problems:
    path, done = run.round(number).metrics, run.done(number, "evaluate")
    metrics = store.read_record(path, {"confusion": list, "labelled": int})
    store.require(run.round(number).marker("evaluate"), done, {"tested": int})
    tested, classes = done["tested"], range(run.classes)
    try:
        total = sum(int(metrics["confusion"][i][j]) for i in classes for j in classes)
    except (LookupError, TypeError, ValueError):
        raise UserError(f"{path}: confusion: expected {run.classes} rows of as many counts") from None
    if total != tested:
        yield f"{path}: the confusion matrix counts {total} images, the stage tested {tested}"
    if metrics["labelled"] != run.labelled(number + 1).num_rows:
        yield f"{path}: {metrics['labelled']} labelled images, there are {run.labelled(number + 1).num_rows}"
    rejected = sum(store.read_table(p).num_rows for p in store.paths(run.round(number).rejects("test"), ".parquet"))
    if tested + rejected != run.pool.rows("test"):
        yield f"{path}: {tested} images tested and {rejected} rejected of {run.pool.rows('test')}"


_CHECKS: dict[str, Callable[[Run, int, pa.Array], Problems]] = {
    "extract": _extracted,
    "score": _scored,
    "acquire": _acquired,
    "label": _labelled,
    "train": _trained,
    "evaluate": _evaluated,
}


# ------------------------------------------------------------------------------------------------------------- ids


def _repeated(ids: pa.Array) -> list[tuple[str, int]]:
    """The first few ids that are there more than once."""
    counts = pc.value_counts(ids)
    counts = counts.filter(pc.greater(counts.field("counts"), 1))
    return [(one["values"], one["counts"]) for one in counts[:SHOWN].to_pylist()]


def _ids(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """In one piece: of many images they are more than the 2 GiB of a `string`."""
    column = column.cast(pa.large_string())
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _inside(where: str, ids, known, otherwise: str, want: bool = True) -> Problems:
    """Says which ids are not among `known` (want False: are)."""
    ids = _ids(ids)
    found = pc.is_in(ids, _ids(known))
    strays = ids.filter(pc.invert(found) if want else found)
    for image_id in strays[:SHOWN].to_pylist():
        yield f"{where}: image {image_id!r} {otherwise}"
    if len(strays) > SHOWN:
        yield f"{where}: and {len(strays) - SHOWN} more images like that"
