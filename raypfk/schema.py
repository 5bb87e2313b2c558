"""The contract between stages: Arrow schemas, and where each file lies in a pool and in a run directory.

Other tools read these files: docs/run-directory.md describes them in words.
"""

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
REFERENCES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),  # what the pool's source reads the image by
        pa.field("label", pa.int64()),
    ]
)
"""Of a pool by reference."""
REJECTS = pa.schema([("image_id", pa.string()), ("reason", pa.string())])


ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
"""Of one number of a descriptor, by its dtype."""


GRID = "grid_features"


def descriptors(
    length: int, dtype: str = "float32", *, validation: bool = False, votes: int = 0, grid: int = 0
) -> pa.Schema:
    """Schema of descriptor shards: unit-length features z and Fisher scores g per scale, L numbers side by side.

    A vector is one value of L numbers' bytes, little-endian: as a list, Parquet would take each int8 for four bytes,
    have no bfloat16, and write and read 4 to 20 times slower. votes: classes that are kept of an image's. grid: numbers
    of the features, float32, by which votes are cast.
    """
    width = length * ITEM_BYTES[dtype]
    fields = _described({"features": width, "fisher": width}, validation)
    if votes:
        fields += [
            pa.field("vote_classes", pa.list_(pa.int32(), votes), nullable=False),  # most votes first, -1 for none
            pa.field("vote_shares", pa.list_(pa.float32(), votes), nullable=False),
        ]
    if grid:
        fields.append(pa.field(GRID, pa.binary(4 * grid), nullable=False))
    return pa.schema(fields)


def last_layers(classes: int, inputs: int, *, validation: bool = False) -> pa.Schema:
    """Schema of last-layer gradients, float32: the slope by the logits (classes,), and the layer's inputs (inputs,)."""
    return pa.schema(_described({"slope": 4 * classes, "hidden": 4 * inputs}, validation))


def _described(vectors: dict[str, int], validation: bool) -> list[pa.Field]:
    fields = [
        pa.field("image_id", pa.string(), nullable=False),
        *(pa.field(name, pa.binary(width), nullable=False) for name, width in vectors.items()),
        pa.field("predicted", pa.int64(), nullable=False),
        pa.field("estimated_label", pa.int64(), nullable=False),
    ]
    if validation:
        fields += [
            pa.field("label", pa.int64(), nullable=False),
            pa.field("missed", pa.bool_(), nullable=False),
            pa.field("center", pa.bool_(), nullable=False),
        ]
    return fields


SCORES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("predicted", pa.int64(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)
"""Of a strategy by predictions or by an adversary."""
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
DIRECTIONS = pa.schema(
    [("part", pa.string()), ("scale", pa.int32()), ("direction", pa.int32()), ("vector", pa.list_(pa.float32()))]
)
LABELS = pa.schema([("image_id", pa.string()), ("label", pa.int64()), ("source", pa.string())])


class RoundDir:
    """Paths of `RUN/rounds/NNN/`."""

    def __init__(self, run: str, number: int):
        self.number = number
        self.root = store.join(run, "rounds", f"{number:03d}")
        self.descriptors = store.join(self.root, "descriptors")
        self.labelled = store.join(self.root, "labelled")
        self.validation_parts = store.join(self.root, "validation")
        self.validation = store.join(self.root, "validation.parquet")
        self.directions = store.join(self.root, "pca.parquet")
        self.candidates = store.join(self.root, "candidates.parquet")
        self.selection = store.join(self.root, "selection.parquet")
        self.labels = store.join(self.root, "labels.parquet")
        self.to_label = store.join(self.root, "to_label.csv")
        self.answers = store.join(self.root, "labels.csv")
        self.checkpoint = store.join(self.root, "checkpoint", "model.pt")
        self.training = store.join(self.root, "checkpoint", "training.pt")
        self.adversary = store.join(self.root, "checkpoint", "adversary.pt")
        self.adversary_training = store.join(self.root, "checkpoint", "adversary-training.pt")
        self.metrics = store.join(self.root, "metrics.json")

    def checkpoint_of(self, member: int) -> str:
        """Of an ensemble's networks; the first is `checkpoint`."""
        return store.join(self.root, "checkpoint", f"model-{member:02d}.pt") if member else self.checkpoint

    def training_of(self, member: int) -> str:
        return store.join(self.root, "checkpoint", f"training-{member:02d}.pt") if member else self.training

    def described(self, shard: str) -> str:
        """What is known of the images of the pool's shard of this name."""
        return store.join(self.descriptors, shard)

    def rejects(self, split: str) -> str:
        return store.join(self.root, "rejects", split)

    def marker(self, stage: str) -> str:
        return store.join(self.root, "done", f"{stage}.json")
