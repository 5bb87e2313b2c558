"""Descriptor files: tensors to Parquet and back without a copy or a loop over rows, and whether files fit together.

The validation set's descriptors (validation.parquet) are float32 in full; the pool's (descriptors/) are stored as the
run's section `descriptors` says. For a strategy by gradients the vectors are a last layer's, float32 as they are.
A file's metadata holds its `Origin`: two files are compared only if theirs agree.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from raypfk import pfk, schema, store
from raypfk.errors import UserError
from raypfk.pfk import Descriptors, Kernel, LastLayer
from raypfk.pfk.compress import DTYPES
from raypfk.pfk.kernel import MAX_LENGTH, scale_lengths
from raypfk.pool import Shard
from raypfk.run import Run, stamp

FORMAT = 1
KEY = "raypfk.descriptors"
VECTORS = ("features", "fisher")
GRADIENTS = ("slope", "hidden")
_ARROW = {"float32": pa.float32(), "float16": pa.float16(), "bfloat16": pa.uint16(), "int8": pa.int8()}


@dataclass(frozen=True)
class Origin:
    """What makes descriptors comparable: those of another origin are other numbers in the same places.

    model, weights: the network, and the first 16 hex digits of its checkpoint's SHA-256. taps; lengths: the numbers
    stored of each. dtype: of a number. directions: fingerprint of the principal directions, null if not projected.
    vectors: the columns, `VECTORS`; or `GRADIENTS`, of which `lengths` are then the numbers. votes: classes kept. grid:
    numbers of a validation image's grid features, 0 where there are none.
    """

    model: str
    weights: str
    taps: tuple[str, ...]
    lengths: tuple[int, ...]
    dtype: str
    directions: str | None
    vectors: tuple[str, ...] = VECTORS
    votes: int = 0
    grid: int = 0
    format: int = FORMAT

    def schema(self, *, validation: bool = False) -> pa.Schema:
        if self.vectors == GRADIENTS:
            return schema.last_layers(*self.lengths, validation=validation)
        more = {"votes": self.votes, "grid": self.grid}
        return schema.descriptors(sum(self.lengths), self.dtype, validation=validation, **more)


class Directions(NamedTuple):
    """Principal directions (L_j, d_j) of each scale, of the features and of the Fisher scores."""

    z: tuple[Tensor, ...]
    g: tuple[Tensor, ...]

    def project(self, full: Descriptors) -> Descriptors:
        return Descriptors(pfk.project(full.z, self.z), pfk.project(full.g, self.g))

    @property
    def fingerprint(self) -> str:
        return short_hash(b"".join(b.numpy().tobytes() for b in (*self.z, *self.g)))


def short_hash(data: bytes) -> str:
    return store.sha256(data)[:16]


def full_origin(run: Run, weights: str) -> Origin:
    """Of the validation set's descriptors under the network of this fingerprint."""
    model = run.config.model
    if run.strategy.kind == "gradients":
        return Origin(model.name, weights, (), (run.classes, run.last_layer_inputs), "float32", None, GRADIENTS)
    return Origin(model.name, weights, tuple(model.taps), run.lengths, "float32", None, grid=sum(run.grid_lengths))


def stored_origin(run: Run, full: Origin, directions: Directions | None) -> Origin:
    """Of the pool's descriptors that go with the validation set's."""
    if full.vectors == GRADIENTS:
        return full
    fingerprint, dtype = directions.fingerprint if directions else None, run.config.descriptors.dtype
    return replace(
        full, lengths=run.stored_lengths, dtype=dtype, directions=fingerprint, votes=run.estimation.votes, grid=0
    )


# --------------------------------------------------------------------------------------------- tensors and columns


def column(stored_NL: Tensor) -> pa.FixedSizeBinaryArray:
    """A row's numbers as one value: N values of L numbers' bytes, in the tensor's own memory."""
    width = stored_NL.shape[1] * stored_NL.element_size()
    data = stored_NL.cpu().contiguous().view(torch.uint8).numpy()
    return pa.Array.from_buffers(pa.binary(width), len(stored_NL), [None, pa.py_buffer(data)])


def tensor(column: pa.ChunkedArray, dtype: str) -> Tensor:
    """The (N, L) numbers of a column in Arrow's own memory, copied only where it has several chunks. Read only."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    length = column.type.byte_width // schema.ITEM_BYTES[dtype]
    if not len(array):
        return torch.empty(0, length, dtype=DTYPES[dtype])
    numbers = pa.Array.from_buffers(
        _ARROW[dtype], len(array) * length, [None, array.buffers()[1]], offset=array.offset * length
    )
    return torch.from_dlpack(numbers).view(DTYPES[dtype]).view(-1, length)


def encode(columns: dict[str, Any], described: Descriptors | LastLayer, origin: Origin) -> pa.Table:
    """A descriptor file's table: `columns` (image_id first), and the vectors as `origin` says."""
    if origin.vectors == VECTORS:
        described = [pfk.quantise(x, origin.lengths, origin.dtype) for x in described]
    image_id, *others = columns
    vectors = {name: column(x) for name, x in zip(origin.vectors, described, strict=True)}
    return pa.table({image_id: columns[image_id], **vectors, **{name: columns[name] for name in others}})


def decode(table: pa.Table, origin: Origin) -> Descriptors | LastLayer:
    """The vectors of a table's rows, float32: with dtype float32 the table's memory, else standardised anew."""
    vectors = [tensor(table[name], origin.dtype) for name in origin.vectors]
    if origin.vectors == GRADIENTS:
        return LastLayer(*vectors)
    return Descriptors(*(pfk.dequantise(x, origin.lengths) for x in vectors))


def votes_column(x_NV: Tensor) -> pa.FixedSizeListArray:
    """Classes or shares of votes as lists: they stand beside the vectors, for everybody to read."""
    return pa.FixedSizeListArray.from_arrays(pa.array(x_NV.flatten().numpy()), x_NV.shape[1])


def votes_of(table: pa.Table) -> tuple[Tensor, Tensor]:
    """Classes (N, V) int64 and shares (N, V) float32 of a pool shard's votes."""
    classes, shares = (table[name].combine_chunks() for name in ("vote_classes", "vote_shares"))
    numbers = [torch.from_numpy(x.flatten().to_numpy().copy()).view(len(x), -1) for x in (classes, shares)]
    return numbers[0].long(), numbers[1]


# ------------------------------------------------------------------------------------------------------------ files


def write(path: str, table: pa.Table, run_id: str, origin: Origin) -> None:
    """Descriptors are noise to a compressor; what stands beside them is not."""
    table = stamp(table.replace_schema_metadata({KEY: json.dumps(asdict(origin))}), run_id)
    vectors = [name for name in (*origin.vectors, schema.GRID) if name in table.column_names]
    others = [name for name in table.column_names if name not in vectors]
    leaves = [f"{name}.list.element" if name.startswith("vote_") else name for name in others]
    compression = dict.fromkeys(vectors, "none") | dict.fromkeys(leaves, "zstd")
    store.write_table(path, table, compression, use_dictionary=leaves[1:], write_statistics=leaves)


def read(
    run: Run, path: str, expected: Origin, as_of: str, columns: list[str]
) -> tuple[pa.Table, Descriptors | LastLayer]:
    """`columns` of a descriptor file, image_id among them, and its vectors (N, L) float32.

    as_of: where `expected` was found. Raises UserError that names the file if it is absent, damaged, another run's or
    of another origin, or if its image ids do not ascend, and the image whose descriptor holds NaN or infinity.
    """
    table = run.read(path, columns=[*columns, *expected.vectors])
    _check_origin(path, origin_of(path, table), expected, as_of)
    _check_vectors(path, table, expected)
    _check_ascending(path, table["image_id"])
    described = decode(table, expected)
    if expected.vectors == VECTORS:
        for name, x_NL in zip(VECTORS, described, strict=True):
            _check_numbers(path, name, table["image_id"], x_NL, expected.lengths)
    return table, described


def read_shard(run: Run, path: str, shard: Shard, expected: Origin) -> tuple[pa.Table, Descriptors | LastLayer]:
    """Ids (and votes) and vectors of a pool shard, checked against the centers' origin and the shard's range of ids."""
    columns = ["image_id", "vote_classes", "vote_shares"] if expected.votes else ["image_id"]
    try:
        table, described = read(run, path, expected, "the centers", columns)
        _check_range(path, table["image_id"], shard)
    except UserError as error:
        raise UserError(f"{error} (to describe these images again, delete it and done/extract.json)") from None
    return table, described


def read_validation(
    run: Run, round: int, weights: str | None = None
) -> tuple[pa.Table, Descriptors | LastLayer, Origin]:
    """validation.parquet, its vectors and their origin.

    weights: fingerprint of the checkpoint that it must come from; None takes the file's word. UserError as in `read`.
    """
    path = run.round(round).validation
    if weights is None:
        weights = origin_of(path, store.read_table(path, ["image_id"])).weights
    expected = full_origin(run, weights)
    names = [name for name in expected.schema(validation=True).names if name not in (*expected.vectors, schema.GRID)]
    table, described = read(run, path, expected, run.uri, names)
    return table, described, expected


def read_grid(run: Run, round: int) -> Tensor:
    """The validation images' grid features (M, L') float32, in the order of validation.parquet."""
    return tensor(run.read(run.round(round).validation, columns=[schema.GRID])[schema.GRID], "float32")


def read_centers(run: Run, round: int) -> tuple[pa.Table, Descriptors, Origin]:
    """The centers, in the order of image_id, their descriptors to score the pool's with, and the pool's origin."""
    table, full, origin = read_validation(run, round)
    directions = directions_of(run, round)
    described = full.rows(torch.from_numpy(np.flatnonzero(table["center"])))
    if directions:
        described = directions.project(described)
    centers = table.filter(table["center"]).combine_chunks()
    return centers, described, stored_origin(run, origin, directions)


def origin_of(path: str, table: pa.Table) -> Origin:
    """UserError if the metadata of the file at `path` has none that this version reads."""
    text = (table.schema.metadata or {}).get(KEY.encode())
    if text is None:
        raise UserError(f"{path}: no {KEY} in its metadata; expected descriptors of format {FORMAT}, found older ones")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{path}: {KEY}: expected a JSON object, found {text[:60]!r}")
    if record.get("format") != FORMAT:
        raise UserError(f"{path}: {KEY} has format {record.get('format')!r}, expected {FORMAT}")
    newer = {"vectors": VECTORS, "votes": 0, "grid": 0}
    values = {f.name: record.get(f.name, newer.get(f.name)) for f in fields(Origin)}
    return Origin(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


# ------------------------------------------------------------------------------------------------------- directions


def directions_of(run: Run, round: int) -> Directions | None:
    """The round's principal directions; None without `descriptors.pca`. UserError if they are absent or another's."""
    if run.config.descriptors.pca is None:
        return None
    path = run.round(round).directions
    table = run.read(path, schema.DIRECTIONS)
    shapes = list(zip(run.lengths, run.stored_lengths, strict=True))
    if table.num_rows != 2 * sum(run.stored_lengths):
        raise UserError(f"{path}: {table.num_rows} directions, expected {2 * sum(run.stored_lengths)}")
    vectors = iter(table["vector"].to_pylist())
    bases = [torch.tensor([next(vectors) for _ in range(d)]).T.contiguous() for _ in VECTORS for _, d in shapes]
    found = [tuple(b.shape) for b in bases]
    if found != 2 * shapes:
        raise UserError(f"{path}: directions of shapes {found}, expected {2 * shapes}")
    return Directions(tuple(bases[: len(shapes)]), tuple(bases[len(shapes) :]))


def fit_directions(run: Run, round: int, validation: Descriptors) -> Directions | None:
    """The directions that `directions_of` reads: there already, or the validation set's, written now."""
    dims = run.config.descriptors.pca
    if dims is None or store.exists(run.round(round).directions):
        return directions_of(run, round)
    found = Directions(*(pfk.principal_directions(x, run.lengths, dims) for x in validation))
    rows = [
        {"part": part, "scale": j, "direction": i, "vector": vector}
        for part, bases in zip(VECTORS, found, strict=True)
        for j, b_ld in enumerate(bases)
        for i, vector in enumerate(b_ld.T.numpy())
    ]
    run.write(run.round(round).directions, pa.Table.from_pylist(rows, schema.DIRECTIONS))
    return found


# ----------------------------------------------------------------------------------------------------------- checks


def _check_origin(path: str, found: Origin, expected: Origin, as_of: str) -> None:
    for field in fields(Origin):
        came, wanted = getattr(found, field.name), getattr(expected, field.name)
        if came != wanted:
            raise UserError(f"{path}: descriptors of {field.name} {came!r}, expected {wanted!r} as of {as_of}")


def _check_vectors(path: str, table: pa.Table, expected: Origin) -> None:
    for name in expected.vectors:
        came, wanted = (x.field(name).type for x in (table.schema, expected.schema()))
        if came != wanted:
            raise UserError(f"{path}: column {name!r} is {came}, expected {wanted}")
    for name in ("image_id", *expected.vectors):
        if table[name].null_count:
            raise UserError(f"{path}: column {name!r} has {table[name].null_count} nulls, expected none")


def _check_ascending(path: str, ids: pa.ChunkedArray) -> None:
    ascends = pc.less(ids[:-1], ids[1:])
    if not pc.all(ascends, min_count=0).as_py():
        at = pc.index(ascends, False).as_py()
        before, after = ids[at].as_py(), ids[at + 1].as_py()
        what = f"image {after!r} is there twice" if before == after else f"image {after!r} stands after {before!r}"
        raise UserError(f"{path}: {what}; expected ascending ids, each once")


def _check_range(path: str, ids: pa.ChunkedArray, shard: Shard) -> None:
    """Shards of a pool have disjoint ranges: an id within its own shard's stands in no other."""
    for image_id in (ids[0].as_py(), ids[-1].as_py()) if len(ids) else ():
        if not shard.first_id <= image_id <= shard.last_id:
            raise UserError(
                f"{path}: image {image_id!r} is not of this shard; expected {shard.first_id!r} to {shard.last_id!r}"
            )
    if len(ids) > shard.rows:
        raise UserError(f"{path}: {len(ids)} images, but the pool's shard has {shard.rows}")


def _check_numbers(path: str, name: str, ids: pa.ChunkedArray, x_NL: Tensor, lengths: Sequence[int]) -> None:
    """Unit length or less in each scale; one pass, as NaN and infinity are not."""
    sizes_SN = scale_lengths(x_NL, Kernel("pcc", tuple(lengths)).spans)
    bad = np.flatnonzero(~(sizes_SN <= MAX_LENGTH).all(0).numpy())
    if len(bad):
        row = int(bad[0])
        what = "a scale longer than 1" if x_NL[row].isfinite().all() else "NaN or infinity"
        raise UserError(f"{path}: image {ids[row].as_py()!r}: {name} has {what}; expected standardised descriptors")
