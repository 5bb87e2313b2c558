"""Reading images out of files: whole ones, or spans of large ones."""

import errno
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

from raypfk import store
from raypfk.filesystems import NotAFile, TooLong

IN_FLIGHT = {True: 32, False: 4}
"""Reads at once: an object store answers late, a disk at once."""
GAP = 1 << 20
"""Bytes between two spans that are read rather than asked for apart."""
MOST = 1 << 26
"""Bytes of neighbours asked for at once."""
LONGEST = 1 << 30
"""Bytes of an image: one that is longer, as a film with a picture's name is, is not read into memory."""


class Files:
    """Keys are paths, or PATH#START-STOP for bytes [START, STOP) of one."""

    def read(self, keys: Sequence[str]) -> Iterator[bytes | str]:
        """Encoded images, in order; a str says why one cannot be read. Neighbours in one file come in one request."""
        spans = list(_spans(keys))
        remote = any(store.is_remote(key) for key in keys)
        with ThreadPoolExecutor(IN_FLIGHT[remote]) as threads:
            for parts in threads.map(_read, spans):
                yield from parts


def span_key(path: str, start: int, stop: int) -> str:
    return f"{path}#{start}-{stop}"


def _place(key: str) -> tuple[str, tuple[int, int] | None]:
    path, mark, span = key.rpartition("#")
    start, dash, stop = span.partition("-")
    if mark and dash and start.isdigit() and stop.isdigit():
        return path, (int(start), int(stop))
    return key, None


def _spans(keys: Sequence[str]) -> Iterator[tuple[str, list[tuple[int, int] | None]]]:
    """Keys as (path, spans), neighbours together."""
    for path, places in groupby(map(_place, keys), key=lambda place: place[0]):
        held: list[tuple[int, int]] = []
        for _, span in places:
            if span is None:
                yield path, [None]
                continue
            if held and not (held[-1][1] <= span[0] <= held[-1][1] + GAP and span[1] - held[0][0] <= MOST):
                yield path, held
                held = []
            held.append(span)
        if held:
            yield path, held


def _read(part: tuple[str, list[tuple[int, int] | None]]) -> list[bytes | str]:
    path, spans = part
    try:
        if spans[0] is None:
            return [store.fetch(path, LONGEST)]
        first = spans[0][0]
        if len(spans) == 1 and spans[0][1] - first > LONGEST:
            raise TooLong(path, spans[0][1] - first, LONGEST)
        data = store.fetch_range(path, first, spans[-1][1])
        return [data[start - first : stop - first] for start, stop in spans]
    except PermissionError:
        reason = "cannot be read: permission denied"
    except FileNotFoundError:
        reason = "cannot be read: it is gone since it was listed"
    except IsADirectoryError:
        reason = "cannot be read: a folder"
    except (NotAFile, TooLong) as error:
        reason = f"cannot be read: {error.strerror}"
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR):
            raise
        reason = f"cannot be read: {error.strerror.lower()}"
    return [reason] * len(spans)
