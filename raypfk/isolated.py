"""Decoding in a process of its own, for images that may kill theirs.

Decoding is tried in place first. Where that process dies, or is stuck and ends itself, a mark beside the output tells
the next attempt, on whatever machine, to decode in a child: which image kills the child, or keeps it too long, is
then known, and the others go on.
"""

import io
import os
import pickle
import resource
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch

from raypfk import images, store
from raypfk.images import BadImage

SECONDS = float(os.environ.get("RAYPFK_DECODE_SECONDS", "60"))
"""An image that takes longer is stuck."""
START_SECONDS = 120.0
"""Of the child: it imports torch."""
MEMORY = 8 << 30
"""Bytes of address space that a child may take for an image, above what it starts with."""
SMALL = 4096
"""Bytes of an image, encoded and decoded, that is kept for the next time: 65,536 of them are half a GiB at most."""

Decode = dict[str, Any]
"""Arguments of `images.load`; empty: `images.decode` with all its pixels, and `max_pixels`."""


def decoded(encoded: Iterable[bytes | str], how: Decode, mark: str | None) -> Iterator[torch.Tensor | BadImage]:
    """uint8 pixels of each image, in order, or why there are none. To be read only: small ones are kept.

    encoded: a str says why an image could not be read. mark: path of a file that is there while this is at work; where
    it is there before, an earlier attempt died of these images. None: they are known to be harmless.
    """
    died = mark is not None and store.exists(mark)
    if mark:
        store.write_bytes(mark, b"")
    with _Child() if died else _Here() as decoder:
        for data in encoded:
            try:
                if isinstance(data, str):
                    raise BadImage(data)
                yield decoder.decode(data, how)
            except BadImage as error:
                yield error
    if mark:
        store.delete(mark)


def _decode(data: bytes, how: Decode) -> torch.Tensor:
    return images.load(data, **how) if "size" in how else images.decode(data, None, **how)


@lru_cache(maxsize=1 << 16)
def decode_small(data: bytes, how: tuple[tuple[str, Any], ...]) -> torch.Tensor:
    """Rounds, and the runs of an experiment, see a small pool again and again: a process decodes it once."""
    return _decode(data, dict(how))


def _is_small(data: bytes, how: Decode) -> bool:
    return len(data) <= SMALL and "size" in how and how["size"] ** 2 * how["channels"] <= SMALL


class _Here:
    """Decodes in this process, and ends it when an image is stuck: nothing else stops compiled code."""

    def __init__(self):
        self._began: float | None = None
        self._over = threading.Event()

    def __enter__(self) -> "_Here":
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()

    def decode(self, data: bytes, how: Decode) -> torch.Tensor:
        self._began = time.monotonic()
        try:
            return decode_small(data, tuple(how.items())) if _is_small(data, how) else _decode(data, how)
        except MemoryError:  # this process holds much else
            pass
        finally:
            self._began = None
        with _Child() as child:
            return child.decode(data, how)

    def _watch(self) -> None:
        while not self._over.wait(SECONDS / 10):
            began = self._began
            if began is not None and time.monotonic() - began > SECONDS:
                os._exit(70)


class _Child:
    """A process that decodes; begun when it is needed, and again after it died."""

    def __init__(self):
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_) -> None:
        self._end()

    def decode(self, data: bytes, how: Decode) -> torch.Tensor:
        try:
            self._ask(data, how)
            answer = self._answer(SECONDS)
        except TimeoutError:
            self._end()
            raise BadImage(f"decoding it takes more than {SECONDS:.0f} s") from None
        except (EOFError, BrokenPipeError):
            self._process.wait(timeout=10)  # its pipe is closed: it is ending
            raise BadImage(f"decoding it kills the process: {self._end()}") from None
        if isinstance(answer, str):
            raise BadImage(answer)
        return torch.from_numpy(answer)

    def _ask(self, data: bytes, how: Decode) -> None:
        """Of a child that died after its last answer this image is innocent: another one is asked."""
        try:
            if self._process is not None:
                _write(self._process.stdin, (data, how))
                return
        except BrokenPipeError:
            self._end()
        command = [sys.executable, "-m", "raypfk.isolated"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._answer(START_SECONDS)
        _write(self._process.stdin, (data, how))

    def _answer(self, seconds: float) -> Any:
        """What the child says within so many seconds; TimeoutError, or EOFError if it is dead."""
        handle, deadline, data = self._process.stdout.fileno(), time.monotonic() + seconds, bytearray()
        while len(data) < 8 or len(data) < 8 + struct.unpack("<Q", data[:8])[0]:
            if not select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(handle, 1 << 20)
            if not part:
                raise EOFError
            data += part
        return pickle.loads(data[8:])

    def _end(self) -> str:
        """Kills it; how it ended, in words."""
        process, self._process = self._process, None
        if process is None:
            return "it is not there"
        died = process.poll() is not None
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):  # closing it sends what it still held
                pipe.close()
        return f"signal {-code}" if died and code < 0 else f"exit code {code}"


def _write(stream: io.BufferedIOBase, message: Any) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(struct.pack("<Q", len(data)))
    stream.write(data)
    stream.flush()


def _serve() -> None:
    """The child: images in, pixels or reasons out."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    torch.set_num_threads(1)
    with open("/proc/self/statm") as memory:
        limit = int(memory.read().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    _write(answers, "ready")
    questions = sys.stdin.buffer
    while head := questions.read(8):
        data, how = pickle.loads(questions.read(struct.unpack("<Q", head)[0]))
        try:
            answer: Any = _decode(data, how).numpy()
        except BadImage as error:
            answer = str(error)
        except (MemoryError, RuntimeError):  # torch's own word for it
            answer = f"decoding it takes more than {MEMORY >> 30} GiB"
        _write(answers, answer)


if __name__ == "__main__":
    _serve()
