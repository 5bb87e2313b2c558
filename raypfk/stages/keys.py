"""Keys of pool images: shard number, then row. Shards are in the order of image_id, and so are the keys."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import torch

from raypfk import store
from raypfk.errors import RunError

SHARD_BITS = 32
_READERS = 16


def keys_of(number: int, rows: int) -> torch.Tensor:
    """(rows,) int64."""
    return (number << SHARD_BITS) + torch.arange(rows)


def ids_of(keys: np.ndarray, paths: list[str]) -> pa.Array:
    """Image ids of keys, from the shards that hold them."""
    shard, row = keys >> SHARD_BITS, keys & ((1 << SHARD_BITS) - 1)
    needed, inverse = np.unique(shard, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    rows = np.split(row[order], np.cumsum(np.bincount(inverse, minlength=len(needed)))[:-1])

    def read(part: tuple[int, np.ndarray]) -> pa.Array:
        ids = store.read_table(paths[part[0]], ["image_id"])["image_id"].combine_chunks()
        if part[1].max() >= len(ids):
            raise RunError(f"{paths[part[0]]}: became shorter while it was scored")
        return ids.take(pa.array(part[1]))

    with ThreadPoolExecutor(_READERS) as threads:
        found = list(threads.map(read, zip(needed, rows, strict=True))) if len(needed) else []
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return pa.concat_arrays([pa.array([], pa.string()), *found]).take(pa.array(back))
