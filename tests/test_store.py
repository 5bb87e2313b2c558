"""Files are written whole or not at all, and a damaged one is named."""

import os

import pyarrow as pa
import pytest

from raypfk import store
from raypfk.errors import UserError


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    """A write that breaks off leaves the old file and no other."""
    path = str(tmp_path / "file")
    store.write_bytes(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        store.write_bytes(path, b"new")
    assert store.read_bytes(path) == b"old" and os.listdir(tmp_path) == ["file"]


def test_names_are_sorted_and_of_files_only(tmp_path):
    """names() lists files with the suffix, sorted; an absent folder has none."""
    for name in ("b.parquet", "a.parquet", "c.txt"):
        store.write_bytes(str(tmp_path / name), b"")
    (tmp_path / "d.parquet").mkdir()
    assert store.names(str(tmp_path), ".parquet") == ["a.parquet", "b.parquet"]
    assert store.names(str(tmp_path / "nowhere")) == []


def test_a_truncated_table_is_named(tmp_path):
    """Half a Parquet file: UserError with its path."""
    path = str(tmp_path / "table.parquet")
    store.write_table(path, pa.table({"x": list(range(1000))}))
    data = store.read_bytes(path)
    for part in (data[: len(data) // 2], b"", b"PAR1"):
        store.write_bytes(path, part)
        with pytest.raises(UserError, match=r"table\.parquet: expected a whole Parquet file"):
            store.read_table(path)


def test_missing_columns_and_other_types_are_named(tmp_path):
    """A column that is absent or of another type: path, column, expected and found."""
    path = str(tmp_path / "table.parquet")
    store.write_table(path, pa.table({"x": [1], "y": ["a"]}))
    with pytest.raises(UserError, match=r"no column 'z'; expected \['z'\], found"):
        store.read_table(path, ["z"])
    with pytest.raises(UserError, match=r"column 'y' is string, expected int64"):
        store.read_table(path, schema=pa.schema([("x", pa.int64()), ("y", pa.int64())]))


def test_a_folder_named_like_a_partition_adds_no_column(tmp_path):
    """`key=value` in a path is a name, not data."""
    path = str(tmp_path / "x=3" / "table.parquet")
    store.write_table(path, pa.table({"y": [1]}))
    assert store.read_table(path).column_names == ["y"]


def test_unusable_places_are_named():
    """A scheme that no filesystem answers to: UserError with the place."""
    with pytest.raises(UserError, match=r"gopher://hole: not a place"):
        store.exists("gopher://hole/file")


def test_absent_and_malformed_json(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        store.read_json(str(tmp_path / "none.json"))
    store.write_bytes(str(tmp_path / "bad.json"), b"{")
    with pytest.raises(UserError, match=r"bad\.json: expected JSON"):
        store.read_json(str(tmp_path / "bad.json"))


def test_delete_takes_files_folders_and_nothing(tmp_path):
    store.write_bytes(str(tmp_path / "a" / "b"), b"x")
    store.delete(str(tmp_path / "a"))
    store.delete(str(tmp_path / "a"))
    assert not store.exists(str(tmp_path / "a"))
