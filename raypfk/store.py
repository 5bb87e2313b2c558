"""Paths and filesystems. Every path is a string: a local path or any `pyarrow.fs` URI (`s3://bucket/key`).

A write is seen whole or not at all: local files go through a temporary name and a rename, objects are built in
memory and leave in one stream (closing a stream after an exception would publish half an object).
"""

import hashlib
import json
import os
import tempfile
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raypfk.errors import UserError


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def absolute(uri: str) -> str:
    """A path that means the same in every process of a cluster; a URI as it is."""
    return uri.rstrip("/") if is_remote(uri) else os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


@lru_cache(maxsize=32)
def _filesystem(root: str) -> pafs.FileSystem:
    # from_uri, because S3FileSystem() does not honour AWS_ENDPOINT_URL.
    try:
        return pafs.FileSystem.from_uri(root)[0]
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{root}: not a place that can be read or written: {error}") from None


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI, and the path in it. UserError for a scheme that nothing answers to."""
    if not is_remote(uri):
        return _filesystem("file:///"), absolute(uri)
    scheme, rest = uri.split("://", 1)
    return _filesystem(f"{scheme}://{rest.split('/', 1)[0]}"), rest


def exists(uri: str) -> bool:
    fs, path = resolve(uri)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def names(uri: str, suffix: str = "") -> list[str]:
    """Names of the files directly under `uri`, sorted; an absent folder has none."""
    fs, path = resolve(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(i.base_name for i in infos if i.type == pafs.FileType.File and i.base_name.endswith(suffix))


def paths(uri: str, suffix: str = "") -> list[str]:
    """Like `names`, as whole paths."""
    return [join(uri, name) for name in names(uri, suffix)]


def read_bytes(uri: str) -> bytes:
    fs, path = resolve(uri)
    try:
        with fs.open_input_file(path) as stream:
            return stream.read()
    except FileNotFoundError:
        raise UserError(f"{uri}: no such file") from None


def write_bytes(uri: str, data: bytes | memoryview | pa.Buffer) -> None:
    """Write `data` so that `uri` holds all of it or what it held before."""
    fs, path = resolve(uri)
    if is_remote(uri):
        with fs.open_output_stream(path) as stream:
            stream.write(data)
        return
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def delete(uri: str) -> None:
    """Remove a file or a folder with all it holds; nothing there is fine."""
    fs, path = resolve(uri)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        fs.delete_dir(path)
    elif kind == pafs.FileType.File:
        fs.delete_file(path)


def read_json(uri: str) -> Any:
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise UserError(f"{uri}: expected JSON: {error}") from None


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
        with fs.open_input_file(path) as stream:
            table = pq.ParquetFile(stream, page_checksum_verification=True).read(columns=wanted)
    except FileNotFoundError:
        raise UserError(f"{uri}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{uri}: expected a whole Parquet file: {error}") from None
    missing = [name for name in wanted or [] if name not in table.column_names]
    if missing:
        raise UserError(f"{uri}: no column {missing[0]!r}; expected {wanted}, found {table.column_names}")
    if schema is not None:
        for name in wanted:
            came = table.schema.field(name).type
            if came != schema.field(name).type:
                raise UserError(f"{uri}: column {name!r} is {came}, expected {schema.field(name).type}")
    return table


def encode_table(table: pa.Table, compression: str | dict[str, str] = "zstd", **options: Any) -> pa.Buffer:
    """The table as a Parquet file's bytes. options: of `pyarrow.parquet.write_table`."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression, write_page_checksum=True, **options)
    return sink.getvalue()


def write_table(uri: str, table: pa.Table, compression: str | dict[str, str] = "zstd", **options: Any) -> None:
    write_bytes(uri, encode_table(table, compression, **options))


def sha256(data: bytes | memoryview | pa.Buffer) -> str:
    return hashlib.sha256(data).hexdigest()
