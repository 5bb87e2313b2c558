"""Images that cannot be used: how many may be, before it is the job and not the images that is wrong."""

import time
from collections import Counter
from collections.abc import Sequence

from raypfk import store
from raypfk.config import Share
from raypfk.errors import UserError
from raypfk.schema import REJECTS

ALWAYS = 10
"""Rejects that are let pass whatever share of the images they are."""
_SHOWN = 5

Reject = tuple[str, str]
"""(image_id, reason)"""


class TooMany(UserError):
    """More images are rejected than `data.max_rejects` lets pass."""


class Rejects:
    """What is rejected of `tried` images while a job goes on. most: as `data.max_rejects`."""

    def __init__(self, what: str, tried: int, most: Share, folder: str | None = None):
        self._what, self._tried, self._most, self._folder = what, tried, most, folder
        self._limit = most if isinstance(most, int) else max(ALWAYS, most * tried)
        self.count, self._reasons, self._first = 0, Counter(), {}
        self._files: set[str] = set()
        self._looked = time.monotonic()

    def add(self, rejects: Sequence[Reject]) -> None:
        """TooMany with a summary where that is so."""
        self.count += len(rejects)
        for image_id, reason in rejects:
            kind = reason.partition(":")[0]
            self._reasons[kind] += 1
            self._first.setdefault(kind, f"{image_id}: {reason}")
        if self.count > self._limit:
            raise TooMany(self._summary())

    def look(self, every: float = 0.0) -> None:
        """Adds the files of rejects that came to the folder since; at most once in so many seconds."""
        if time.monotonic() - self._looked < every:
            return
        self._looked = time.monotonic()
        for path in store.paths(self._folder, ".parquet"):
            if path not in self._files and (found := _read(path)) is not None:
                self._files.add(path)
                self.add(found)

    def _summary(self) -> str:
        kinds = "; ".join(f"{n:,} x {kind!r}, as {self._first[kind]}" for kind, n in self._reasons.most_common(_SHOWN))
        more = len(self._reasons) - _SHOWN
        rest = f"; and {more} other reasons" if more > 0 else ""
        return (
            f"{self._what}: {self.count:,} of {self._tried:,} images are rejected, more than data.max_rejects "
            f"({self._most}) allows; what is done is kept. {kinds}{rest}"
        )


def _read(path: str) -> list[Reject] | None:
    """None where the file is gone: its shard is read again, and may be whole by now."""
    try:
        table = store.read_table(path, schema=REJECTS)
    except UserError:
        if store.exists(path):
            raise
        return None
    return list(zip(table["image_id"].to_pylist(), table["reason"].to_pylist(), strict=True))
