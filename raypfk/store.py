"""Paths and what lies there. Every path is a string: a local path, s3://bucket/key, or any `pyarrow.fs` URI.

A write is seen whole or not at all: local files go through a temporary name and a rename, objects leave in one request.
"""

import hashlib
import json
import os
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypfk.errors import UserError
from raypfk.filesystems import Arrow, Entry, Filesystem, Local, NotAFile
from raypfk.retry import GaveUp


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def absolute(uri: str) -> str:
    """A path that means the same in every process of a cluster; a URI as it is."""
    return uri.rstrip("/") if is_remote(uri) else os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


@lru_cache(maxsize=32)
def _filesystem(root: str) -> Filesystem:
    if root.startswith("s3://"):
        from raypfk.s3 import S3  # boto3 takes a third of a second: only where it is needed

        return S3()
    return Arrow(root) if root else Local()


def resolve(uri: str) -> tuple[Filesystem, str]:
    """The filesystem of a path or URI, and the path in it.

    UserError for a scheme that nothing answers to, and for keys in a URI, or options of s3://, which logs would show.
    """
    if "\0" in uri:
        raise UserError(f"{uri!r}: expected a path or URI, found a NUL in it")
    if not is_remote(uri):
        return _filesystem(""), absolute(uri)
    scheme, rest = uri.split("://", 1)
    host = rest.split("/", 1)[0]
    user, at, _ = host.rpartition("@")  # in abfss:// the user is a container's name
    if (scheme == "s3" and (not host or at or ":" in host)) or ":" in user or _SECRET.search(rest):
        where, form = rest.rsplit("@", 1)[-1].partition("?")[0], "bucket/key" if scheme == "s3" else "host/path"
        expected = f"expected {scheme}://{form}; credentials come from the environment or a profile"
        raise UserError(f"{scheme}://{where}: {expected}")
    return _filesystem(f"{scheme}://{'' if scheme == 's3' else host}"), rest


_SECRET = re.compile(r"\?([^?]*&)?[^=&/]*(secret|password|token|signature|[-_]key|\bsig)=", re.IGNORECASE)


@contextmanager
def _named(uri: str) -> Iterator[None]:
    """What a user can mend, as UserError with the path."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{uri}: no such file") from None
    except (IsADirectoryError, NotAFile) as error:
        raise UserError(f"{uri}: expected a file, found {error.strerror.lower()}") from None
    except PermissionError as error:
        raise UserError(f"{uri}: {error.strerror or 'permission denied'}") from None


def exists(uri: str) -> bool:
    """Whether a file is there, or a folder with something in it."""
    fs, path = resolve(uri)
    with _named(uri):
        return fs.size(path) is not None or fs.is_folder(path)


def entries(uri: str, recursive: bool = False) -> Iterator[Entry]:
    """What is directly below a folder, or all files below it, in any order; an absent folder has nothing."""
    fs, path = resolve(uri)
    with _named(uri):
        yield from fs.list(path, recursive)


def names(uri: str, suffix: str = "") -> list[str]:
    """Names of the files directly under `uri`, sorted; an absent folder has none."""
    return sorted(e.path for e in entries(uri) if not e.is_folder and e.path.endswith(suffix))


def paths(uri: str, suffix: str = "") -> list[str]:
    """Like `names`, as whole paths."""
    return [join(uri, name) for name in names(uri, suffix)]


def fetch(uri: str, most: int | None = None) -> bytes:
    """All of a file, in one request. Raises FileNotFoundError, PermissionError, and TooLong beyond `most` bytes, as
    they come."""
    fs, path = resolve(uri)
    return fs.read(path, most)


def fetch_range(uri: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file, in one request; errors as of `fetch`."""
    fs, path = resolve(uri)
    return fs.read_range(path, start, stop)


@contextmanager
def opened(uri: str) -> Iterator[Any]:
    """A file object that fetches what is read of it."""
    fs, path = resolve(uri)
    with _named(uri), fs.open(path) as stream:
        yield stream


def read_bytes(uri: str) -> bytes:
    with _named(uri):
        return fetch(uri)


def write_bytes(uri: str, data: bytes | memoryview | pa.Buffer) -> None:
    """Write `data` so that `uri` holds all of it or what it held before."""
    fs, path = resolve(uri)
    with _named(uri):
        fs.write(path, data)


def delete(uri: str) -> None:
    """Remove a file or a folder with all it holds; nothing there is fine."""
    fs, path = resolve(uri)
    with _named(uri):
        fs.delete(path) if fs.size(path) is not None else fs.delete_folder(path)


def read_json(uri: str) -> Any:
    try:
        return json.loads(read_bytes(uri))
    except RecursionError:
        raise UserError(f"{uri}: expected JSON, found one nested too deep to be read") from None
    except ValueError as error:
        raise UserError(f"{uri}: expected JSON: {error}") from None


def read_record(uri: str, fields: dict[str, type]) -> dict[str, Any]:
    """A JSON object that has these fields, of these types. UserError that names the field which it has not."""
    record = read_json(uri)
    if not isinstance(record, dict):
        raise UserError(f"{uri}: expected a JSON object, found {type(record).__name__}")
    require(uri, record, fields)
    return record


def require(uri: str, record: dict[str, Any], fields: dict[str, type]) -> None:
    """UserError that names `uri` and the first field that the record has not, or not of its type (int is a float)."""
    for name, kind in fields.items():
        if not isinstance(record.get(name), (int, float) if kind is float else kind):
            came = reprlib.repr(record[name]) if name in record else "none"
            raise UserError(f"{uri}: {name}: expected {_KINDS[kind]}, found {came}")


_KINDS = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number"}


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, json.dumps(value, indent=2).encode() + b"\n")


def read_table(uri: str, columns: list[str] | None = None, schema: pa.Schema | None = None) -> pa.Table:
    """A Parquet file as a table; with `schema`, its columns must be there with these types.

    Raises UserError that names the file: absent, not Parquet, truncated, a missing column, another type.
    """
    wanted = columns if columns is not None else (schema.names if schema else None)
    fs, path = resolve(uri)
    try:
        # Not pq.read_table: it takes "key=value" in a path for a column. Only the wanted columns' bytes are read.
        with _named(uri), fs.open(path) if wanted else pa.BufferReader(fs.read(path)) as stream:
            table = pq.ParquetFile(stream, page_checksum_verification=True).read(columns=wanted)
    except GaveUp:
        raise
    except UNREADABLE as error:
        raise not_parquet(uri, error) from None
    missing = [name for name in wanted or [] if name not in table.column_names]
    if missing:
        raise UserError(f"{uri}: no column {missing[0]!r}; expected {wanted}, found {table.column_names}")
    if schema is not None:
        for name in wanted:
            came = table.schema.field(name).type
            if came != schema.field(name).type:
                raise UserError(f"{uri}: column {name!r} is {came}, expected {schema.field(name).type}")
    return table


UNREADABLE = (pa.ArrowException, OSError, KeyError)
"""What pyarrow raises of a damaged or strange Parquet file."""


def not_parquet(uri: str, error: Exception) -> UserError:
    return UserError(f"{uri}: expected a whole Parquet file: {' '.join(str(error).split())}")


def table_shape(uri: str) -> tuple[list[str], int]:
    """Names of a Parquet file's columns, and how many rows it has. UserError if it is none."""
    try:
        with opened(uri) as stream, pq.ParquetFile(stream) as file:
            return file.schema_arrow.names, file.metadata.num_rows
    except GaveUp:
        raise
    except UNREADABLE as error:
        raise not_parquet(uri, error) from None


def read_rows(uri: str, column: str, rows: list[int]) -> pa.ChunkedArray:
    """Some rows of a column, in the order asked for. Errors as of `fetch`.

    Of their row groups all is fetched, one after another; only the rows are kept.
    """
    fs, path = resolve(uri)
    wanted, parts, at = np.array(rows, np.int64), [], []
    with fs.open(path) as stream, pq.ParquetFile(stream, page_checksum_verification=True) as file:
        ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
        group_of = np.searchsorted(ends, wanted, side="right")
        for group in np.unique(group_of).tolist():
            asked = np.flatnonzero(group_of == group)
            start = ends[group - 1] if group else 0
            parts += file.read_row_group(group, [column])[column].take(wanted[asked] - start).chunks
            at.append(asked)
    return pa.chunked_array(parts).take(np.argsort(np.concatenate(at)))


def encode_table(table: pa.Table, compression: str | dict[str, str] = "zstd", **options: Any) -> pa.Buffer:
    """The table as a Parquet file's bytes. options: of `pyarrow.parquet.write_table`."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression, write_page_checksum=True, **options)
    return sink.getvalue()


def write_table(uri: str, table: pa.Table, compression: str | dict[str, str] = "zstd", **options: Any) -> None:
    write_bytes(uri, encode_table(table, compression, **options))


def sha256(data: bytes | memoryview | pa.Buffer) -> str:
    return hashlib.sha256(data).hexdigest()
