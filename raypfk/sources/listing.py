"""What a source says that it has."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

UNKNOWN = -1
"""The label of an image that has none."""


@dataclass
class Entries:
    """Images of one split, ascending by id. keys: what the source reads them by. labels: int64, some UNKNOWN, or None.

    ids, keys: Arrow large_string, made of lists of str if need be: a tenth of the memory of Python's strings.
    """

    ids: pa.Array
    keys: pa.Array
    labels: np.ndarray | None = None

    def __post_init__(self):
        self.ids, self.keys = _strings(self.ids), _strings(self.keys)

    def __len__(self) -> int:
        return len(self.ids)

    def label(self, i: int) -> int | None:
        return None if self.labels is None or self.labels[i] == UNKNOWN else int(self.labels[i])

    def take(self, rows: np.ndarray) -> "Entries":
        rows = np.sort(rows)
        labels = None if self.labels is None else self.labels[rows]
        return Entries(self.ids.take(pa.array(rows)), self.keys.take(pa.array(rows)), labels)

    @classmethod
    def by_id(cls, ids: Sequence[str], keys: Sequence[str], labels: np.ndarray | None = None) -> "Entries":
        """In the order of their ids."""
        ids, keys = _strings(ids), _strings(keys)
        order = pc.array_sort_indices(ids)
        return cls(ids.take(order), keys.take(order), None if labels is None else labels[order.to_numpy()])

    @classmethod
    def concatenated(cls, parts: "Sequence[Entries]") -> "Entries":
        """Parts whose ids follow on each other's; all of them have labels."""
        ids, keys = (pa.concat_arrays([getattr(part, name) for part in parts]) for name in ("ids", "keys"))
        return cls(ids, keys, np.concatenate([part.labels for part in parts]))


def _strings(values: Sequence[str]) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values, pa.large_string())


@dataclass
class Listing:
    """All that a source has: `train` becomes pool (and what is held out of it); rejects are (id, reason)."""

    train: Entries
    validation: Entries | None = None
    test: Entries | None = None
    classes: list[str] | None = None
    rejects: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Source(Protocol):
    """Small, and picklable for Ray tasks."""

    def list(self) -> Listing:
        """Its images, without reading their pixels."""

    def read(self, keys: Sequence[str]) -> Iterator[bytes | str]:
        """Encoded images, in order, many in flight; a str says why one cannot be read."""
