"""What can become a pool: a folder of images, or a data set of torchvision or scikit-learn.

A source lists its images without reading their pixels; `read(key)` then gives one encoded image, in any process.
Image ids never change: a folder's are paths relative to the root ("/" between, Unicode NFC), a data set's the index
in it ("train/00042").
"""

import os
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow.fs as pafs

from raypfk import images, store
from raypfk.config import DataConfig, ImbalanceConfig, Share
from raypfk.errors import UserError


@dataclass
class Entries:
    """Images of one split, sorted by id. keys: what the source's `read` takes. labels: int64, or None if unknown."""

    ids: list[str]
    keys: list[str]
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> "Entries":
        rows = np.sort(rows)
        labels = None if self.labels is None else self.labels[rows]
        return Entries([self.ids[i] for i in rows], [self.keys[i] for i in rows], labels)


@dataclass
class Listing:
    """All that a source has: `train` becomes pool (and what is held out of it); rejects are (id, reason)."""

    train: Entries
    validation: Entries | None = None
    test: Entries | None = None
    classes: list[str] | None = None
    rejects: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def of(data: DataConfig) -> "Folder | Arrays":
    """The source that the configuration names: small, and picklable for Ray tasks."""
    if data.source == "folder":
        return Folder(data.root, data.validation_root, data.test_root)
    return Arrays(data.source, data.root)


# ---------------------------------------------------------------------------------------------------- data sets


@dataclass(frozen=True)
class Arrays:
    """A data set that lies in memory as arrays: opened once per process, each image encoded as PNG when it is read."""

    name: str
    root: str | None
    readers = 1

    def list(self) -> Listing:
        parts, absent = _PARTS[self.name], []
        if self.name == "svhn" and not os.path.exists(os.path.join(self.root, "extra_32x32.mat")):
            parts, absent = ("train",), [f"{self.root}: no extra_32x32.mat, so the pool has SVHN's train images only"]
        test = self._entries("test") if self.name in _HAS_TEST else None
        classes = _open(self.name, self.root, "train").classes
        return Listing(_concatenate([self._entries(part) for part in parts]), None, test, classes, notes=absent)

    def read(self, key: str) -> bytes:
        part, index = key.split("/")
        return images.encode_png(_open(self.name, self.root, part).image(int(index)))

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
        raise UserError(f"{root}: expected {_EXPECTED[name]}, whole: {message}") from None


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


def _concatenate(parts: list[Entries]) -> Entries:
    """Parts in the order of their ids."""
    return Entries(
        [i for part in parts for i in part.ids],
        [k for part in parts for k in part.keys],
        np.concatenate([part.labels for part in parts]),
    )


# ------------------------------------------------------------------------------------------------------- folder


@dataclass(frozen=True)
class Folder:
    """A folder of images, local or s3://: all directly in it (no labels), or one folder per class (its name).

    Every file is listed: one whose suffix is no image's goes to the rejects, as does a link that leaves the root, a
    link to a folder and a name that is not UTF-8. Only hidden files and folders (.DS_Store, .git) are ignored. A
    class folder counts as a class also when it is empty. Ids from validation_root begin with "validation/", those
    from test_root with "test/", so that an id names one image of the pool.
    """

    root: str
    validation_root: str | None = None
    test_root: str | None = None

    def list(self) -> Listing:
        pool = _Tree(self.root, "data.root")
        given = {"validation": self.validation_root, "test": self.test_root}
        trees = {name: _Tree(root, f"data.{name}_root", f"{name}/") for name, root in given.items() if root}
        for tree in trees.values():
            if tree.classes is None:
                raise UserError(f"{tree.field}: {tree.root}: expected one folder per class, found images or nothing")
        classes = next((tree.classes for tree in [pool, *trees.values()] if tree.classes is not None), None)
        listing = Listing(pool.entries(classes), classes=classes)
        for name, tree in trees.items():
            setattr(listing, name, tree.entries(classes))
        listing.rejects = [reject for tree in [pool, *trees.values()] for reject in tree.rejects]
        return listing

    @property
    def readers(self) -> int:
        """Reads worth having in flight at once: an object store answers late, a disk at once."""
        return 16 if store.is_remote(self.root) else 1

    def read(self, key: str) -> bytes:
        return store.read_bytes(key)


class _Tree:
    """The files below one root. classes: sorted names of the class folders, or None for a flat folder."""

    def __init__(self, root: str, field: str, prefix: str = ""):
        self.root, self.field, self.prefix = root, field, prefix
        self.rejects: list[tuple[str, str]] = []
        self.paths: list[str] = []
        self.folders: list[str] = []
        self._list()
        tops = [path for path in self.paths if "/" not in path]
        if tops and self.folders:
            raise UserError(
                f"{field}: {root}: expected either images or class folders, found both: "
                f"{min(tops)!r} and {min(self.folders)!r}/"
            )
        self.classes = sorted({unicodedata.normalize("NFC", name) for name in self.folders}) or None

    def entries(self, classes: list[str] | None) -> Entries:
        """Images sorted by id, with labels as indices into `classes`."""
        ids = [self._id(path) for path in self.paths]
        order = sorted(range(len(ids)), key=ids.__getitem__)
        ids, paths = [ids[i] for i in order], [self.paths[i] for i in order]
        keys = [store.join(self.root, path) for path in paths]
        if self.classes is None:
            return Entries(ids, keys)
        if unknown := sorted(set(self.classes) - set(classes)):
            raise UserError(f"{self.field}: {self.root}: unknown class {unknown[0]!r}, expected some of {classes}")
        index = {name: i for i, name in enumerate(classes)}
        labels = [index[i.removeprefix(self.prefix).split("/")[0]] for i in ids]
        return Entries(ids, keys, np.array(labels, dtype=np.int64))

    def _id(self, path: str) -> str:
        return self.prefix + unicodedata.normalize("NFC", path)

    def _list(self) -> None:
        if store.is_remote(self.root):
            self._walk()
        elif os.path.isdir(self.root):
            self._scan("", os.path.realpath(self.root))
        else:
            raise UserError(f"{self.field}: {self.root}: no such folder")

    def _walk(self) -> None:
        """Add everything below a remote root, in one listing."""
        fs, base = store.resolve(self.root)
        try:
            infos = fs.get_file_info(pafs.FileSelector(base, recursive=True, allow_not_found=True))
        except OSError as error:
            raise UserError(f"{self.field}: {self.root}: cannot be listed: {error}") from None
        for info in infos:
            path = info.path.removeprefix(base).lstrip("/")
            if info.type == pafs.FileType.File and not any(part.startswith(".") for part in path.split("/")):
                self._add(path)
        self.folders = sorted({path.split("/")[0] for path in self.paths if "/" in path})

    def _scan(self, below: str, real_root: str) -> None:
        """Add the local folder `below` (relative, "" or ending in "/"), depth first."""
        folder = os.path.join(self.root, below)
        try:
            with os.scandir(folder) as found:
                items = sorted(found, key=lambda item: item.name)
        except OSError as error:
            raise UserError(f"{self.field}: {folder}: cannot be listed: {error.strerror}") from None
        for item in items:
            path = below + item.name
            if item.name.startswith("."):
                continue
            reason = _unfit(item, real_root)
            if reason:
                self._reject(path, reason)
            elif item.is_dir():
                if not below:
                    self.folders.append(path)
                self._scan(path + "/", real_root)
            else:
                self._add(path)

    def _add(self, path: str) -> None:
        if path.lower().endswith(images.SUFFIXES):
            self.paths.append(path)
        else:
            suffix = os.path.splitext(path)[1]
            self._reject(path, f"not read: the suffix {suffix!r} is no image's" if suffix else "not read: no suffix")

    def _reject(self, path: str, reason: str) -> None:
        printable = path.encode("utf-8", "backslashreplace").decode()
        self.rejects.append((self._id(printable), reason))


def _unfit(item: os.DirEntry, real_root: str) -> str | None:
    """Why a file or folder is not read, or None."""
    try:
        item.name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    if item.is_symlink():
        target = os.path.realpath(item.path)
        if not os.path.exists(target):
            return "a broken link"
        if os.path.commonpath([target, real_root]) != real_root:
            return f"a link that leaves the root: {target}"
        if os.path.isdir(target):
            return "a link to a folder of the root, whose images are read under their own path"
    if not item.is_dir() and not item.is_file():
        return "neither a file nor a folder"
    return None


# -------------------------------------------------------------------------------------------- splits and imbalance

_STREAMS = {"validation": 1, "test": 2, "classes": 3, "imbalance": 4}


def _generator(seed: int, purpose: str) -> np.random.Generator:
    """One stream per purpose: another test share does not draw another validation set."""
    return np.random.Generator(np.random.PCG64([seed, _STREAMS[purpose]]))


def split(listing: Listing, data: DataConfig, seed: int) -> tuple[dict[str, Entries], dict | None]:
    """Entries of "pool", "validation" and "test", and what the imbalance did (None without).

    Shares are of all training images; validation is drawn first, then test, then the rare classes are cut.
    """
    train, taken = listing.train, {}
    left = np.arange(len(train))
    for name in ("validation", "test"):
        share, own = getattr(data, name), getattr(listing, name)
        if share is not None and own is not None:
            where = f"data.{name}_root is given" if data.source == "folder" else f"{data.source} has its own"
            raise UserError(f"data.{name}: nothing to hold out, {where}")
        if share is None:
            taken[name] = own if own is not None else train.take(left[:0])
            continue
        chosen = _hold_out(train, left, share, listing.classes, _generator(seed, name), f"data.{name}")
        taken[name] = train.take(chosen)
        left = np.setdiff1d(left, chosen)
    made = None
    if data.imbalance is not None:
        left, made = _imbalance(train, left, listing.classes, data.imbalance, seed)
    return {"pool": train.take(left)} | taken, made


def _hold_out(
    train: Entries, left: np.ndarray, share: Share, classes: list[str] | None, draw: np.random.Generator, field: str
) -> np.ndarray:
    """Rows out of `left`, the same number of each class; what is over goes to the largest classes, one each."""
    if train.labels is None:
        raise UserError(f"{field}: {share} cannot be taken evenly over classes: the images have no labels")
    count = share if isinstance(share, int) else round(share * len(train))
    if not 0 < count <= len(left):
        raise UserError(f"{field}: {share} is {count} images, expected 1 to {len(left)} (of {len(train)})")
    sizes = np.bincount(train.labels[left], minlength=len(classes))
    quota = np.full(len(classes), count // len(classes))
    quota[np.argsort(-sizes, kind="stable")[: count % len(classes)]] += 1
    for label in np.flatnonzero(sizes < quota):
        raise UserError(f"{field}: class {classes[label]!r} has {sizes[label]} images left, {quota[label]} are needed")
    return np.concatenate(
        [draw.choice(left[train.labels[left] == label], n, replace=False) for label, n in enumerate(quota)]
    )


def _imbalance(
    train: Entries, left: np.ndarray, classes: list[str] | None, wanted: ImbalanceConfig, seed: int
) -> tuple[np.ndarray, dict]:
    """Cut the rare classes, drawn from their union, to round(the others' images / ratio): the paper's program."""
    if train.labels is None:
        raise UserError("data.imbalance: classes cannot be made rare: the images have no labels")
    rare = _rare_classes(wanted, len(classes), seed)
    is_rare = np.isin(train.labels[left], rare)
    others, union = left[~is_rare], left[is_rare]
    count = min(len(union), round(len(others) / wanted.ratio))
    kept = _generator(seed, "imbalance").choice(union, count, replace=False)
    made = {"classes": rare, "rare_before": len(union), "rare_kept": count, "others": len(others)}
    return np.sort(np.concatenate([others, kept])), made


def _rare_classes(wanted: ImbalanceConfig, number: int, seed: int) -> list[int]:
    if wanted.classes is None:
        if wanted.random_classes >= number:
            raise UserError(f"data.imbalance.random_classes: {wanted.random_classes}, expected 1 to {number - 1}")
        drawn = _generator(seed, "classes").choice(number, wanted.random_classes, replace=False)
        return sorted(int(label) for label in drawn)
    for label in wanted.classes:
        if not 0 <= label < number:
            raise UserError(f"data.imbalance.classes: {label} is no class index, expected 0 to {number - 1}")
    if not 0 < len(set(wanted.classes)) < number:
        raise UserError(f"data.imbalance.classes: {wanted.classes}, expected some of the {number} classes, not all")
    return sorted(set(wanted.classes))
