"""WebDataset shards: tar files of images, each with its label in a file of the same name and the suffix .cls."""

import io
import os
import tarfile
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from raypfk import images, store
from raypfk.errors import UserError
from raypfk.sources.files import IN_FLIGHT, Files, span_key
from raypfk.sources.labels import Label, classes_of, indices
from raypfk.sources.listing import Entries, Listing

AHEAD = 1 << 23
"""Bytes of a tar that are fetched at once while its headers are read."""
LONGEST_LABEL = 1024
LONGEST_HEADER = 1 << 20
"""Bytes that a member's long name or extended header may have."""


class _Members(NamedTuple):
    """What one tar holds."""

    ids: list[str]
    keys: list[str]
    labels: list[Label]
    rejects: list[tuple[str, str]]


@dataclass(frozen=True)
class Tars(Files):
    """All .tar files below a root, or one. An image's id is its tar's path and its own; nothing is unpacked to disk.

    Members with ".." in their path or an absolute one, links, devices and files of other kinds go to the rejects; a
    tar that cannot be read to its end mark is an error.
    """

    root: str
    validation_root: str | None = None
    test_root: str | None = None

    def list(self) -> Listing:
        parts = {"train": _members(self.root, "data.root", "")}
        for name, root in (("validation", self.validation_root), ("test", self.test_root)):
            if root:
                parts[name] = _members(root, f"data.{name}_root", f"{name}/")
        classes = classes_of([part.labels for part in parts.values()], self.root)
        made = {n: Entries.by_id(part.ids, part.keys, indices(part.labels, classes)) for n, part in parts.items()}
        return Listing(**made, classes=classes, rejects=[reject for part in parts.values() for reject in part.rejects])


def _members(root: str, field: str, prefix: str) -> _Members:
    paths = [root] if root.lower().endswith(".tar") else _tars(root, field)
    names = [os.path.basename(root)] if paths == [root] else [path[len(root) :].lstrip("/") for path in paths]
    with ThreadPoolExecutor(IN_FLIGHT[store.is_remote(root)]) as threads:
        ids = [prefix + unicodedata.normalize("NFC", name.removesuffix(".tar")) for name in names]
        found = list(threads.map(_index, paths, ids))
    return _Members(*([one for part in column for one in part] for column in zip(*found, strict=True)))


def _tars(root: str, field: str) -> list[str]:
    try:
        entries = sorted(entry.path for entry in store.entries(root, recursive=True))
    except OSError as error:
        raise UserError(f"{field}: {root}: cannot be listed: {error}") from None
    found = [path for path in entries if path.lower().endswith(".tar")]
    if not found:
        packed = next(
            (path for path in entries if path.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"))), ""
        )
        why = f"{packed} is compressed and cannot be read in parts" if packed else "none is there"
        raise UserError(f"{field}: {root}: expected .tar files: {why}")
    return [store.join(root, path) for path in found]


def _index(path: str, prefix: str) -> _Members:
    """Where a tar's images are in it, and their labels. Its bytes come in large pieces, each once."""
    found, labels, keys = _Members([], [], [], []), {}, {}
    try:
        with store.opened(path) as parts, _Stream(parts, AHEAD) as stream:
            for member, data in _headers(stream):
                _note(member, data, path, prefix, keys, labels, found.rejects)
    except RecursionError:
        raise UserError(f"{path}: expected a whole tar file: headers of headers, nested too deep") from None
    except (tarfile.TarError, EOFError, ValueError, LookupError, ArithmeticError, TypeError) as error:
        raise UserError(f"{path}: expected a whole tar file: {error}") from None
    for name in sorted(keys):
        found.ids.append(f"{prefix}/{unicodedata.normalize('NFC', name)}")
        found.keys.append(keys[name])
        found.labels.append(labels.get(_stem(name)))
    return found


class _Stream(io.BufferedReader):
    """tarfile believes what a header says of its own length: gigabytes would be read into memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0 or size > LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes, expected at most {LONGEST_HEADER}")
        return super().read(size)


def _headers(stream: _Stream) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Members, and of labels what they hold. ReadError where the file ends before its last member does, and where
    anything but a tar's end follows it: tarfile takes a damaged header for the end, and what is behind is lost."""
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        for member in tar:
            if member.size < 0:
                raise tarfile.ReadError(f"{member.name!r} has the size {member.size}")
            if member.isreg() and member.offset_data + member.size > size:
                raise tarfile.ReadError(f"it ends within {member.name!r}")
            is_label = member.isreg() and member.name.lower().endswith(".cls") and member.size <= LONGEST_LABEL
            yield member, tar.extractfile(member).read() if is_label else b""
        _expect_end(stream, tar)


def _expect_end(stream: _Stream, tar: tarfile.TarFile) -> None:
    at, zeros = stream.seek(tar.offset), 0
    while piece := stream.read(LONGEST_HEADER):
        if piece.count(0) < len(piece):
            count = len(tar.getnames())
            raise tarfile.ReadError(f"at byte {at}, after {count} members, is neither another nor the end")
        zeros += len(piece)
    if zeros < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it ends after {len(tar.getnames())} members without a tar's end mark: it is cut off")


def _note(
    member: tarfile.TarInfo, data: bytes, path: str, prefix: str, keys: dict, labels: dict, rejects: list
) -> None:
    name = member.name.removeprefix("./")
    reason, printable = _unfit(member, name), _printable(name)
    if member.isdir() or any(part.startswith(".") and part not in (".", "..") for part in name.split("/")):
        return
    if reason is None and name.lower().endswith(".cls"):
        if _stem(name) in labels:
            rejects.append(_again(prefix, name))
        else:
            labels[_stem(name)] = _label(data, member.size, path, name)
    elif reason is None and name.lower().endswith(images.SUFFIXES):
        if name in keys:
            rejects.append(_again(prefix, name))
        else:
            keys[name] = span_key(path, member.offset_data, member.offset_data + member.size)
    elif reason is not None or not name.lower().endswith((".json", ".txt")):
        rejects.append((f"{prefix}/{printable}", reason or "not read: the suffix is no image's"))


def _again(prefix: str, name: str) -> tuple[str, str]:
    """A reject under another id than that of the image which is kept."""
    return f"{prefix}/{name} (again)", "there twice in its tar: the first one counts"


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def _unfit(member: tarfile.TarInfo, name: str) -> str | None:
    if _printable(name) != name:
        return "not read: its name is not text in UTF-8"
    if name.startswith("/") or (len(name) > 1 and name[1] == ":"):
        return "not read: an absolute path"
    if ".." in name.replace("\\", "/").split("/"):
        return "not read: a path that leaves the tar"
    if member.issym() or member.islnk():
        return f"not read: a link to {_printable(member.linkname)}"
    if not member.isdir() and not member.isreg():
        return "not read: neither a file nor a folder"
    if member.sparse is not None:
        return "not read: a sparse file"
    return None


def _stem(name: str) -> str:
    """A WebDataset key: the path up to the first dot of the last part."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.split('.')[0]}"


def _label(data: bytes, size: int, path: str, name: str) -> Label:
    text = data.decode("utf-8", "replace").strip()
    if not text or not text.isprintable() or "\N{REPLACEMENT CHARACTER}" in text:
        found = repr(data[:20]) if len(data) == size else f"{size} bytes"
        raise UserError(f"{path}: {name}: expected a class name or index as text on one line, found {found}")
    return text
