"""One file of a pool: its images read, decoded to check them, and written once; what the build must know of it."""

import hashlib
import os
from dataclasses import asdict, dataclass
from itertools import tee
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raypfk import images, isolated, store
from raypfk import pool as pools
from raypfk.rejects import Reject
from raypfk.schema import IMAGES, REFERENCES
from raypfk.sources import Entries, Source


@dataclass(frozen=True)
class Plan:
    """The images that one task checks and writes.

    within: the shard of the pool before it grew in whose range they lie, by number; None if in none's.
    done: where the task says that its file is written. mark: there while images are decoded (isolated.py).
    """

    split: str
    uri: str
    source: Source
    entries: Entries
    within: int | None
    done: str
    mark: str
    max_pixels: int
    by_reference: bool

    def digest(self) -> str:
        """Of all that makes the file what it is."""
        entries = self.entries
        what = (entries.ids.to_pylist(), entries.keys.to_pylist(), [entries.label(i) for i in range(len(entries))])
        return hashlib.sha256(repr((what, self.within, self.max_pixels, self.by_reference)).encode()).hexdigest()


@dataclass(frozen=True)
class Written:
    """What a task says of its file.

    file: its entry in the manifest, None if every image was rejected. histogram: images of each class, None if one has
    no label. sizes: [width, height] found, two of them at most.
    """

    split: str
    within: int | None
    file: dict[str, Any] | None
    rejects: list[Reject]
    histogram: list[int] | None
    grey: bool
    sizes: list[list[int]]


def write(plan: Plan) -> Written:
    """Task: the file of `plan`, written now or by an earlier build that did not end; then rejects are tried again."""
    digest = plan.digest()
    if store.exists(plan.done):
        told = store.read_json(plan.done)
        if told["plan"] == digest and not told["written"]["rejects"]:
            return Written(**told["written"])
    written = _write_references(plan) if plan.by_reference else _write_images(plan)
    store.write_json(plan.done, {"plan": digest, "written": asdict(written)})
    return written


def _write_images(plan: Plan) -> Written:
    torch.set_num_threads(1)
    good, rejects, channels = [], [], set()
    ids, labels = plan.entries.ids.to_pylist(), [plan.entries.label(i) for i in range(len(plan.entries))]
    reading, encoded = tee(plan.source.read(plan.entries.keys.to_pylist()))
    decoding = isolated.decoded(reading, {"max_pixels": plan.max_pixels}, plan.mark)
    for image_id, label, pixels, data in zip(ids, labels, decoding, encoded, strict=True):
        if isinstance(pixels, images.BadImage):
            rejects.append((image_id, str(pixels)))
            continue
        channels.add(pixels.shape[0])
        good.append((image_id, data, pixels.shape[2], pixels.shape[1], label))
    sizes = sorted({row[2:4] for row in good})[:2]
    return _written(plan, IMAGES, good, rejects, channels <= {1}, [list(size) for size in sizes])


def _write_references(plan: Plan) -> Written:
    ids, keys, labels = (
        plan.entries.ids.to_pylist(), plan.entries.keys.to_pylist(), map(plan.entries.label, range(len(plan.entries)))
    )  # fmt: skip
    return _written(plan, REFERENCES, list(zip(ids, keys, labels, strict=True)), [], False, [])


def _written(
    plan: Plan, schema: pa.Schema, rows: list[tuple], rejects: list[Reject], grey: bool, sizes: list[list[int]]
) -> Written:
    if not rows:
        return Written(plan.split, plan.within, None, rejects, None, grey, sizes)
    columns = zip(*rows, strict=True)
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
    histogram = None if table["label"].null_count else np.bincount(table["label"].to_numpy()).tolist()
    data = _encoded(table)
    store.write_bytes(plan.uri, data)
    file = {
        "name": os.path.basename(plan.uri),
        "rows": table.num_rows,
        "bytes": data.size,
        "sha256": store.sha256(data),
        "content": pools.content((row[0], row[1], row[-1]) for row in rows),
        "first_id": rows[0][0],
        "last_id": rows[-1][0],
    }
    return Written(plan.split, plan.within, file, rejects, histogram, grey, sizes)


def _encoded(table: pa.Table) -> pa.Buffer:
    """A Parquet file's bytes. The images are compressed already."""
    compression = {name: "none" if name == "image" else "zstd" for name in table.column_names}
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression=compression, use_dictionary=False, write_statistics=["image_id"],
        write_page_checksum=True,
    )  # fmt: skip
    return sink.getvalue()
