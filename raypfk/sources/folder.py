"""A folder of images, local or in an object store."""

import os
import unicodedata
from dataclasses import dataclass

import numpy as np

from raypfk import images, store
from raypfk.errors import UserError
from raypfk.sources.files import Files
from raypfk.sources.listing import Entries, Listing


@dataclass(frozen=True)
class Folder(Files):
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
        pool = Tree(self.root, "data.root")
        given = {"validation": self.validation_root, "test": self.test_root}
        trees = {name: Tree(root, f"data.{name}_root", f"{name}/") for name, root in given.items() if root}
        for tree in trees.values():
            if tree.classes is None:
                raise UserError(f"{tree.field}: {tree.root}: expected one folder per class, found images or nothing")
        classes = next((tree.classes for tree in [pool, *trees.values()] if tree.classes is not None), None)
        listing = Listing(pool.entries(classes), classes=classes)
        for name, tree in trees.items():
            setattr(listing, name, tree.entries(classes))
        listing.rejects = [reject for tree in [pool, *trees.values()] for reject in tree.rejects]
        return listing


class Tree:
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
        keys = [store.join(self.root, path) for path in self.paths]
        if self.classes is None:
            return Entries.by_id(ids, keys)
        if unknown := sorted(set(self.classes) - set(classes)):
            raise UserError(f"{self.field}: {self.root}: unknown class {unknown[0]!r}, expected some of {classes}")
        index = {name: i for i, name in enumerate(classes)}
        labels = [index[i.removeprefix(self.prefix).split("/")[0]] for i in ids]
        return Entries.by_id(ids, keys, np.array(labels, dtype=np.int64))

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
        """Add everything below a remote root."""
        try:
            for entry in store.entries(self.root, recursive=True):
                if not any(part.startswith(".") for part in entry.path.split("/")):
                    self._add(entry.path)
        except OSError as error:
            raise UserError(f"{self.field}: {self.root}: cannot be listed: {error}") from None
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
