"""Tables: Parquet files with a column of encoded images, and lists (CSV or Parquet) of where images lie."""

import os
import unicodedata
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from raypfk import store
from raypfk.config import ColumnsConfig
from raypfk.errors import UserError
from raypfk.retry import GaveUp
from raypfk.sources.files import IN_FLIGHT, Files
from raypfk.sources.labels import (
    Label,
    classes_of,
    column_names,
    expect_once,
    indices,
    labels_of,
    read_csv_or_parquet,
    texts,
)
from raypfk.sources.listing import Entries, Listing

Rows = tuple[list[str], list[str], list[Label]]
"""Ids, keys, labels."""


class _Listed(ABC):
    """A source whose listing is a table."""

    root: str
    validation_root: str | None
    test_root: str | None

    @abstractmethod
    def _rows(self, root: str, field: str, prefix: str) -> Rows:
        """Of one split. field: where the configuration says root; prefix: of the ids."""

    def list(self) -> Listing:
        parts = {"train": self._rows(self.root, "data.root", "")}
        for name, root in (("validation", self.validation_root), ("test", self.test_root)):
            if root:
                parts[name] = self._rows(root, f"data.{name}_root", f"{name}/")
        classes = classes_of([labels for _, _, labels in parts.values()], self.root)
        made = {n: Entries.by_id(ids, keys, indices(labels, classes)) for n, (ids, keys, labels) in parts.items()}
        return Listing(**made, classes=classes)


@dataclass(frozen=True)
class Tables(_Listed):
    """Parquet files below a root, or one, with an image a row: bytes, or a struct with the field `bytes`.

    Without a column of ids, an image's id is its file's path and the number of its row. Keys are PATH#ROW.
    """

    root: str
    validation_root: str | None
    test_root: str | None
    columns: ColumnsConfig

    def read(self, keys: Sequence[str]) -> Iterator[bytes | str]:
        """Encoded images, in order; a str says why one is none.

        Of a row group that holds any, all are fetched, once a call: ids that follow the rows' order cost least.
        """
        rows: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for i, key in enumerate(keys):
            path, _, row = key.rpartition("#")
            rows[path].append((i, int(row)))
        found: dict[int, bytes | str] = {}
        for path, places in rows.items():
            found |= zip([i for i, _ in places], self._of_rows(path, [row for _, row in places]), strict=True)
        yield from (found.pop(i) for i in range(len(keys)))

    def _of_rows(self, path: str, rows: list[int]) -> list[bytes | str]:
        try:
            return _image_bytes(store.read_rows(path, self.columns.image, rows))
        except FileNotFoundError:
            return ["cannot be read: it is gone since it was listed"] * len(rows)
        except GaveUp:
            raise
        except store.UNREADABLE as error:
            if getattr(error, "errno", None):  # the disk's trouble, not the file's
                raise
            raise store.not_parquet(path, error) from None

    def _rows(self, root: str, field: str, prefix: str) -> Rows:
        paths = [root] if root.lower().endswith((".parquet", ".pq")) else _parquets(root, field)
        with ThreadPoolExecutor(IN_FLIGHT[store.is_remote(root)]) as threads:
            found = list(threads.map(self._of_file, paths))
        ids, keys, labels = [], [], []
        for path, (own, given, count) in zip(paths, found, strict=True):
            name = os.path.basename(path) if path == root else path[len(root) :].lstrip("/")
            stem, width = os.path.splitext(name)[0], max(6, len(str(count)))
            ids += [
                prefix + unicodedata.normalize("NFC", i) for i in own or [f"{stem}/{n:0{width}d}" for n in range(count)]
            ]
            keys += [f"{path}#{n}" for n in range(count)]
            labels += given or [None] * count
        return ids, keys, labels

    def _of_file(self, path: str) -> tuple[list[str] | None, list[Label] | None, int]:
        names, count = store.table_shape(path)
        if self.columns.image not in names:
            raise UserError(f"{path}: no column {self.columns.image!r} (data.columns.image), found {names}")
        wanted = [name for name in (self.columns.id, self.columns.label) if name]
        if missing := [name for name in wanted if name not in names]:
            raise UserError(f"{path}: no column {missing[0]!r} (data.columns), found {names}")
        label = self.columns.label or ("label" if "label" in names else None)
        expect_once(path, names, [self.columns.image, *wanted, *([label] if label else [])])
        table = store.read_table(path, [name for name in (self.columns.id, label) if name]) if wanted or label else None
        ids = texts(table[self.columns.id], path, self.columns.id) if self.columns.id else None
        return ids, labels_of(table[label], path) if label else None, count


@dataclass(frozen=True)
class Places(_Listed, Files):
    """A CSV or Parquet file that lists images: a column of paths or URIs, and, if there are, of ids and labels."""

    root: str
    validation_root: str | None
    test_root: str | None
    columns: ColumnsConfig

    def _rows(self, root: str, field: str, prefix: str) -> Rows:
        names, columns = column_names(root), self.columns
        uri = columns.uri if columns.uri in names else None
        if uri is None:
            raise UserError(f"{field}: {root}: no column {columns.uri!r} (data.columns.uri), found {names}")
        own = columns.id or ("image_id" if "image_id" in names else None)
        label = columns.label or ("label" if "label" in names else None)
        wanted = [name for name in (uri, own, label) if name]
        expect_once(root, names, wanted)
        table = read_csv_or_parquet(root, wanted)
        keys = [_place(text, root) for text in texts(table[uri], root, uri)]
        ids = texts(table[own], root, own) if own else texts(table[uri], root, uri)
        labels = labels_of(table[label], root) if label else [None] * len(keys)
        return [prefix + unicodedata.normalize("NFC", i) for i in ids], keys, labels


def _place(text: str, root: str) -> str:
    """A place as any process can read it; a relative path is relative to the list."""
    if store.is_remote(text):
        store.resolve(text)  # a scheme that nothing answers to, keys in the URI
        return text
    text = text.removeprefix("file://")
    return text if os.path.isabs(text) else store.join(root.rpartition("/")[0], text)


def _parquets(root: str, field: str) -> list[str]:
    try:
        found = sorted(
            e.path for e in store.entries(root, recursive=True) if e.path.lower().endswith((".parquet", ".pq"))
        )
    except OSError as error:
        raise UserError(f"{field}: {root}: cannot be listed: {error}") from None
    if not found:
        raise UserError(f"{field}: {root}: expected .parquet files, none is there")
    return [store.join(root, path) for path in found]


def _image_bytes(column: pa.ChunkedArray) -> list[bytes | str]:
    if pa.types.is_struct(column.type):  # as Hugging Face's data sets have it
        if column.type.get_field_index("bytes") < 0:
            return [f"expected bytes, found {column.type}"] * len(column)
        column = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        return [f"expected bytes, found {column.type}"] * len(column)
    return [data if data is not None else "no image: null" for data in column.to_pylist()]
