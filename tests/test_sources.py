"""What can become a pool: listings, ids, splits and imbalance; nothing here needs Ray."""

import hashlib
import io
import os
import pickle
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10, SVHN

from raypfk import images, sources
from raypfk.config import DataConfig, ImbalanceConfig
from raypfk.errors import UserError
from raypfk.sources import Arrays, Entries, Folder, Listing, split

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
