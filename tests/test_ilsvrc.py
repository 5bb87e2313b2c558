"""ILSVRC 2012 as people have it: train, val and the devkit; nothing here needs Ray."""

import hashlib
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision.datasets import ImageNet, imagenet

from raypfk.errors import UserError
from raypfk.sources import Entries, Ilsvrc
from raypfk.sources.ilsvrc import DEVKIT, META, TRUTH
from tests.test_sources import only, write_images

SYNSETS = [f"n{1440764 + 977 * i:08d}" for i in range(10)]


def colour(label: int) -> tuple[int, int, int]:
    """What an image of this class shows."""
    return 25 * label, 255 - 25 * label, 40 + 97 * label % 160


def jpeg(label: int, size: tuple[int, int] = (48, 40)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour(label)).save(stream, "JPEG")
    return stream.getvalue()


def write_meta(path: Path, *rows: tuple) -> None:
    """meta.mat of (ILSVRC2012_ID, WNID, num_children), in the devkit's own struct array."""
    first, more = ("ILSVRC2012_ID", "WNID", "words", "gloss"), ("num_children", "children", "wordnet_height")
    fields = (*first, *more, "num_train_images")
    synsets = np.empty((len(rows), 1), [(field, object) for field in fields])
    for i, (number, wnid, children) in enumerate(rows):
        synsets[i, 0] = number, wnid, f"{wnid}, thing", "a thing", children, np.arange(children), 0, 1300
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"synsets": synsets})


def write_ilsvrc(root: Path, train: int = 2, val: int = 20) -> list[int]:
    """The folders and the devkit of ILSVRC 2012, `train` images a synset, `val` flat; gives the classes of val's.

    An ILSVRC2012_ID says nothing of the WNIDs' order, and synsets with children are no classes.
    """
    numbers = np.random.default_rng(5).permutation(len(SYNSETS)) + 1
    leaves = [(int(number), wnid, 0) for number, wnid in zip(numbers, SYNSETS, strict=True)]
    write_meta(root / META, *sorted(leaves), (11, "n00001740", 7), (12, "n00001930", 3))
    for label, wnid in enumerate(SYNSETS):
        (root / "train" / wnid).mkdir(parents=True)
        for i in range(train):
            (root / "train" / wnid / f"{wnid}_{10 * i + 7}.JPEG").write_bytes(jpeg(label))
    shown = [3 * i % len(SYNSETS) for i in range(val)]
    (root / "val").mkdir()
    for i, label in enumerate(shown):
        (root / "val" / f"ILSVRC2012_val_{i + 1:08d}.JPEG").write_bytes(jpeg(label))
    (root / TRUTH).write_text("".join(f"{numbers[label]}\n" for label in shown))
    return shown


def labels_by_name(entries: Entries) -> dict[str, int]:
    return dict(zip(map(os.path.basename, entries.keys.to_pylist()), entries.labels.tolist(), strict=True))


def test_ilsvrc_is_listed_by_the_devkit(tmp_path):
    """train is the pool, val the test set; classes are the sorted WNIDs of the synsets without children."""
    shown = write_ilsvrc(tmp_path)
    source = Ilsvrc(str(tmp_path))
    listing = source.list()
    assert (listing.classes, listing.notes, listing.rejects) == (SYNSETS, [], [])
    assert listing.train.ids.to_pylist() == [f"train/{wnid}/{wnid}_{i}.JPEG" for wnid in SYNSETS for i in (17, 7)]
    assert listing.train.labels.tolist() == np.repeat(np.arange(10), 2).tolist()
    assert listing.test.ids.to_pylist() == [f"val/ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(20)]
    assert listing.test.labels.tolist() == shown and listing.test.labels.dtype == np.int64
    assert listing.validation is None
    assert list(source.read(listing.test.keys.to_pylist())) == [jpeg(label) for label in shown]


def test_ilsvrc_is_labelled_as_torchvision_labels_it(tmp_path, monkeypatch):
    """torchvision's ImageNet, which unpacks the tars, gives each file the same class; so does val in its folders."""
    write_ilsvrc(tmp_path)
    flat = Ilsvrc(str(tmp_path)).list()
    for part, path, name in (("devkit", tmp_path / DEVKIT, DEVKIT), ("val", tmp_path / "val", ".")):
        archive = tmp_path / imagenet.ARCHIVE_META[part][0]
        with tarfile.open(archive, "w:gz" if part == "devkit" else "w") as tar:
            tar.add(path, name)
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setitem(imagenet.ARCHIVE_META, part, (archive.name, md5))
    shutil.rmtree(tmp_path / "val")
    theirs = {part: ImageNet(str(tmp_path), part).samples for part in ("train", "val")}
    assert (tmp_path / "val" / SYNSETS[0]).is_dir()
    for listing in (flat, Ilsvrc(str(tmp_path)).list()):
        for part, entries in (("train", listing.train), ("val", listing.test)):
            assert labels_by_name(entries) == {os.path.basename(path): label for path, label in theirs[part]}


def test_ilsvrc_may_lie_in_an_object_store(s3, tmp_path):
    """Devkit and images are listed and read from s3:// as from a folder."""
    write_ilsvrc(tmp_path, val=5)
    for path in tmp_path.rglob("*.*"):
        s3.client.upload_file(str(path), s3.bucket, f"in/{path.relative_to(tmp_path)}")
    source = Ilsvrc(f"s3://{s3.bucket}/in")
    there, here = source.list(), Ilsvrc(str(tmp_path)).list()
    for mine, theirs in ((there.train, here.train), (there.test, here.test)):
        assert mine.ids == theirs.ids and mine.labels.tolist() == theirs.labels.tolist()
    assert only(source.read([there.test.keys[1].as_py()])) == jpeg(there.test.labels[1])


def test_ilsvrc_rejects_files_and_notes_absent_synsets(tmp_path):
    """What is no image is a reject, by its path below the root; a synset without a folder is still a class."""
    write_ilsvrc(tmp_path)
    shutil.rmtree(tmp_path / "train" / SYNSETS[4])
    (tmp_path / "train" / "n99.tar").write_bytes(b"x")
    (tmp_path / "val" / "README.txt").write_text("x")
    listing = Ilsvrc(str(tmp_path)).list()
    assert [image_id for image_id, _ in listing.rejects] == ["train/n99.tar", "val/README.txt"]
    assert listing.classes == SYNSETS and len(listing.train) == 18
    assert listing.notes == [f"{tmp_path}/train: no folder '{SYNSETS[4]}'; 1 synsets have none"]


def into_folders(root: Path) -> None:
    """val's images in synset folders, two of them exchanged."""
    shown = [SYNSETS[label] for label in labels_by_name(Ilsvrc(str(root)).list().test).values()]
    shown[0], shown[1] = shown[1], shown[0]
    for wnid, path in zip(shown, sorted((root / "val").iterdir()), strict=True):
        (root / "val" / wnid).mkdir(exist_ok=True)
        path.rename(root / "val" / wnid / path.name)


def flat_train(root: Path) -> None:
    shutil.rmtree(root / "train")
    write_images(root / "train", "1.png")


def truth(*lines: object):
    return lambda root: (root / TRUTH).write_text("".join(f"{line}\n" for line in lines))


def meta(*rows: tuple):
    return lambda root: write_meta(root / META, *rows)


def renamed(root: Path) -> None:
    (root / "val/ILSVRC2012_val_00000015.JPEG").rename(root / "val/x.JPEG")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root / DEVKIT), f": expected train, val and {DEVKIT}, unpacked; found no {META}"),
        (lambda root: (root / TRUTH).unlink(), f"unpacked; found no {TRUTH}"),
        (lambda root: shutil.rmtree(root / "train"), "train: no such folder"),
        (flat_train, "train: expected a folder per synset, found images"),
        (lambda root: write_images(root, "train/cat/1.png"), f"train: the folder 'cat' is no synset of .*{META}"),
        (lambda root: write_images(root, "train/n00001740/1.png"), "train: the folder 'n00001740' is no synset"),
        (lambda root: (root / META).write_bytes((root / META).read_bytes()[:300]), f"{META}: expected .*'synsets': "),
        (lambda root: (root / META).write_bytes(b"x" * 500), f"{META}: expected .*'synsets': "),
        (lambda root: scipy.io.savemat(root / META, {"x": 1}), f"{META}: expected .*'synsets': 'synsets'"),
        (lambda root: scipy.io.savemat(root / META, {"synsets": 1}), f"{META}: expected the devkit's struct array"),
        (meta((1, SYNSETS[0], 2)), "ID and a WNID of its own; found 0 without"),
        (meta((1, SYNSETS[0], 0), (1, SYNSETS[1], 0)), "found 2 without children, of 1 IDs and 2 WNIDs"),
        (meta((1, SYNSETS[0], 0), (2, SYNSETS[0], 0)), "found 2 without children, of 2 IDs and 1 WNIDs"),
        (meta((1001, SYNSETS[0], 0)), "IDs 1 to 1000 and WNIDs like n01440764; found 1001 and 'n01440764'"),
        (meta((1, "cat", 0)), "WNIDs like n01440764; found 1 and 'cat'"),
        (truth(*[1] * 19), f"val: expected 19 images, one for each line of .*{TRUTH}, found 20"),
        (truth(*[1] * 21), "val: expected 21 images, .*found 20: 'none' in the place of '.*_00000021'"),
        (truth(1, 2, 0), f"{TRUTH}: line 3: expected an ILSVRC2012_ID of .*{META}, found '0'"),
        (truth(1, 1001), "line 2: expected an ILSVRC2012_ID .*, found '1001'"),
        (truth(11), "line 1: expected an ILSVRC2012_ID .*, found '11'"),
        (truth("\x89PNG\0"), "line 1: expected an ILSVRC2012_ID"),
        (lambda root: shutil.rmtree(root / "val"), "val: no such folder"),
        (renamed, "val: .*, found 20: 'ILSVRC2012_val_00000016' in the place of 'ILSVRC2012_val_00000015'"),
        (into_folders, f"val: 'val/{SYNSETS[0]}/ILSVRC2012_val_00000002.JPEG' is '{SYNSETS[3]}' in .*{TRUTH}"),
    ],
)  # fmt: skip
def test_what_is_not_ilsvrc_is_an_error(damage, message, tmp_path):
    """A message names the file or folder, what was expected there, and what came."""
    write_ilsvrc(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        Ilsvrc(str(tmp_path)).list()
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
