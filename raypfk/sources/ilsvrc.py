"""ImageNet's ILSVRC 2012 as people have it: the folders train and val, and the devkit, which says what val shows."""

import io
import os
import re
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from raypfk import store
from raypfk.errors import UserError
from raypfk.sources.files import Files
from raypfk.sources.folder import Tree
from raypfk.sources.listing import Entries, Listing

DEVKIT = "ILSVRC2012_devkit_t12"
META, TRUTH = f"{DEVKIT}/data/meta.mat", f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt"
CLASSES = 1000


@dataclass(frozen=True)
class Ilsvrc(Files):
    """A folder, local or s3://, with train (a folder per synset), val (flat as its tar unpacks, or in such folders)
    and the devkit, unpacked.

    The pool is train, the test set val, with the labels of the devkit's ground truth. Classes are the WNIDs of all the
    devkit's synsets without children, sorted: indices are those of torchvision's ImageNet and ImageFolder. Files are
    listed and rejected as in `Folder`; ids are paths below the root.
    """

    root: str

    def list(self) -> Listing:
        meta, truth = (self._of_devkit(name) for name in (META, TRUTH))
        synsets = _synsets(meta)
        shown = _shown(truth, synsets, meta)
        classes = sorted(synsets.values())
        train, val = (Tree(store.join(self.root, part), "data.root", f"{part}/") for part in ("train", "val"))
        if train.classes is None:
            raise UserError(f"data.root: {train.root}: expected a folder per synset, found images or nothing")
        for tree in (train, val):
            if strange := sorted(set(tree.classes or ()) - set(classes)):
                raise UserError(f"data.root: {tree.root}: the folder {strange[0]!r} is no synset of {meta}")
        test = _checked(val, classes, shown, truth)
        absent = sorted(set(classes) - set(train.classes))
        notes = [f"{train.root}: no folder {absent[0]!r}; {len(absent):,} synsets have none"] if absent else []
        return Listing(train.entries(classes), None, test, classes, train.rejects + val.rejects, notes)

    def _of_devkit(self, name: str) -> str:
        uri = store.join(self.root, name)
        if not store.exists(uri):
            raise UserError(f"data.root: {self.root}: expected train, val and {DEVKIT}, unpacked; found no {name}")
        return uri


def _synsets(uri: str) -> dict[str, str]:
    """WNIDs of the synsets without children by ILSVRC2012_ID, read as torchvision's `parse_devkit_archive` does."""
    from scipy.io import loadmat

    expected = f"{uri}: expected the devkit's struct array 'synsets'"
    data = store.read_bytes(uri)
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(data), squeeze_me=True, variable_names=["synsets"])["synsets"])
        leaves = synsets[[int(children) == 0 for children in synsets["num_children"]]]
        found = [(int(number), str(wnid)) for number, wnid in leaves[["ILSVRC2012_ID", "WNID"]]]
    except Exception as error:  # whatever a parser makes of a damaged file
        raise UserError(f"{expected}: {' '.join(str(error).split()) or type(error).__name__}") from None
    for number, wnid in found:
        if not 1 <= number <= CLASSES or not re.fullmatch("n[0-9]{8}", wnid):
            raise UserError(f"{expected}, IDs 1 to {CLASSES} and WNIDs like n01440764; found {number} and {wnid!r}")
    by_number, wnids = {str(number): wnid for number, wnid in found}, {wnid for _, wnid in found}
    if not found or not len(found) == len(by_number) == len(wnids):
        came = f"{len(found)} without children, of {len(by_number)} IDs and {len(wnids)} WNIDs"
        raise UserError(f"{expected}, each of an ID and a WNID of its own; found {came}")
    return by_number


def _shown(uri: str, synsets: dict[str, str], meta: str) -> list[str]:
    """The WNID of each of val's images, in the order of their numbers."""
    lines = [line.strip() for line in store.read_bytes(uri).decode("utf-8", "replace").strip().splitlines()]
    for number, line in enumerate(lines, 1):
        if line not in synsets:
            raise UserError(f"{uri}: line {number}: expected an ILSVRC2012_ID of {meta}, found {line[:60]!r}")
    return [synsets[line] for line in lines]


def _checked(val: Tree, classes: list[str], shown: list[str], truth: str) -> Entries:
    """val's images with the labels of the ground truth. UserError unless there is one for each line of it, and where
    they lie in folders these agree."""
    entries, index = val.entries(classes), {wnid: i for i, wnid in enumerate(classes)}
    names = [os.path.splitext(os.path.basename(i))[0] for i in entries.ids.to_pylist()]
    labels = {f"ILSVRC2012_val_{number:08d}": index[wnid] for number, wnid in enumerate(shown, 1)}
    for came, wanted in zip_longest(sorted(names), labels, fillvalue="none"):
        if came != wanted:
            where = f"data.root: {val.root}: expected {len(labels):,} images, one for each line of {truth}"
            raise UserError(f"{where}, found {len(names):,}: {came!r} in the place of {wanted!r}")
    found = np.array([labels[name] for name in names], np.int64)
    if entries.labels is not None and (wrong := np.flatnonzero(entries.labels != found)).size:
        first = entries.ids[wrong[0]].as_py()
        raise UserError(f"data.root: {val.root}: {first!r} is {classes[found[wrong[0]]]!r} in {truth}")
    return Entries(entries.ids, entries.keys, found)
