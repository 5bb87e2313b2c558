"""An image's own random numbers: drawn from its id, so that they are the same wherever and whenever it is met."""

import hashlib
from collections.abc import Iterable

import numpy as np


def salts(ids: Iterable[str], seed: int) -> np.ndarray:
    """(N,) uint64: the first 8 bytes of each id's BLAKE2b hash, keyed with a seed below 2^64; as good as uniform."""
    key = seed.to_bytes(8)
    digests = b"".join(hashlib.blake2b(image_id.encode(), key=key, digest_size=8).digest() for image_id in ids)
    return np.frombuffer(digests, ">u8").astype(np.uint64)
