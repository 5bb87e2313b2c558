"""Data sets of torchvision and scikit-learn: arrays in memory, opened once per process."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from raypfk import images
from raypfk.errors import UserError
from raypfk.sources.listing import Entries, Listing


@dataclass(frozen=True)
class Arrays:
    """A data set that lies in memory as arrays: opened once per process, each image encoded as PNG when it is read."""

    name: str
    root: str | None

    def list(self) -> Listing:
        parts, absent = _PARTS[self.name], []
        if self.name == "svhn" and not os.path.exists(os.path.join(self.root, "extra_32x32.mat")):
            parts, absent = ("train",), [f"{self.root}: no extra_32x32.mat, so the pool has SVHN's train images only"]
        test = self._entries("test") if self.name in _HAS_TEST else None
        classes = _open(self.name, self.root, "train").classes
        return Listing(Entries.concatenated([self._entries(part) for part in parts]), None, test, classes, notes=absent)

    def read(self, keys: Sequence[str]) -> Iterator[bytes]:
        for key in keys:
            part, index = key.split("/")
            yield images.encode_png(_open(self.name, self.root, part).image(int(index)))

    def _entries(self, part: str) -> Entries:
        labels = _open(self.name, self.root, part).labels
        width = max(5, len(str(len(labels) - 1)))
        ids = [f"{part}/{index:0{width}d}" for index in range(len(labels))]
        return Entries(ids, ids, labels)


_PARTS = {"mnist": ("train",), "svhn": ("extra", "train"), "cifar10": ("train",), "digits": ("train",)}
_HAS_TEST = ("mnist", "svhn", "cifar10")
_DIGITS = [str(digit) for digit in range(10)]


@dataclass
class _Opened:
    labels: np.ndarray
    image: Callable[[int], np.ndarray]
    """uint8 (H,W) or (H,W,3)"""
    classes: list[str]


@lru_cache(maxsize=4)
def _open(name: str, root: str | None, part: str) -> _Opened:
    try:
        return _OPENERS[name](root, part)
    except Exception as error:  # whatever a parser makes of a corrupt file
        message = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{root}: expected {_EXPECTED[name]}, whole: {part}: {message}") from None


_EXPECTED = {
    "mnist": "MNIST as torchvision keeps it (MNIST/raw/train-images-idx3-ubyte and the like)",
    "svhn": "SVHN as torchvision keeps it (train_32x32.mat, test_32x32.mat and, if wanted, extra_32x32.mat)",
    "cifar10": "CIFAR-10 as torchvision keeps it (cifar-10-batches-py/data_batch_1 and the like)",
    "digits": "scikit-learn's bundled digits",
}


def _mnist(root: str, part: str) -> _Opened:
    from torchvision.datasets import MNIST

    data = MNIST(root, train=part == "train", download=False)
    _same_length(len(data.data), len(data.targets))
    return _Opened(data.targets.numpy().astype(np.int64), lambda i: data.data[i].numpy(), _DIGITS)


def _svhn(root: str, part: str) -> _Opened:
    from torchvision.datasets import SVHN

    data = SVHN(root, split=part, download=False)
    _same_length(len(data.data), len(data.labels))
    return _Opened(data.labels, lambda i: np.ascontiguousarray(data.data[i].transpose(1, 2, 0)), _DIGITS)


def _cifar10(root: str, part: str) -> _Opened:
    from torchvision.datasets import CIFAR10

    data = CIFAR10(root, train=part == "train", download=False)
    _same_length(len(data.data), len(data.targets))
    return _Opened(np.array(data.targets, dtype=np.int64), lambda i: data.data[i], list(data.classes))


def _digits(root: None, part: str) -> _Opened:
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    return _Opened(data.target.astype(np.int64), lambda i: pixels[i], _DIGITS)


_OPENERS: dict[str, Callable[[Any, str], _Opened]] = {
    "mnist": _mnist,
    "svhn": _svhn,
    "cifar10": _cifar10,
    "digits": _digits,
}


def _same_length(images_: int, labels: int) -> None:
    if images_ != labels:
        raise ValueError(f"{images_} images but {labels} labels")
