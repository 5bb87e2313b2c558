"""Pool: every image checked by decoding it, given a stable id, and written once in shards of Parquet.

POOL/<split>/00000.parquet for the splits pool, validation and test (schema.IMAGES), in the order of image_id over all
shards of a split; POOL/rejects.parquet; POOL/manifest.json last: where it is, the pool is whole.
"""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray
import torch

from raypfk import images, progress, session, sources, store
from raypfk.config import DataConfig
from raypfk.errors import RunError, UserError
from raypfk.schema import IMAGES, REJECTS, SPLITS
from raypfk.sources import Arrays, Entries, Folder, Listing

FORMAT = 1
MANIFEST = "manifest.json"
REJECTED = "rejects.parquet"
BUILDING = "building.json"  # there from a build's first write to its end: what lies beside it may be deleted


@dataclass(frozen=True)
class Shard:
    """One file of a split. name: "00000.parquet"; ids: first and last in it, as strings compare."""

    uri: str
    name: str
    rows: int
    first_id: str
    last_id: str
    sha256: str


@dataclass(frozen=True)
class Pool:
    """A finished pool. Small and picklable: hand it to tasks and actors."""

    uri: str
    manifest: dict[str, Any]

    @classmethod
    def open(cls, uri: str) -> "Pool":
        uri = store.absolute(uri)
        path = store.join(uri, MANIFEST)
        if not store.exists(path):
            half = " (its build was not finished)" if store.exists(store.join(uri, BUILDING)) else ""
            raise UserError(f"{uri}: no pool here: {MANIFEST} is missing{half}")
        manifest = store.read_json(path)
        if not isinstance(manifest, dict) or "fingerprint" not in manifest or "format_version" not in manifest:
            raise UserError(f"{path}: not the manifest of a pool")
        if manifest["format_version"] != FORMAT:
            raise UserError(f"{path}: format_version {manifest['format_version']!r}, expected {FORMAT}")
        return cls(uri, manifest)

    @property
    def fingerprint(self) -> str:
        """sha256 over the ids, images and labels of all splits: the same for any shard size."""
        return self.manifest["fingerprint"]

    @property
    def classes(self) -> list[str] | None:
        """Class names in the order of their indices; None for a pool without labels."""
        return self.manifest["classes"]

    @property
    def num_classes(self) -> int:
        return len(self.classes or [])

    def rows(self, split: str) -> int:
        return self.manifest["splits"][split]["rows"]

    def shards(self, split: str) -> list[Shard]:
        """In the order of image_id: every id of a shard is less than every id of the next."""
        fields = ("name", "rows", "first_id", "last_id", "sha256")
        entries = self.manifest["splits"][split]["shards"]
        return [Shard(store.join(self.uri, split, e["name"]), *(e[field] for field in fields)) for e in entries]

    def read_shard(self, shard: Shard, columns: list[str] | None = None) -> pa.Table:
        """The columns (all, if None) of one shard. UserError if the file is absent, damaged or another one."""
        table = store.read_table(shard.uri, columns, IMAGES)
        if table.num_rows != shard.rows:
            raise UserError(f"{shard.uri}: {table.num_rows} images, but the manifest says {shard.rows}")
        if "image_id" in table.column_names and table["image_id"][0].as_py() != shard.first_id:
            raise UserError(f"{shard.uri}: begins with {table['image_id'][0]}, but the manifest says {shard.first_id}")
        return table

    def locate(self, ids: Iterable[str]) -> list[Shard]:
        """The shards of the split "pool" whose range holds any of `ids`, in order. UserError for an id in none."""
        return list(self.by_shard(ids))

    def labels_of(self, ids: Iterable[str]) -> dict[str, int]:
        """The hidden labels of pool images: the simulated oracle. UserError naming one that has none."""
        wanted = self.by_shard(ids)
        with ThreadPoolExecutor(8) as threads:
            tables = list(threads.map(lambda shard: self.read_shard(shard, ["image_id", "label"]), wanted))
        labels = {}
        for table, of_shard in zip(tables, wanted.values(), strict=True):
            known = dict(zip(table["image_id"].to_pylist(), table["label"].to_pylist(), strict=True))
            for image_id in of_shard:
                if image_id not in known:
                    raise UserError(f"{self.uri}: no image {image_id!r} in the pool")
                if known[image_id] is None:
                    raise UserError(f"{self.uri}: image {image_id!r} has no label")
                labels[image_id] = known[image_id]
        return labels

    def by_shard(self, ids: Iterable[str]) -> dict[Shard, list[str]]:
        """Ids of the split "pool" by the shard that holds them, in order. UserError for an id outside all of them."""
        shards = self.shards("pool")
        first_ids = [shard.first_id for shard in shards]
        found: dict[int, list[str]] = {}
        for image_id in ids:
            i = bisect_right(first_ids, image_id) - 1
            if i < 0 or image_id > shards[i].last_id:
                raise UserError(f"{self.uri}: no image {image_id!r} in the pool")
            found.setdefault(i, []).append(image_id)
        return {shards[i]: found[i] for i in sorted(found)}


def build(data: DataConfig, dest: str, seed: int) -> Pool:
    """The pool of `data` at `dest`: built now on the running Ray, or as it was finished before.

    seed: draws what is held out and what is made rare.
    Half a build is built again; a pool of another source, seed or configuration, or any other folder, is refused.
    """
    dest = store.absolute(dest)
    if _is_finished(data, dest, seed):
        return Pool.open(dest)
    begun = _refuse_strangers(data, dest)
    source, say = sources.of(data), progress.current().say
    say(f"listing {data.source} {data.root or ''}".rstrip())
    listing = source.list()
    splits, imbalance = sources.split(listing, data, seed)
    _refuse_empty(data, listing, splits)
    _refuse_same_ids(splits)
    for note in listing.notes:
        say(note)
    if begun:
        say(f"{dest}: half a pool, building it again")
        for name in (*SPLITS, REJECTED):
            store.delete(store.join(dest, name))
    store.write_json(store.join(dest, BUILDING), {"building": "raypfk pool"})
    written = _write_shards(list(_plans(splits, source, data, dest)), sum(map(len, splits.values())))
    rejects = sorted(listing.rejects + [reject for part in written for reject in part.rejects])
    _refuse_all_rejected(splits, written)
    columns = list(zip(*rejects, strict=True)) or [(), ()]
    store.write_table(store.join(dest, REJECTED), pa.table([pa.array(c, pa.string()) for c in columns], schema=REJECTS))
    manifest = _manifest(data, seed, listing, imbalance, written, len(rejects))
    store.write_json(store.join(dest, MANIFEST), manifest)
    store.delete(store.join(dest, BUILDING))
    counts = ", ".join(f"{split} {manifest['splits'][split]['rows']:,}" for split in SPLITS)
    say(f"{dest}: {counts} images, {len(rejects):,} rejected")
    return Pool.open(dest)


# ---------------------------------------------------------------------------------------------------- one shard


@dataclass(frozen=True)
class _Plan:
    """The images that one task checks and writes."""

    split: str
    uri: str
    source: Folder | Arrays
    entries: Entries
    max_pixels: int


@dataclass(frozen=True)
class _Written:
    """What a task says of its shard. shard: None if every image was rejected."""

    split: str
    shard: dict[str, Any] | None
    rejects: list[tuple[str, str]]
    labels: np.ndarray | None
    row_hashes: bytes
    """32 bytes an image: sha256 of its id, the sha256 of its bytes, and its label."""
    grey: bool
    sizes: frozenset[tuple[int, int]]
    """(width, height) found, two of them at most."""


def _write_shard(plan: _Plan) -> _Written:
    """Task: read, decode and write the images of one shard."""
    torch.set_num_threads(1)
    good, rejects, channels = [], [], set()
    entries = plan.entries
    for i, data in enumerate(_read_all(plan)):
        try:
            if isinstance(data, str):
                raise images.BadImage(data)
            pixels = images.decode(data, None, plan.max_pixels)
        except images.BadImage as error:
            rejects.append((entries.ids[i], str(error)))
            continue
        channels.add(pixels.shape[0])
        label = None if entries.labels is None else int(entries.labels[i])
        good.append((entries.ids[i], data, pixels.shape[2], pixels.shape[1], label))
    table = _table(good)
    labels = None if entries.labels is None else table["label"].to_numpy()
    sizes = sorted({row[2:4] for row in good})[:2]
    hashes = b"".join(_row_hash(row) for row in good)
    shard = _publish(plan.uri, table) if good else None
    return _Written(plan.split, shard, rejects, labels, hashes, channels <= {1}, frozenset(sizes))


def _read_all(plan: _Plan) -> Iterator[bytes | str]:
    """The encoded images in order; a str says why one cannot be read. Other trouble is raised, and tried again."""

    def read(key: str) -> bytes | str:
        try:
            return plan.source.read(key)
        except PermissionError:
            return "cannot be read: permission denied"
        except UserError:
            if isinstance(plan.source, Folder):
                return "cannot be read: it is gone since the folder was listed"
            raise

    with ThreadPoolExecutor(plan.source.readers) as threads:
        yield from threads.map(read, plan.entries.keys)


def _table(rows: list[tuple]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(IMAGES)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, IMAGES, strict=True)], schema=IMAGES)


def _row_hash(row: tuple) -> bytes:
    image_id, data, _, _, label = row
    return hashlib.sha256(b"\0".join([image_id.encode(), hashlib.sha256(data).digest(), str(label).encode()])).digest()


def _publish(uri: str, table: pa.Table) -> dict[str, Any]:
    """Write a shard; its entry in the manifest. The images are compressed already."""
    compression = {name: "none" if name == "image" else "zstd" for name in table.column_names}
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression=compression, use_dictionary=False, write_statistics=["image_id"],
        write_page_checksum=True,
    )  # fmt: skip
    data = sink.getvalue()
    store.write_bytes(uri, data)
    ids = table["image_id"]
    return {
        "name": os.path.basename(uri),
        "rows": table.num_rows,
        "bytes": data.size,
        "sha256": store.sha256(data),
        "first_id": ids[0].as_py(),
        "last_id": ids[-1].as_py(),
    }


# ------------------------------------------------------------------------------------------------------- all shards


def _plans(splits: dict[str, Entries], source: Folder | Arrays, data: DataConfig, dest: str) -> Iterator[_Plan]:
    for split in SPLITS:
        entries = splits[split]
        for number, start in enumerate(range(0, len(entries), data.shard_rows)):
            part = entries.take(np.arange(start, min(start + data.shard_rows, len(entries))))
            yield _Plan(split, store.join(dest, split, f"{number:05d}.parquet"), source, part, data.max_pixels)


def _write_shards(plans: list[_Plan], total: int) -> list[_Written]:
    """Run the tasks; results in the order of the plans."""
    task = ray.remote(num_cpus=1, max_retries=3, retry_exceptions=[OSError])(_write_shard)
    written: list[_Written | None] = [None] * len(plans)
    running: dict[ray.ObjectRef, int] = {}
    waiting = iter(range(len(plans)))
    with progress.current().bar("pool", total, "images") as advance, _cancelled(running):
        while True:
            # More than can run at once: a cluster grows only where tasks wait.
            while len(running) < 2 * session.cpus() + 2 and (i := next(waiting, None)) is not None:
                running[task.remote(plans[i])] = i
            if not running:
                return written
            ready, _ = ray.wait(list(running))
            i = running.pop(ready[0])
            written[i] = _result(ready[0], plans[i])
            advance(len(plans[i].entries))


@contextmanager
def _cancelled(running: dict[ray.ObjectRef, int]) -> Iterator[None]:
    """At the end, however it comes, nothing runs on."""
    try:
        yield
    finally:
        for ref in running:
            ray.cancel(ref)


def _result(ref: ray.ObjectRef, plan: _Plan) -> _Written:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise RunError(f"{plan.uri}: {type(error.cause).__name__}: {error.cause}") from error
    except ray.exceptions.RayError as error:
        ids = plan.entries.ids
        raise RunError(
            f"{plan.uri}: the process that checked the images {ids[0]!r} to {ids[-1]!r} died, and again: {error}"
        ) from error


def _manifest(
    data: DataConfig, seed: int, listing: Listing, imbalance: dict | None, written: list[_Written], rejects: int
) -> dict[str, Any]:
    fingerprint = hashlib.sha256()
    for split in SPLITS:
        fingerprint.update(split.encode())
        for part in written:
            if part.split == split:
                fingerprint.update(part.row_hashes)
    sizes = frozenset().union(*(part.sizes for part in written))
    width, height = next(iter(sizes)) if len(sizes) == 1 else (None, None)
    channels = 1 if all(part.grey for part in written) else 3
    return {
        "format_version": FORMAT,
        "source": {"kind": data.source, "root": data.root},
        "seed": seed,
        "data": _settings(data),
        "notes": listing.notes,
        "imbalance": imbalance,
        "classes": listing.classes,
        "image": {"channels": channels, "width": width, "height": height},
        "splits": {split: _split_entry([p for p in written if p.split == split], listing.classes) for split in SPLITS},
        "rejects": rejects,
        "fingerprint": fingerprint.hexdigest(),
    }


def _split_entry(written: list[_Written], classes: list[str] | None) -> dict[str, Any]:
    shards = [part.shard for part in written if part.shard]
    histogram = None
    if written and all(part.labels is not None for part in written):
        counts = np.bincount(np.concatenate([part.labels for part in written]), minlength=len(classes))
        histogram = dict(zip(classes, counts.tolist(), strict=True))
    return {
        "rows": sum(shard["rows"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "label_histogram": histogram,
        "shards": shards,
    }


# ------------------------------------------------------------------------------------------------------- refusals


def _settings(data: DataConfig) -> dict[str, Any]:
    return data.model_dump(exclude={"pool"})


def _is_finished(data: DataConfig, dest: str, seed: int) -> bool:
    """Whether the very pool lies there; UserError that names the fields if it is another one."""
    if not store.exists(store.join(dest, MANIFEST)):
        return False
    there = Pool.open(dest).manifest
    old, new = there["data"] | {"seed": there["seed"]}, _settings(data) | {"seed": seed}
    fields = [name for name in new if old.get(name) != new[name]]
    if fields:
        names = ["seed" if name == "seed" else f"data.{name}" for name in fields]
        found = [f"{n}: {old.get(f)!r} there, {new[f]!r} now" for n, f in zip(names, fields, strict=True)]
        raise UserError(f"{dest} holds another pool: {'; '.join(found)}")
    return True


def _refuse_strangers(data: DataConfig, dest: str) -> bool:
    """Whether half a build lies at `dest`. UserError if anything else does, or if `dest` lies in the source."""
    for name in ("root", "validation_root", "test_root"):
        root = getattr(data, name)
        if data.source == "folder" and root and (dest + "/").startswith(store.absolute(root) + "/"):
            raise UserError(f"{dest}: a pool cannot be built inside its own source, data.{name}: {root}")
    fs, path = store.resolve(dest)
    try:
        found = [info.base_name for info in fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))]
    except OSError as error:
        raise UserError(f"{dest}: expected a folder to build a pool in: {error}") from None
    strangers = sorted(name for name in found if not name.startswith("."))
    if strangers and BUILDING not in strangers:
        raise UserError(f"{dest}: not empty and not a pool (it holds {strangers[0]!r}): name another folder")
    return bool(strangers)


def _refuse_empty(data: DataConfig, listing: Listing, splits: dict[str, Entries]) -> None:
    if len(splits["pool"]):
        return
    if len(listing.train):
        raise UserError(f"data.validation and data.test take all {len(listing.train)} images, the pool is empty")
    why = f"; {len(listing.rejects)} rejected, the first: {': '.join(listing.rejects[0])}" if listing.rejects else ""
    raise UserError(f"data.root: {data.root}: no images{why}")


def _refuse_same_ids(splits: dict[str, Entries]) -> None:
    """An id names one image of the whole pool. Names that differ in Unicode's form only would share one."""
    seen: dict[str, str] = {}
    for entries in splits.values():
        for image_id, key in zip(entries.ids, entries.keys, strict=True):
            if image_id in seen:
                raise UserError(f"two images with the id {image_id!r}: {seen[image_id]!a} and {key!a}")
            seen[image_id] = key


def _refuse_all_rejected(splits: dict[str, Entries], written: list[_Written]) -> None:
    for split, entries in splits.items():
        if len(entries) and not any(part.shard for part in written if part.split == split):
            first = next(part.rejects[0] for part in written if part.split == split)
            raise UserError(f"{split}: all {len(entries)} images are rejected, the first: {': '.join(first)}")
