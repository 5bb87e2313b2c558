"""What a filesystem does for raypfk, and the two that need no library of their own: this machine's, and pyarrow's.

Errors: FileNotFoundError, PermissionError, or OSError with the URI in it; what may pass was tried again before.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

from raypfk.errors import UserError
from raypfk.retry import Transient, retried


class Entry(NamedTuple):
    """A file or folder that was listed. path: relative to the listed folder."""

    path: str
    is_folder: bool


class Version(NamedTuple):
    """What a small file held at one time. token: names this content; age: seconds since it was written, by the clock
    of whoever keeps the file, so that no two machines' clocks are compared."""

    data: bytes
    token: str
    age: float


class NotAFile(OSError):
    """A device, a pipe or a socket: it may have no end, or never begin."""


class TooLong(OSError):
    """A file of more bytes than were wanted, none of which was read."""

    def __init__(self, uri: str, size: int, most: int):
        super().__init__(errno.EFBIG, f"{size:,} bytes, expected at most {most:,}", uri)


class Filesystem(ABC):
    @abstractmethod
    def read(self, path: str, most: int | None = None) -> bytes:
        """All of a file, in one request. TooLong where it has more than `most` bytes."""

    @abstractmethod
    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop), in one request; fewer where the file ends."""

    @abstractmethod
    def open(self, path: str) -> Any:
        """A file object that fetches what is read of it."""

    @abstractmethod
    def write(self, path: str, data: Any) -> None:
        """The file holds all of `data` afterwards, or what it held before."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> Version | None:
        """Write only where nothing is; None if something was."""

    @abstractmethod
    def replace(self, path: str, data: bytes, version: Version) -> Version | None:
        """Write only over `version`; None if it is no longer there."""

    @abstractmethod
    def version(self, path: str) -> Version | None:
        """A small file's content now, or None."""

    @abstractmethod
    def size(self, path: str) -> int | None:
        """In bytes; None if there is no such file."""

    @abstractmethod
    def is_folder(self, path: str) -> bool:
        """Whether there is anything below `path`."""

    @abstractmethod
    def list(self, path: str, recursive: bool = False) -> Iterator[Entry]:
        """What is directly below a folder, or all files below it, in any order; an absent folder has nothing."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """A file; nothing there is fine."""

    @abstractmethod
    def delete_folder(self, path: str) -> None:
        """A folder with all it holds; nothing there is fine."""


class Local(Filesystem):
    """This machine's files, those of network mounts included. Paths are absolute."""

    def read(self, path: str, most: int | None = None) -> bytes:
        with open(_regular(path), "rb") as stream:
            _expect(path, os.fstat(stream.fileno()).st_size, most)
            return stream.read()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with open(_regular(path), "rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)

    def open(self, path: str) -> pa.NativeFile:
        return pa.OSFile(_regular(path))

    def write(self, path: str, data: Any) -> None:
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
        except BaseException as error:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            if isinstance(error, OSError) and error.errno and not error.filename:  # a full disk does not say of what
                raise OSError(error.errno, error.strerror, path) from None
            raise

    def create(self, path: str, data: bytes) -> Version | None:
        with self._alone(path):
            if os.path.exists(path):
                return None
            self.write(path, data)
            return self.version(path)

    def replace(self, path: str, data: bytes, version: Version) -> Version | None:
        with self._alone(path):
            there = self.version(path)
            if there is None or there.token != version.token:
                return None
            self.write(path, data)
            return self.version(path)

    def version(self, path: str) -> Version | None:
        try:
            data, written = self.read(path), os.stat(path).st_mtime
        except FileNotFoundError:
            return None
        return Version(data, hashlib.sha256(data).hexdigest(), max(0.0, self._now(path) - written))

    @staticmethod
    def _now(path: str) -> float:
        """By the clock that dates files in this folder, which on a mount is another machine's."""
        try:
            with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), prefix=".clock.") as probe:
                return os.stat(probe.name).st_mtime
        except OSError:  # read-only, or full
            return time.time()

    @staticmethod
    @contextmanager
    def _alone(path: str) -> Iterator[None]:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{os.path.dirname(path)}/.{os.path.basename(path)}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def size(self, path: str) -> int | None:
        try:
            return os.stat(path).st_size if os.path.isfile(path) else None
        except FileNotFoundError:
            return None

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(path)

    def list(self, path: str, recursive: bool = False) -> Iterator[Entry]:
        yield from self._below(path, "", recursive, frozenset())

    def _below(self, path: str, prefix: str, recursive: bool, above: frozenset[str]) -> Iterator[Entry]:
        real = os.path.realpath(path)
        if real in above:  # a link back to a folder that it lies in has no end
            return
        try:
            items = list(os.scandir(path))
        except FileNotFoundError:
            return
        for item in items:
            if item.is_dir() and recursive:
                yield from self._below(item.path, f"{prefix}{item.name}/", True, above | {real})
            elif item.is_dir():
                yield Entry(prefix + item.name, True)
            else:
                yield Entry(prefix + item.name, False)

    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(path)

    def delete_folder(self, path: str) -> None:
        if os.path.isdir(path):
            shutil.rmtree(path)


def _regular(path: str) -> str:
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder", path)
    if not stat.S_ISREG(mode):
        raise NotAFile(errno.EINVAL, "neither a file nor a folder", path)
    return path


def _expect(uri: str, size: int, most: int | None) -> None:
    if most is not None and size > most:
        raise TooLong(uri, size, most)


_OBJECTS = ("gs://", "gcs://", "abfs://", "abfss://")
"""Stores without folders, and without a rename that is one step."""


class Arrow(Filesystem):
    """Any other that pyarrow knows (gs://, abfss://, hdfs://). It has no conditional writes: a lease is a promise."""

    def __init__(self, root: str):
        self._root = root
        try:
            self._fs, _ = pafs.FileSystem.from_uri(root)
        except (pa.ArrowInvalid, OSError) as error:
            message = f"{root}: not a place that can be read or written: {' '.join(str(error).split())}"
            raise UserError(re.sub("//[^/@ ]*@", "//", message)) from None  # what stands there may be a key

    def read(self, path: str, most: int | None = None) -> bytes:
        def attempt() -> bytes:
            with self._fs.open_input_file(path) as stream:
                _expect(f"{self._root}/{path}", stream.size(), most)
                return stream.read()

        return self._do(path, attempt)

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        def attempt() -> bytes:
            with self._fs.open_input_file(path) as stream:
                return stream.read_at(stop - start, start)

        return self._do(path, attempt)

    def open(self, path: str) -> pa.NativeFile:
        return self._do(path, lambda: self._fs.open_input_file(path))

    def write(self, path: str, data: Any) -> None:
        def attempt() -> None:
            if self._root.startswith(_OBJECTS):
                self._put(path, data)
                return
            folder, _, name = path.rpartition("/")
            self._fs.create_dir(folder, recursive=True)
            temporary = f"{folder}/.{name}.{uuid.uuid4().hex}"
            try:
                self._put(temporary, data)
                self._fs.move(temporary, path)
            except BaseException:
                with suppress(OSError):
                    self._fs.delete_file(temporary)
                raise

        self._do(path, attempt)

    def _put(self, path: str, data: Any) -> None:
        with self._fs.open_output_stream(path) as stream:
            stream.write(data)

    def create(self, path: str, data: bytes) -> Version | None:
        if self.size(path) is not None:
            return None
        self.write(path, data)
        return self._as_written(path, data)

    def replace(self, path: str, data: bytes, version: Version) -> Version | None:
        there = self.version(path)
        if there is None or there.token != version.token:
            return None
        self.write(path, data)
        return self._as_written(path, data)

    def _as_written(self, path: str, data: bytes) -> Version | None:
        there = self.version(path)
        return there if there is not None and there.data == bytes(data) else None

    def version(self, path: str) -> Version | None:
        try:
            data = self.read(path)
        except FileNotFoundError:
            return None
        written = self._info(path).mtime
        age = time.time() - written.timestamp() if written else 0.0
        return Version(data, hashlib.sha256(data).hexdigest(), max(0.0, age))

    def size(self, path: str) -> int | None:
        info = self._info(path)
        return info.size if info.type == pafs.FileType.File else None

    def is_folder(self, path: str) -> bool:
        return self._info(path).type == pafs.FileType.Directory

    def _info(self, path: str) -> pafs.FileInfo:
        return self._do(path, lambda: self._fs.get_file_info(path))

    def list(self, path: str, recursive: bool = False) -> Iterator[Entry]:
        selector = pafs.FileSelector(path, allow_not_found=True, recursive=recursive)
        for info in self._do(path, lambda: self._fs.get_file_info(selector)):
            folder = info.type == pafs.FileType.Directory
            if not (folder and recursive):
                yield Entry(info.path.removeprefix(path).lstrip("/"), folder)

    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._do(path, lambda: self._fs.delete_file(path))

    def delete_folder(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._do(path, lambda: self._fs.delete_dir(path))

    def _do(self, path: str, action: Callable[[], Any]) -> Any:
        def attempt() -> Any:
            try:
                return action()
            except (FileNotFoundError, PermissionError, TooLong):
                raise
            except OSError as error:  # pyarrow tells no other two apart
                raise Transient from error

        return retried(attempt, f"{self._root}/{path}")
