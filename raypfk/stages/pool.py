"""Pool: every image checked by decoding it, given a stable id, and written once in files of Parquet.

POOL/<split>/00000.parquet for the splits pool, validation and test (schema.IMAGES), in the order of image_id;
POOL/rejects.parquet; POOL/manifest.json last: where it is, the pool is whole. Until then POOL/building says which files
are done, so that a build that was broken off goes on. A pool that grows gets further files; those that are there stay.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from operator import methodcaller
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from raypfk import lease, progress, session, sources, store
from raypfk import pool as pools
from raypfk.config import FILES, DataConfig
from raypfk.errors import RunError, UserError
from raypfk.pool import BUILDING, FORMAT, MANIFEST, REJECTED, File, Pool, Shard
from raypfk.rejects import Reject, Rejects
from raypfk.schema import REJECTS, SPLITS
from raypfk.sources import UNKNOWN, Entries, Listing
from raypfk.stages.pool_files import Plan, Written, write

BEGUN = "begun.json"
_AS_PY = methodcaller("as_py")


def build(data: DataConfig, dest: str, seed: int, grow: bool = False) -> Pool:
    """The pool of `data` at `dest`: built now on the running Ray, or as it was finished before.

    seed: draws what is held out and what is made rare. grow: a pool that is there gets what its source has got since.
    Half a build goes on; a pool of another source, seed or configuration, or any other folder, is refused.
    """
    dest = store.absolute(dest)
    for place in (dest, data.root, data.validation_root, data.test_root, data.labels):
        store.resolve(place or "")  # keys in a URI are refused before anything shows it
    if (there := _finished(data, dest, seed)) and not grow:
        return there
    _refuse_strangers(data, dest)
    with lease.held(dest):
        there = _finished(data, dest, seed)  # by the driver that was waited for
        if there is None or grow:
            _build(data, dest, seed, there)
    return Pool.open(dest)


def _build(data: DataConfig, dest: str, seed: int, before: Pool | None) -> None:
    say = progress.current().say
    if before and (why := _cannot_grow(data)):
        say(f"{dest}: finished before; {why}")
        return
    say(f"listing {data.source} {data.root or ''}".rstrip())
    listing = sources.listing(data)
    if before:
        splits, imbalance = _new(listing, before), before.manifest["imbalance"]
        if not any(map(len, splits.values())) and not listing.rejects:
            say(f"{dest}: nothing new")
            store.delete(store.join(dest, BUILDING))
            return
    else:
        splits, imbalance = sources.split(listing, data, seed)
        _refuse_empty(data, listing, splits)
    _refuse_unlabelled(splits)
    _refuse_same_ids(splits)
    for note in listing.notes:
        say(note)
    _begin(data, dest, seed)
    written = _write_files(splits, before, data, dest)
    if not before:
        _refuse_all_rejected(splits, written)
    _finish(data, dest, seed, before, listing, imbalance, written)


def _begin(data: DataConfig, dest: str, seed: int) -> None:
    """What half a build of the same pool has done counts; all else that one left does not."""
    path, what = store.join(dest, BUILDING, BEGUN), {"seed": seed, "data": _settings(data)}
    if store.exists(path):
        if store.read_json(path) == what:
            progress.current().say(f"{dest}: half a pool, going on")
            return
        progress.current().say(f"{dest}: half of another pool, building it again")
        lease.check(dest)  # a driver that stood still may meet here what another does
        store.delete(store.join(dest, BUILDING))
    store.write_json(path, what)


def _finish(
    data: DataConfig, dest: str, seed: int, before: Pool | None, listing: Listing, imbalance: dict | None,
    written: list[Written],
) -> None:  # fmt: skip
    new = sorted(listing.rejects + [tuple(reject) for part in written for reject in part.rejects])
    rejects = _with_rejects(before, new)
    lease.check(dest)
    store.write_table(store.join(dest, REJECTED), rejects)
    manifest = _manifest(data, dest, seed, before, listing, imbalance, written) | {"rejects": rejects.num_rows}
    lease.check(dest)  # it took a while: by now another may have finished
    _delete_strays(dest, manifest)
    if before:
        store.write_json(pools.earlier(dest, before.fingerprint), before.manifest)
    lease.check(dest)
    store.write_json(store.join(dest, MANIFEST), manifest)
    store.delete(store.join(dest, BUILDING))
    grown = "grew by" if before else "has"
    rows = {split: manifest["splits"][split]["rows"] - (before.rows(split) if before else 0) for split in SPLITS}
    counts = ", ".join(f"{split} {rows[split]:,}" for split in SPLITS)
    progress.current().say(f"{dest}: {grown} {counts} images, {len(new):,} rejected")


def _with_rejects(before: Pool | None, new: list[Reject]) -> pa.Table:
    """The rejects that the manifest before counts, then the new ones."""
    columns = list(zip(*new, strict=True)) or [(), ()]
    table = pa.table([pa.array(c, pa.string()) for c in columns], schema=REJECTS)
    return pa.concat_tables([_rejects(before), table]) if before else table


def _rejects(pool: Pool) -> pa.Table:
    return store.read_table(store.join(pool.uri, REJECTED), schema=REJECTS)[: pool.manifest["rejects"]]


def _delete_strays(dest: str, manifest: dict[str, Any]) -> None:
    """Files that an earlier half of a build wrote, and this one did not need."""
    for split in SPLITS:
        folder, known = store.join(dest, split), {file["name"] for file in manifest["splits"][split]["files"]}
        for name in store.names(folder, ".parquet"):
            if name not in known:
                store.delete(store.join(folder, name))


# -------------------------------------------------------------------------------------------------------- growing


def _cannot_grow(data: DataConfig) -> str | None:
    """Why a finished pool of this source stays as it is."""
    if data.source not in FILES:
        return f"{data.source} does not grow"
    return "data.imbalance left images out, so it does not grow" if data.imbalance else None


def _new(listing: Listing, before: Pool) -> dict[str, Entries]:
    """What is listed and not there: new training images go to the pool; what was held out is held out for good."""
    rejected = _rejects(before)["image_id"].cast(pa.large_string()).combine_chunks()
    known = pa.concat_arrays([rejected, *(before.ids(split) for split in SPLITS)])
    splits = {"pool": listing.train, "validation": listing.validation, "test": listing.test}
    nothing = listing.train.take(np.empty(0, np.int64))
    new = {}
    for split, entries in splits.items():
        entries = entries or nothing
        rows = np.flatnonzero(~pc.is_in(entries.ids, known).to_numpy(zero_copy_only=False))
        new[split] = _classed_as(before, listing.classes, entries.take(rows))
    rejects = set(rejected.to_pylist())
    listing.rejects = [reject for reject in listing.rejects if reject[0] not in rejects]
    return new


def _classed_as(before: Pool, classes: list[str] | None, entries: Entries) -> Entries:
    """The entries with the labels of the pool's classes. UserError for a class that it does not have."""
    if entries.labels is None or classes == before.classes:
        return entries
    index = {name: i for i, name in enumerate(before.classes or [])}
    for label in np.unique(entries.labels[entries.labels != UNKNOWN]):
        if classes[label] not in index:
            raise UserError(f"{before.uri}: the class {classes[label]!r} is new, expected some of {before.classes}")
    to = np.array([*(index.get(name, UNKNOWN) for name in classes), UNKNOWN])  # UNKNOWN, -1, finds the last
    return Entries(entries.ids, entries.keys, to[entries.labels])


def _stretches(ids: pa.Array, shards: list[Shard]) -> Iterator[tuple[int, int, int | None]]:
    """Ascending ids as (start, stop, number of the shard in whose range they are, or None)."""
    at = 0
    for i, shard in enumerate(shards):
        start = bisect_left(ids, shard.first_id, lo=at, key=_AS_PY)
        stop = bisect_right(ids, shard.last_id, lo=start, key=_AS_PY)
        yield at, start, None
        yield start, stop, i
        at = stop
    yield at, len(ids), None


def _divided(pool: Pool, split: str, shard: Shard, new: list[dict[str, Any]], rows: int) -> list[dict[str, Any]]:
    """The shards that one becomes with new files in its range: it alone, or where it got long some of `rows` images."""
    folder = store.join(pool.uri, split)
    files = [*shard.files, *(File(store.join(folder, f["name"]), f["rows"], f["sha256"]) for f in new)]
    found = []
    for file in files:
        ids = store.read_table(file.uri, ["image_id"])["image_id"].to_pylist()
        found += [(image_id, file.name) for image_id in ids if shard.first_id <= image_id <= shard.last_id]
    found.sort()
    parts = 1 if len(found) <= 2 * rows else -(-len(found) // rows)
    bounds = np.linspace(0, len(found), parts + 1).astype(int)
    return [_shard(found[a][0], found[b - 1][0], b - a, {name for _, name in found[a:b]}) for a, b in _pairs(bounds)]


def _pairs(bounds: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))


def _shard(first_id: str, last_id: str, rows: int, files: set[str]) -> dict[str, Any]:
    return {"rows": rows, "first_id": first_id, "last_id": last_id, "files": sorted(files)}


# ------------------------------------------------------------------------------------------------------- all files


def _write_files(splits: dict[str, Entries], before: Pool | None, data: DataConfig, dest: str) -> list[Written]:
    """Run the tasks; results in the order of the plans."""
    task = ray.remote(num_cpus=1, max_retries=3, retry_exceptions=[OSError])(write)
    total = sum(map(len, splits.values()))
    rejects = Rejects(dest, total, data.max_rejects)
    written: list[Written | None] = []
    running: dict[ray.ObjectRef, tuple[int, Plan]] = {}
    waiting = _plans(splits, before, data, dest)
    with progress.current().bar("pool", total, "images") as advance, _cancelled(running):
        while True:
            # More than can run at once: a cluster grows only where tasks wait.
            while len(running) < 2 * session.cpus() + 2 and (plan := next(waiting, None)) is not None:
                lease.check(dest)  # a driver that stood still may write over what another did of a newer listing
                running[task.remote(plan)] = len(written), plan
                written.append(None)
            if not running:
                return written
            ready, _ = ray.wait(list(running))
            i, plan = running.pop(ready[0])
            written[i] = _result(ready[0], plan)
            rejects.add(written[i].rejects)
            advance(len(plan.entries))


def _plans(splits: dict[str, Entries], before: Pool | None, data: DataConfig, dest: str) -> Iterator[Plan]:
    source = sources.of(data)
    for split in SPLITS:
        entries, shards = splits[split], before.shards(split) if before else []
        number = len(before.manifest["splits"][split]["files"]) if before else 0
        for start, stop, within in _stretches(entries.ids, shards):
            for first in range(start, stop, data.shard_rows):
                part = entries.take(np.arange(first, min(first + data.shard_rows, stop)))
                name = f"{split}-{number:05d}"
                done, mark = (store.join(dest, BUILDING, f"{name}.{kind}") for kind in ("json", "trying"))
                uri = store.join(dest, split, f"{number:05d}.parquet")
                yield Plan(split, uri, source, part, within, done, mark, data.max_pixels, data.by_reference)
                number += 1


@contextmanager
def _cancelled(running: dict[ray.ObjectRef, Any]) -> Iterator[None]:
    """At the end, however it comes, nothing runs on."""
    try:
        yield
    finally:
        for ref in running:
            ray.cancel(ref)


def _result(ref: ray.ObjectRef, plan: Plan) -> Written:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise RunError(f"{plan.uri}: {type(error.cause).__name__}: {error.cause}") from error
    except ray.exceptions.RayError as error:
        first, last = (plan.entries.ids[i].as_py() for i in (0, -1))
        raise RunError(f"{plan.uri}: what checked the images {first!r} to {last!r} died, and again: {error}") from error


# -------------------------------------------------------------------------------------------------------- manifest


def _manifest(
    data: DataConfig, dest: str, seed: int, before: Pool | None, listing: Listing, imbalance: dict | None,
    written: list[Written],
) -> dict[str, Any]:  # fmt: skip
    classes = before.classes if before else listing.classes
    splits = {}
    for split in SPLITS:
        own = [part for part in written if part.split == split and part.file]
        splits[split] = _split_entry(data, split, before, classes, own)
    return {
        "format_version": FORMAT,
        "source": {"kind": data.source, "root": data.root},
        "seed": seed,
        "data": _settings(data),
        "notes": (before.manifest["notes"] if before else []) + listing.notes,
        "imbalance": imbalance,
        "classes": classes,
        "image": _image(data, before, written),
        "splits": splits,
        "fingerprint": pools.fingerprint({split: entry["content"] for split, entry in splits.items()}),
        "grown_from": before.fingerprint if before else None,
    }


def _image(data: DataConfig, before: Pool | None, written: list[Written]) -> dict[str, int | None]:
    """What all images have in common."""
    sizes = {tuple(size) for part in written for size in part.sizes}
    channels = None if data.by_reference else 1 if all(part.grey for part in written) else 3
    width, height = next(iter(sizes)) if len(sizes) == 1 else (None, None)
    image = {"channels": channels, "width": width, "height": height}
    if before and sizes:
        then = before.manifest["image"]
        same = (then["width"], then["height"]) == (width, height)
        grey_too = channels and max(channels, then["channels"])
        return {"channels": grey_too} | {k: then[k] if same else None for k in ("width", "height")}
    return before.manifest["image"] if before else image


def _split_entry(
    data: DataConfig, split: str, before: Pool | None, classes: list[str] | None, written: list[Written]
) -> dict[str, Any]:
    then = before.manifest["splits"][split] if before else {"files": []}
    files = then["files"] + [part.file for part in written]
    shards = _shards(before, split, written, data.shard_rows)
    return {
        "rows": sum(file["rows"] for file in files),
        "bytes": sum(file["bytes"] for file in files),
        "label_histogram": _histogram(then, classes, written),
        "content": pools.contents(file["content"] for file in files),
        "files": files,
        "shards": [{"name": f"{i:05d}.parquet", **shard} for i, shard in enumerate(shards)],
    }


def _shards(before: Pool | None, split: str, written: list[Written], rows: int) -> list[dict[str, Any]]:
    """A shard for each file; of a pool that grew also those that were there, with what is new in their range."""
    within, shards = defaultdict(list), []
    for part in written:
        if part.within is None:
            file = part.file
            shards.append(_shard(file["first_id"], file["last_id"], file["rows"], {file["name"]}))
        else:
            within[part.within].append(part.file)
    for i, shard in enumerate(before.shards(split) if before else []):
        if i in within:
            shards += _divided(before, split, shard, within[i], rows)
        else:
            shards.append(_shard(shard.first_id, shard.last_id, shard.rows, {file.name for file in shard.files}))
    return sorted(shards, key=lambda shard: shard["first_id"])


def _histogram(then: dict[str, Any], classes: list[str] | None, written: list[Written]) -> dict[str, int] | None:
    old = then.get("label_histogram")
    if not classes or (then["files"] and old is None) or any(part.histogram is None for part in written):
        return None
    if not then["files"] and not written:
        return None
    counts = [list((old or {}).values()), *(part.histogram for part in written)]
    total = [sum(column) for column in zip_longest(*counts, [0] * len(classes), fillvalue=0)]
    return dict(zip(classes, total, strict=True))


# ------------------------------------------------------------------------------------------------------- refusals


def _settings(data: DataConfig) -> dict[str, Any]:
    """What makes the pool what it is."""
    return data.model_dump(exclude={"pool", "max_rejects"})


def _finished(data: DataConfig, dest: str, seed: int) -> Pool | None:
    """The very pool, if it lies there; UserError that names the fields if it is another one."""
    if not store.exists(store.join(dest, MANIFEST)):
        return None
    pool = Pool.open(dest)
    there = pool.manifest
    known = _settings(DataConfig(**there["data"]))  # what is newer than the pool had no other value than the default
    old, new = known | {"seed": there["seed"]}, _settings(data) | {"seed": seed}
    fields = [name for name in new if old.get(name) != new[name]]
    if fields:
        names = ["seed" if name == "seed" else f"data.{name}" for name in fields]
        found = [f"{n}: {old.get(f)!r} there, {new[f]!r} now" for n, f in zip(names, fields, strict=True)]
        raise UserError(f"{dest} holds another pool: {'; '.join(found)}")
    return pool


def _refuse_strangers(data: DataConfig, dest: str) -> None:
    """UserError if anything but a pool or half of one lies at `dest`, or if `dest` lies in the source."""
    for name in ("root", "validation_root", "test_root"):
        root = getattr(data, name)
        if data.source in FILES and root and (dest + "/").startswith(store.absolute(root) + "/"):
            raise UserError(f"{dest}: a pool cannot be built inside its own source, data.{name}: {root}")
    try:
        found = [entry.path for entry in store.entries(dest)]
    except OSError as error:
        raise UserError(f"{dest}: expected a folder to build a pool in: {error}") from None
    strangers = sorted(name for name in found if not name.startswith(".") and name != lease.NAME)
    if strangers and BUILDING not in strangers and MANIFEST not in strangers:
        raise UserError(f"{dest}: not empty and not a pool (it holds {strangers[0]!r}): name another folder")


def _refuse_empty(data: DataConfig, listing: Listing, splits: dict[str, Entries]) -> None:
    if len(splits["pool"]):
        return
    if len(listing.train):
        raise UserError(f"data.validation and data.test take all {len(listing.train)} images, the pool is empty")
    why = f"; {len(listing.rejects)} rejected, the first: {': '.join(listing.rejects[0])}" if listing.rejects else ""
    raise UserError(f"data.root: {data.root}: no images{why}")


def _refuse_unlabelled(splits: dict[str, Entries]) -> None:
    for split in ("validation", "test"):
        entries = splits[split]
        unknown = np.flatnonzero(entries.labels == UNKNOWN) if entries.labels is not None else range(len(entries))
        if len(unknown):
            first = entries.ids[unknown[0]].as_py()
            raise UserError(f"{split}: image {first!r} has no label; {len(unknown)} have none")


def _refuse_same_ids(splits: dict[str, Entries]) -> None:
    """An id names one image of the whole pool. Names that differ in Unicode's form only would share one."""
    ids, keys = (pa.concat_arrays([getattr(entries, name) for entries in splits.values()]) for name in ("ids", "keys"))
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0].as_py()
    first, second = keys.filter(pc.equal(ids, twice)).to_pylist()[:2]
    raise UserError(f"two images with the id {twice!r}: {first!a} and {second!a}")


def _refuse_all_rejected(splits: dict[str, Entries], written: list[Written]) -> None:
    for split, entries in splits.items():
        if len(entries) and not any(part.file for part in written if part.split == split):
            first = next(part.rejects[0] for part in written if part.split == split)
            raise UserError(f"{split}: all {len(entries)} images are rejected, the first: {': '.join(first)}")
