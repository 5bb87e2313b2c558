"""What can become a pool: listings, ids, splits and imbalance; nothing here needs Ray."""

import hashlib
import io
import os
import pickle
import shutil
import tarfile
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10, SVHN, ImageNet, imagenet

from raypfk import images, sources
from raypfk.config import DataConfig, ImbalanceConfig
from raypfk.errors import UserError
from raypfk.sources import Arrays, Entries, Folder, Ilsvrc, Listing, split
from raypfk.sources.ilsvrc import DEVKIT, META, TRUTH

DATA = Path(os.environ.get("RAYPFK_DATA") or Path(__file__).parents[2] / "shared" / "data")
MNIST = DATA / "mnist"


def write_images(root: Path, *paths: str) -> None:
    for i, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        stream = io.BytesIO()
        Image.new("RGB", (6, 5), (i * 9 % 256, 0, 0)).save(stream, "PNG")
        (root / path).write_bytes(stream.getvalue())


def labelled(*sizes: int) -> Listing:
    """sizes[c] images of class c, their order shuffled."""
    labels = np.random.default_rng(3).permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int64)
    ids = [f"{i:06d}" for i in range(len(labels))]
    return Listing(Entries(ids, ids, labels), classes=[f"c{i}" for i in range(len(sizes))])


def only(items):
    (item,) = items
    return item


def config(**fields) -> DataConfig:
    return DataConfig(**({"source": "folder", "root": "/data"} | fields))


# ------------------------------------------------------------------------------------------------------- folder


def test_class_folders_give_sorted_ids_and_labels(tmp_path):
    """The class is the first folder, however deep the image lies; classes and ids are sorted."""
    write_images(tmp_path, "dog/b.png", "dog/a/z.PNG", "cat/1.jpeg", "ant/x.webp")
    listing = Folder(str(tmp_path)).list()
    assert listing.classes == ["ant", "cat", "dog"]
    assert listing.train.ids.to_pylist() == ["ant/x.webp", "cat/1.jpeg", "dog/a/z.PNG", "dog/b.png"]
    assert listing.train.labels.tolist() == [0, 1, 2, 2]
    assert listing.train.labels.dtype == np.int64
    assert (
        only(Folder(str(tmp_path)).read([listing.train.keys.to_pylist()[1]])) == (tmp_path / "cat/1.jpeg").read_bytes()
    )


def test_flat_folder_has_no_labels(tmp_path):
    """Images directly in the root are a pool without labels and classes."""
    write_images(tmp_path, "b.png", "a.png")
    listing = Folder(str(tmp_path)).list()
    assert (listing.train.ids.to_pylist(), listing.train.labels, listing.classes) == (["a.png", "b.png"], None, None)


def test_ids_are_the_same_for_another_order_of_listing(tmp_path, monkeypatch):
    """The order in which the file system lists a folder changes nothing."""
    write_images(tmp_path, *(f"{c}/{i}.png" for c in "ba" for i in (3, 1, 2)))
    first = Folder(str(tmp_path)).list()
    scan = os.scandir

    class Reversed:
        def __init__(self, path):
            self.items = sorted(scan(path), key=lambda item: item.name, reverse=True)

        def __enter__(self):
            return iter(self.items)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    second = Folder(str(tmp_path)).list()
    assert first.train.ids.to_pylist() == second.train.ids.to_pylist()
    assert first.train.labels.tolist() == second.train.labels.tolist()


def test_every_file_is_read_or_rejected_with_a_reason(tmp_path):
    """Other suffixes, no suffix, broken and escaping links, links to folders, fifos: rejects; hidden: ignored."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    write_images(root, "a/1.png", "a/2.png")
    write_images(outside, "secret.png")
    (root / "a/notes.txt").write_text("x")
    (root / "README").write_text("x")
    (root / ".DS_Store").write_text("x")
    (root / ".git").mkdir()
    write_images(root, ".git/hidden.png")
    (root / "a/out.png").symlink_to(outside / "secret.png")
    (root / "outdir").symlink_to(outside)
    (root / "a/again").symlink_to(root / "a")
    (root / "a/broken.png").symlink_to(root / "nothing.png")
    (root / "a/inside.png").symlink_to(root / "a/1.png")
    os.mkfifo(root / "a/pipe.png")
    listing = Folder(str(root)).list()
    assert listing.train.ids.to_pylist() == ["a/1.png", "a/2.png", "a/inside.png"]
    assert listing.classes == ["a"]
    reasons = dict(listing.rejects)
    assert reasons.pop("a/notes.txt") == "not read: the suffix '.txt' is no image's"
    assert reasons.pop("README") == "not read: no suffix"
    assert "leaves the root" in reasons.pop("a/out.png")
    assert "leaves the root" in reasons.pop("outdir")
    assert "read under their own path" in reasons.pop("a/again")
    assert reasons.pop("a/broken.png") == "a broken link"
    assert reasons.pop("a/pipe.png") == "neither a file nor a folder"
    assert not reasons


def test_name_that_is_not_utf8_is_rejected(tmp_path):
    """It could not be an id in a Parquet file; the reject's id shows the byte."""
    write_images(tmp_path, "a/1.png")
    Path(os.fsdecode(os.fsencode(str(tmp_path / "a")) + b"/caf\xe9.png")).write_bytes(b"x")
    listing = Folder(str(tmp_path)).list()
    assert listing.train.ids.to_pylist() == ["a/1.png"]
    assert listing.rejects == [("a/caf\\udce9.png", "its name is not UTF-8")]


def test_ids_and_classes_are_nfc(tmp_path):
    """A name typed on macOS (decomposed) and on Linux (composed) gives one id; the file is read under its own name."""
    name = unicodedata.normalize("NFD", "é")
    write_images(tmp_path, f"{name}/{name}.png")
    listing = Folder(str(tmp_path)).list()
    assert listing.train.ids.to_pylist() == [unicodedata.normalize("NFC", "é/é.png")]
    assert listing.classes == [unicodedata.normalize("NFC", "é")]
    assert only(Folder(str(tmp_path)).read([listing.train.keys.to_pylist()[0]]))


def test_images_beside_class_folders_are_an_error(tmp_path):
    """Neither flat nor a class tree: the error names one of each."""
    write_images(tmp_path, "cat/1.png", "stray.png")
    with pytest.raises(UserError, match=r"data\.root: .*found both: 'stray.png' and 'cat'/"):
        Folder(str(tmp_path)).list()


def test_absent_root_is_an_error(tmp_path):
    """The error names the field and the folder."""
    with pytest.raises(UserError, match=r"data\.root: .*/nowhere: no such folder"):
        Folder(str(tmp_path / "nowhere")).list()


def test_validation_and_test_roots_share_the_classes(tmp_path):
    """A subset of the classes is fine, labels are the pool's indices, ids say which tree they are from."""
    write_images(tmp_path, "t/a/1.png", "t/b/1.png", "v/b/1.png", "e/a/1.png", "e/b/2.png")
    listing = Folder(*(str(tmp_path / name) for name in "tve")).list()
    assert listing.classes == ["a", "b"]
    assert (listing.validation.ids.to_pylist(), listing.validation.labels.tolist()) == (["validation/b/1.png"], [1])
    assert (listing.test.ids.to_pylist(), listing.test.labels.tolist()) == (["test/a/1.png", "test/b/2.png"], [0, 1])


def test_class_without_pool_images_counts(tmp_path):
    """An empty class folder is a class: what the pool's bias lost, validation may still ask for."""
    write_images(tmp_path, "t/day/1.png", "v/night/1.png")
    (tmp_path / "t/night").mkdir()
    listing = Folder(str(tmp_path / "t"), str(tmp_path / "v")).list()
    assert listing.classes == ["day", "night"]
    assert listing.validation.labels.tolist() == [1]


def test_unknown_class_of_validation_is_an_error(tmp_path):
    """The error names field and class."""
    write_images(tmp_path, "t/a/1.png", "v/zebra/1.png")
    with pytest.raises(UserError, match=r"data\.validation_root: .*unknown class 'zebra', expected some of \['a'\]"):
        Folder(str(tmp_path / "t"), str(tmp_path / "v")).list()


def test_flat_validation_root_is_an_error(tmp_path):
    """The trusted images need labels."""
    write_images(tmp_path, "t/a/1.png", "v/1.png")
    with pytest.raises(UserError, match=r"data\.validation_root: .*expected one folder per class"):
        Folder(str(tmp_path / "t"), str(tmp_path / "v")).list()


def test_flat_pool_takes_its_classes_from_validation(tmp_path):
    """Unlabelled pool, labelled validation and test: the usual case of a user."""
    write_images(tmp_path, "t/1.png", "v/a/1.png", "v/b/1.png", "e/b/1.png")
    listing = Folder(*(str(tmp_path / name) for name in "tve")).list()
    assert listing.classes == ["a", "b"]
    assert listing.train.labels is None
    assert listing.test.labels.tolist() == [1]


def test_folder_may_lie_in_an_object_store(s3):
    """An s3:// root is listed and read like a local one, whatever characters its keys have; one request an image."""
    for key in ("in/dog ü%41/2.png", "in/cat/1.png", "in/cat/.hidden.png", "in/cat/a.txt"):
        s3.client.put_object(Bucket=s3.bucket, Key=key, Body=key.encode())
    source = Folder(f"s3://{s3.bucket}/in")
    listing = source.list()
    assert listing.classes == ["cat", "dog ü%41"]
    assert listing.train.ids.to_pylist() == ["cat/1.png", "dog ü%41/2.png"]
    assert listing.rejects == [("cat/a.txt", "not read: the suffix '.txt' is no image's")]
    s3.requests.clear()
    assert list(source.read(listing.train.keys.to_pylist())) == [b"in/cat/1.png", "in/dog ü%41/2.png".encode()]
    assert s3.requests == {"GET": 2}


# ---------------------------------------------------------------------------------------------------- data sets


def test_digits_are_whole_and_scaled_to_255():
    """1,797 grey 8 x 8 images; 16 levels spread over 0..255; ids are the index."""
    source = Arrays("digits", None)
    listing = source.list()
    assert listing.train.ids.to_pylist()[:2] == ["train/00000", "train/00001"]
    assert listing.train.ids.to_pylist() == sorted(listing.train.ids.to_pylist())
    assert Counter(listing.train.labels.tolist())[3] == 183
    assert listing.test is None
    pixels = images.decode(only(source.read(["train/00000"])), None, 10**6)
    assert pixels.shape == (1, 8, 8)
    assert pixels[0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0, times 255/16


def write_svhn(root: Path, monkeypatch, **counts: int) -> None:
    root.mkdir(exist_ok=True)
    for part, count in counts.items():
        pixels = np.random.default_rng(count).integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]  # 1..10, and 10 is the digit 0
        pixels[:16, :16] = labels.T * 20  # what an image shows
        path = root / f"{part}_32x32.mat"
        scipy.io.savemat(path, {"X": pixels, "y": labels}, do_compression=True)
        trust(monkeypatch, part, path)


def trust(monkeypatch, part: str, path: Path) -> None:
    """torchvision checks the md5 of the true files; this one shall pass as one of them."""
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(SVHN.split_list, part, ["", path.name, md5])


def test_svhn_joins_train_and_extra_in_the_order_of_ids(tmp_path, monkeypatch):
    """The pool is train and extra; the digit 0 is class 0; pixels come back as they were."""
    write_svhn(tmp_path, monkeypatch, train=12, extra=15, test=11)
    source = Arrays("svhn", str(tmp_path))
    listing = source.list()
    assert listing.train.ids.to_pylist() == sorted(listing.train.ids.to_pylist())
    assert Counter(i.split("/")[0] for i in listing.train.ids.to_pylist()) == {"train": 12, "extra": 15}
    digits = [(i + 1) % 10 for i in range(15)]
    assert listing.train.labels.tolist() == digits + digits[:12] and listing.classes == list("0123456789")
    assert listing.test.labels.tolist() == digits[:11]
    assert listing.notes == []
    mat = scipy.io.loadmat(tmp_path / "extra_32x32.mat")["X"]
    pixels = images.decode(only(source.read(["extra/00007"])), None, 10**6)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), mat[..., 7])


def test_svhn_without_extra_says_so(tmp_path, monkeypatch):
    """extra is optional, and its absence is noted for the manifest."""
    write_svhn(tmp_path, monkeypatch, train=12, test=11)
    listing = Arrays("svhn", str(tmp_path)).list()
    assert len(listing.train) == 12
    assert "no extra_32x32.mat" in listing.notes[0]


def test_corrupt_svhn_is_an_error(tmp_path, monkeypatch):
    """torchvision checks the md5 of the true files; ours cannot pass as them."""
    write_svhn(tmp_path, monkeypatch, train=3, test=3)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"expected SVHN as torchvision keeps it .*, whole: test: .*corrupted"):
        Arrays("svhn", str(tmp_path)).list()


def a_flipped_byte(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


def other_labels(**arrays) -> bytes:
    stream = io.BytesIO()
    scipy.io.savemat(stream, {"X": np.zeros((32, 32, 3, 3), np.uint8)} | arrays)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-100], "could not read"),
        (a_flipped_byte, "incorrect data check"),
        (lambda data: b"<html>404</html>" * 9, "Unknown mat file type"),
        (lambda data: other_labels(), "'y'"),
        (lambda data: other_labels(y=np.ones((2, 1), np.uint8)), "3 images but 2 labels"),
    ],
)
@pytest.mark.parametrize("part", ["train", "extra", "test"])
def test_a_damaged_mat_file_is_an_error(part, damage, message, tmp_path, monkeypatch):
    """Also one whose md5 is right: the root, the part and what the reader makes of it are named."""
    write_svhn(tmp_path, monkeypatch, train=3, extra=4, test=5)
    path = tmp_path / f"{part}_32x32.mat"
    path.write_bytes(damage(path.read_bytes()))
    trust(monkeypatch, part, path)
    with pytest.raises(UserError, match=rf"^{tmp_path}: expected SVHN .*, whole: {part}: .*{message}"):
        Arrays("svhn", str(tmp_path)).list()


def write_cifar(root: Path, monkeypatch) -> None:
    folder = root / CIFAR10.base_folder
    folder.mkdir()

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(seed: int) -> dict:
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": [(seed + i) % 10 for i in range(4)]}

    train = [[f"data_batch_{i}", write(f"data_batch_{i}", batch(i))] for i in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", write("test_batch", batch(9))]])
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    md5 = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})


def test_cifar10_is_read_in_its_true_format(tmp_path, monkeypatch):
    """Five pickled batches of planes; class names from the meta file."""
    write_cifar(tmp_path, monkeypatch)
    source = Arrays("cifar10", str(tmp_path))
    listing = source.list()
    assert listing.train.ids.to_pylist()[:2] == ["train/00000", "train/00001"]
    assert (len(listing.train), len(listing.test)) == (20, 4)
    assert listing.classes[3] == "cat"
    assert listing.train.labels[:5].tolist() == [1, 2, 3, 4, 2]
    planes = np.random.default_rng(2).integers(0, 256, (4, 3072), dtype=np.uint8)[1].reshape(3, 32, 32)
    assert np.array_equal(images.decode(only(source.read(["train/00005"])), None, 10**6).numpy(), planes)


@pytest.mark.parametrize("name", ["mnist", "svhn", "cifar10"])
def test_absent_data_set_is_an_error(name, tmp_path):
    """The error names the root and the files expected there; nothing is downloaded."""
    with pytest.raises(UserError, match=f"{tmp_path}: expected .*as torchvision keeps it"):
        Arrays(name, str(tmp_path)).list()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not MNIST.exists(), reason=f"no MNIST at {MNIST} (set RAYPFK_DATA)")
def test_real_mnist():
    """60,000 training and 10,000 test images with the known counts and the known first digit, a 5."""
    source = Arrays("mnist", str(MNIST))
    listing = source.list()
    assert (len(listing.train), len(listing.test)) == (60_000, 10_000)
    assert np.bincount(listing.train.labels).tolist()[:3] == [5923, 6742, 5958]
    assert listing.test.ids.to_pylist()[17] == "test/00017"
    pixels = images.decode(only(source.read(["train/00000"])), None, 10**6)
    assert (pixels.shape, listing.train.labels[0], int(pixels.sum())) == ((1, 28, 28), 5, 27525)


@pytest.mark.skipif(not MNIST.exists(), reason=f"no MNIST at {MNIST} (set RAYPFK_DATA)")
def test_truncated_mnist_is_an_error(tmp_path):
    """A file cut off is named with its data set, not shown as an assertion of torchvision."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (MNIST / "MNIST/raw").iterdir():
        (raw / path.name).write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{tmp_path}: expected MNIST"):
        Arrays("mnist", str(tmp_path)).list()


# ------------------------------------------------------------------------------------------------------- ILSVRC

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


# -------------------------------------------------------------------------------------------- splits and imbalance


def test_same_seed_same_split_and_another_seed_another():
    """The seed alone decides what is held out and what is cut."""
    listing = labelled(50, 60, 70)
    data = config(validation=30, test=0.1, imbalance=ImbalanceConfig(ratio=10.0, classes=[2]))
    one, again, other = (split(listing, data, seed)[0] for seed in (0, 0, 1))
    assert all(one[name].ids.to_pylist() == again[name].ids.to_pylist() for name in one)
    assert all(one[name].ids.to_pylist() != other[name].ids.to_pylist() for name in one)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(8, 30), min_size=2, max_size=6), st.integers(1, 12), st.integers(0, 99))
def test_held_out_is_even_disjoint_and_complete(sizes, count, seed):
    """Classes differ by one image at most, no image is in two splits, none is lost; ids stay sorted."""
    listing = labelled(*sizes)
    splits, _ = split(listing, config(validation=count, test=2), seed)
    taken = np.bincount(splits["validation"].labels, minlength=len(sizes))
    assert taken.sum() == count
    assert taken.max() - taken.min() <= 1
    ids = [i for entries in splits.values() for i in entries.ids.to_pylist()]
    assert sorted(ids) == listing.train.ids.to_pylist()
    assert all(entries.ids.to_pylist() == sorted(entries.ids.to_pylist()) for entries in splits.values())


def test_share_is_of_all_training_images_and_validation_does_not_depend_on_test():
    """0.2 of 200 is 40; asking for a test set as well leaves the validation set as it was."""
    listing = labelled(100, 100)
    alone, _ = split(listing, config(validation=0.2), 5)
    both, _ = split(listing, config(validation=0.2, test=0.2), 5)
    assert len(alone["validation"]) == len(both["test"]) == 40
    assert alone["validation"].ids.to_pylist() == both["validation"].ids.to_pylist()


def test_imbalance_counts():
    """Rare images are cut to (all the others' images) / ratio, drawn from their union; the rest is untouched."""
    splits, made = split(
        labelled(1000, 1000, 1000, 1000), config(imbalance=ImbalanceConfig(ratio=100.0, classes=[2, 3])), 0
    )
    counts = np.bincount(splits["pool"].labels, minlength=4)
    assert counts[:2].tolist() == [1000, 1000]
    assert counts[2:].sum() == 20
    assert made == {"classes": [2, 3], "rare_before": 2000, "rare_kept": 20, "others": 2000}


def test_imbalance_never_adds_images():
    """A ratio that is met already cuts nothing."""
    splits, made = split(labelled(50, 10), config(imbalance=ImbalanceConfig(ratio=2.0, classes=[1])), 0)
    assert len(splits["pool"]) == 60
    assert made["rare_kept"] == 10


def test_random_rare_classes_are_drawn_by_the_seed():
    """As many as asked for, recorded, the same for the same seed."""
    listing, wanted = labelled(*[20] * 10), config(imbalance=ImbalanceConfig(ratio=10.0, random_classes=5))
    made = [split(listing, wanted, seed)[1]["classes"] for seed in (0, 0, 1, 2)]
    assert made[0] == made[1] == sorted(set(made[0]))
    assert all(len(classes) == 5 for classes in made)
    assert len({tuple(classes) for classes in made}) > 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"validation": 25}, r"data\.validation: class 'c1' has 5 images left, 12 are needed"),
        ({"validation": 8, "test": 8}, r"data\.test: class 'c1' has 1 images left, 4 are needed"),
        ({"validation": 100}, r"data\.validation: 100 is 100 images, expected 1 to 35 \(of 35\)"),
        ({"validation": 0.001}, r"data\.validation: 0.001 is 0 images"),
        ({"imbalance": ImbalanceConfig(ratio=2.0, classes=[2])}, r"data\.imbalance\.classes: 2 is no class index"),
        ({"imbalance": ImbalanceConfig(ratio=2.0, classes=[-1])}, r"data\.imbalance\.classes: -1 .* 0 to 1"),
        ({"imbalance": ImbalanceConfig(ratio=2.0, classes=[0, 1])}, r"data\.imbalance\.classes: .*not all"),
        ({"imbalance": ImbalanceConfig(ratio=2.0, classes=[])}, r"data\.imbalance\.classes: \[\]"),
        ({"imbalance": ImbalanceConfig(ratio=2.0, random_classes=2)}, r"data\.imbalance\.random_classes: 2"),
    ],
)
def test_impossible_splits_are_errors(fields, message):
    """Each names its dotted field, what was asked for and what there is."""
    with pytest.raises(UserError, match=message):
        split(labelled(30, 5), config(**fields), 0)


@pytest.mark.parametrize("field", ["validation", "test", "imbalance"])
def test_labels_are_needed(field):
    """Nothing can be taken evenly over classes, or made rare, without labels."""
    listing = Listing(Entries(["a", "b"], ["a", "b"]))
    value = ImbalanceConfig(ratio=2.0, classes=[0]) if field == "imbalance" else 1
    with pytest.raises(UserError, match=rf"data\.{field}: .*no labels"):
        split(listing, config(**{field: value}), 0)


def test_split_of_its_own_is_not_held_out_too():
    """Two answers to one question are refused, not silently ranked."""
    listing = labelled(20, 20)
    listing.test = listing.train
    with pytest.raises(UserError, match=r"data\.test: nothing to hold out, mnist has its own"):
        split(listing, DataConfig(source="mnist", root="/x", test=2), 0)


def test_sources_are_small_and_picklable():
    """They travel to every task: names and roots only."""
    for data in (config(validation_root="/v"), config(source="ilsvrc"), DataConfig(source="digits")):
        source = sources.of(data)
        assert len(pickle.dumps(source)) < 500
        assert pickle.loads(pickle.dumps(source)) == source
