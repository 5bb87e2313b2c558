"""The contract between stages: Arrow schemas, and where each file lies in a pool and in a run directory.

Other tools read these files: docs/run-directory.md describes them in words.
"""

import numpy as np
import pyarrow as pa

from raypfk import store

# A pool: POOL/manifest.json, POOL/rejects.parquet and one folder of shards per split.
SPLITS = ("pool", "validation", "test")

IMAGES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("label", pa.int64()),  # null throughout where unknown; hidden from every stage but label and `true`
    ]
)
REJECTS = pa.schema([("image_id", pa.string()), ("reason", pa.string())])


def descriptors(length: int, *, validation: bool = False) -> pa.Schema:
    """Schema of descriptor shards: unit-length features z and Fisher scores g per scale, float32 of length L."""
    fields = [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("features", pa.list_(pa.float32(), length), nullable=False),
        pa.field("fisher", pa.list_(pa.float32(), length), nullable=False),
        pa.field("predicted", pa.int64(), nullable=False),
        pa.field("estimated_label", pa.int64(), nullable=False),
    ]
    if validation:
        fields += [
            pa.field("label", pa.int64(), nullable=False),
            pa.field("missed", pa.bool_(), nullable=False),
            pa.field("center", pa.bool_(), nullable=False),
        ]
    return pa.schema(fields)


CANDIDATES = pa.schema(
    [("center_id", pa.string()), ("rank", pa.int32()), ("image_id", pa.string()), ("score", pa.float32())]
)
SELECTION = pa.schema(
    [
        ("position", pa.int32()),
        ("image_id", pa.string()),
        ("score", pa.float32()),
        ("center_id", pa.string()),
        ("rank", pa.int32()),
        ("estimated_label", pa.int64()),
    ]
)
LABELS = pa.schema([("image_id", pa.string()), ("label", pa.int64()), ("source", pa.string())])


class RoundDir:
    """Paths of `RUN/rounds/NNN/`."""

    def __init__(self, run: str, number: int):
        self.number = number
        self.root = store.join(run, "rounds", f"{number:03d}")
        self.descriptors = store.join(self.root, "descriptors")
        self.validation_parts = store.join(self.root, "validation")
        self.validation = store.join(self.root, "validation.parquet")
        self.candidates = store.join(self.root, "candidates.parquet")
        self.selection = store.join(self.root, "selection.parquet")
        self.labels = store.join(self.root, "labels.parquet")
        self.to_label = store.join(self.root, "to_label.csv")
        self.answers = store.join(self.root, "labels.csv")
        self.checkpoint = store.join(self.root, "checkpoint", "model.pt")
        self.training = store.join(self.root, "checkpoint", "training.pt")
        self.metrics = store.join(self.root, "metrics.json")

    def rejects(self, split: str) -> str:
        return store.join(self.root, "rejects", split)

    def marker(self, stage: str) -> str:
        return store.join(self.root, "done", f"{stage}.json")


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A fixed-size-list column as a (N, L) array of its own, which torch may take over."""
    parts = [chunk.flatten().to_numpy() for chunk in column.chunks]
    return np.concatenate([np.empty(0, np.float32), *parts]).reshape(-1, column.type.list_size)


def fixed_lists(rows: np.ndarray) -> pa.FixedSizeListArray:
    """A (N, L) array as a fixed-size-list array, without a Python loop."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
