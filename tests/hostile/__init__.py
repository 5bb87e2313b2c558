"""Hostile inputs, a room for each kind of file: every row is one kind of badness, and the message that must come."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from raypfk.errors import UserError
from raypfk.images import BadImage

CLASSES = [str(digit) for digit in range(10)]


def refusal(action: Callable[[], Any], message: str, name: str = "") -> str:
    """What `action` is refused with: a UserError or BadImage on one line that says `message` (a regex) and `name`."""
    with pytest.raises((UserError, BadImage)) as refused:
        action()
    text = str(refused.value)
    assert re.search(message, text), text
    assert name in text
    assert "\n" not in text and "Traceback" not in text and len(text) < 1000
    return text


def split(**changes: Any) -> dict:
    """Of a manifest: one shard of two images."""
    file = {"name": "00000.parquet", "rows": 2, "bytes": 9, "sha256": "0" * 64, "content": "0" * 64}
    shard = {"name": "00000.parquet", "rows": 2, "first_id": "a", "last_id": "b", "files": ["00000.parquet"]}
    one = {"rows": 2, "bytes": 9, "content": "0" * 64, "label_histogram": dict.fromkeys(CLASSES, 0)}
    return one | {"files": [file], "shards": [shard]} | changes


def manifest(**changes: Any) -> dict:
    """Of a pool that nothing is wrong with."""
    return {
        "format_version": 2,
        "source": {"kind": "digits", "root": None},
        "seed": 1,
        "data": {"source": "digits"},
        "notes": [],
        "imbalance": None,
        "classes": CLASSES,
        "image": {"channels": 1, "width": 8, "height": 8},
        "splits": {name: split() for name in ("pool", "validation", "test")},
        "rejects": 0,
        "fingerprint": "f" * 64,
    } | changes
