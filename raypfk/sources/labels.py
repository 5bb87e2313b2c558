"""Labels as they come: names or numbers, in a column or in a file beside the images."""

import io
import re
import reprlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from raypfk import store
from raypfk.errors import UserError
from raypfk.sources.listing import UNKNOWN, Entries, Listing

Label = str | int | None
MOST_CLASSES = 1_000_000
"""An index beyond is a slip, and would make a list of as many names."""


def read_csv_or_parquet(uri: str, columns: list[str]) -> pa.Table:
    """Some columns of a table, text where it is CSV. UserError for other suffixes, and absent columns."""
    if uri.lower().endswith((".parquet", ".pq")):
        return store.read_table(uri, columns)
    if not uri.lower().endswith(".csv"):
        raise UserError(f"{uri}: expected a .csv or .parquet file")
    options = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(columns, pa.string()),
        include_columns=columns,
        strings_can_be_null=True,
        null_values=[""],  # a class may be called NA, or null
    )
    try:
        return pa.csv.read_csv(io.BytesIO(csv_bytes(uri)), convert_options=options)
    except (pa.ArrowInvalid, KeyError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{uri}: expected CSV with the columns {', '.join(columns)}: {message}") from None


def csv_bytes(uri: str) -> bytes:
    data = store.read_bytes(uri)
    if b"\0" in data:
        raise UserError(f"{uri}: expected CSV as UTF-8 text, found a NUL byte at {data.index(0)} (UTF-16, or binary)")
    return data


def column_names(uri: str) -> list[str]:
    """Of a .csv or .parquet file."""
    if not uri.lower().endswith(".csv"):
        return store.table_shape(uri)[0]
    first = csv_bytes(uri)[: 1 << 20].decode("utf-8", "replace").splitlines()[:1]
    try:
        return pa.csv.read_csv(io.BytesIO((first[0] + "\n").encode())).column_names if first else []
    except pa.ArrowInvalid:
        return []


def expect_once(uri: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    """UserError for a wanted column that is there more than once: the others may be, as those without a name are."""
    for name in wanted:
        if names.count(name) > 1:
            raise UserError(f"{uri}: the column {name!r} is there {names.count(name)} times, expected once")


def texts(column: pa.ChunkedArray, where: str, name: str) -> list[str]:
    """Ids or places: there in every row, on one line."""
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise UserError(f"{where}: row {row}: no {name}")
    if not (pa.types.is_integer(column.type) or _is_text(column.type) or pa.types.is_binary(column.type)):
        raise UserError(f"{where}: {name}: expected text or whole numbers, found {column.type}")
    try:
        column = column.cast(pa.string())
    except pa.ArrowInvalid:
        raise UserError(f"{where}: {name}: expected text, found bytes that are not UTF-8") from None
    unfit = pc.match_substring_regex(column, r"^$|[\x00\r\n]")  # a line break is a quote that was not closed
    if pc.any(unfit, min_count=0).as_py():
        row = pc.index(unfit, True).as_py()
        raise UserError(f"{where}: row {row}: {name}: expected one line of text, found {column[row].as_py()[:60]!r}")
    return column.to_pylist()


def labels_of(column: pa.ChunkedArray, where: str) -> list[Label]:
    """Class names or indices, None where a row has none."""
    if not (pa.types.is_integer(column.type) or _is_text(column.type)):
        raise UserError(f"{where}: labels are {column.type}, expected class names or indices")
    labels = [None if label == "" else label for label in column.to_pylist()]
    for row, label in enumerate(labels):
        if isinstance(label, str) and "\n" in label:  # a quote that was not closed
            raise UserError(f"{where}: row {row}: label: expected one line of text, found {label[:60]!r}")
    return labels


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def classes_of(given: Sequence[Sequence[Label]], where: str) -> list[str] | None:
    """Class names: the given names, sorted; of numbers 0 to the largest. None where there is no label at all."""
    labels = {label for part in given for label in part if label is not None}
    if not labels:
        return None
    if all(map(_is_number, labels)):
        for label in labels:
            if len(str(label)) > len(str(MOST_CLASSES)) or not 0 <= int(label) < MOST_CLASSES:
                expected = f"class indices from 0 to {MOST_CLASSES - 1}, or names"
                raise UserError(f"{where}: the label {reprlib.repr(label)}, expected {expected}")
        return [str(number) for number in range(max(map(int, labels)) + 1)]
    return sorted(map(str, labels))


def indices(given: Sequence[Label], classes: list[str] | None) -> np.ndarray | None:
    """Labels as indices into `classes`, UNKNOWN where there is none; None where there are no classes."""
    if classes is None:
        return None
    index = {name: i for i, name in enumerate(classes)}
    numbered = classes == [str(i) for i in range(len(classes))]  # 007 is class 7, but among names it is one
    found = [UNKNOWN if label is None else index[str(int(label) if numbered else label)] for label in given]
    return np.array(found, dtype=np.int64)


def _is_number(label: str | int) -> bool:
    """Not only of one or more digits: whoever writes -1 for "none" has not named a class."""
    return isinstance(label, int) or re.fullmatch("-?[0-9]+", label) is not None


def joined(listing: Listing, uri: str) -> Listing:
    """The listing with labels by id from a CSV or Parquet file (image_id, label) in place of its own.

    Images that the file does not name have no label. UserError for an id that stands there twice.
    """
    table = read_csv_or_parquet(uri, ["image_id", "label"])
    expect_once(uri, column_names(uri), table.column_names)
    ids = pa.array(texts(table["image_id"], uri, "image_id"), pa.string())
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise UserError(f"{uri}: image {twice[0]['values'].as_py()!r} stands there {twice[0]['counts'].as_py()} times")
    labels = labels_of(table["label"], uri)
    known = dict(zip(ids.to_pylist(), labels, strict=True))
    classes = classes_of([labels], uri)
    if classes is None:
        raise UserError(f"{uri}: no labels")
    parts = {name: getattr(listing, name) for name in ("train", "validation", "test")}
    made: dict[str, Entries | None] = {
        name: part and Entries(part.ids, part.keys, indices([known.get(i) for i in part.ids.to_pylist()], classes))
        for name, part in parts.items()
    }
    found = sum(pc.sum(pc.is_in(part.ids, ids.cast(part.ids.type))).as_py() or 0 for part in parts.values() if part)
    absent = len(known) - found
    notes = [f"{uri}: {absent:,} of its {len(known):,} ids are no image's"] if absent else []
    return Listing(**made, classes=classes, rejects=listing.rejects, notes=[*listing.notes, *notes])
