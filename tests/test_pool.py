"""Building and opening a pool: nothing lost, nothing twice, the same for any shard size, and every refusal."""

import json
import os
import pickle
import re
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from raypfk import lease, sources, store
from raypfk.config import DataConfig, ImbalanceConfig
from raypfk.errors import RunError, UserError
from raypfk.pool import Pool
from raypfk.schema import IMAGES, REJECTS, SPLITS
from raypfk.stages import pool as pools
from raypfk.stages.pool import build
from tests.folders import folder, ids_of, png, tree

DATA = Path(os.environ.get("RAYPFK_DATA") or Path(__file__).parents[2] / "shared" / "data")
IMAGENET = DATA / "imagenet-samples"


@pytest.fixture(scope="module")
def built(ray_session, tmp_path_factory) -> Pool:
    """24 images less 4 for validation and 2 for test, in shards of 5."""
    tmp = tmp_path_factory.mktemp("pool")
    return build(folder(tree(tmp / "in"), validation=4, test=2), str(tmp / "pool"), seed=0)


def test_every_image_is_in_exactly_one_split_or_in_the_rejects(ray_session, tmp_path):
    """24 good images, 1 cut off, 1 empty, 1 text file, 1 enormous: 24 + 4, each with its reason."""
    root = tree(tmp_path / "in")
    (root / "cat/cut.png").write_bytes(png(5)[:-30])
    (root / "cat/empty.png").write_bytes(b"")
    (root / "dog/notes.txt").write_text("x")
    (root / "dog/wide.png").write_bytes(png(1, (3000, 2)))
    pool = build(folder(root, max_pixels=5000), str(tmp_path / "pool"), 0)
    rejects = dict(
        zip(*store.read_table(f"{pool.uri}/rejects.parquet", schema=REJECTS).to_pydict().values(), strict=True)
    )
    assert list(rejects) == ["cat/cut.png", "cat/empty.png", "dog/notes.txt", "dog/wide.png"]
    assert rejects["cat/empty.png"] == "empty file"
    assert rejects["dog/wide.png"] == "3000x2 pixels, more than max_pixels=5000"
    assert pool.rows("pool") == len(set(ids_of(pool))) == 24
    assert not set(rejects) & set(ids_of(pool))
    assert pool.manifest["rejects"] == 4


def test_shards_are_in_the_order_of_ids_and_hold_the_bytes(built):
    """Shard k's ids are all less than shard k+1's; the image column is the file, byte for byte."""
    ids = ids_of(built)
    assert ids == sorted(ids)
    assert [s.name for s in built.shards("pool")] == [f"{i:05d}.parquet" for i in range(4)]
    for shard in built.shards("pool"):
        table = built.read_shard(shard)
        assert table.schema.equals(IMAGES)
        assert (table["image_id"][0].as_py(), table["image_id"][-1].as_py()) == (shard.first_id, shard.last_id)
        assert shard.rows <= 5
        for row in table.to_pylist():
            file = Path(built.manifest["source"]["root"]) / row["image_id"]
            assert row["image"] == file.read_bytes()
            assert (row["width"], row["height"]) == (6, 5)
            assert row["label"] == ("cat", "dog").index(row["image_id"].split("/")[0])
        (file,) = shard.files
        assert store.sha256(store.read_bytes(file.uri)) == file.sha256


def test_manifest_says_what_the_pool_is(built):
    """Counts, classes, image size, settings; the marker of a build in progress is gone."""
    manifest = json.loads(Path(built.uri, "manifest.json").read_text())
    assert manifest["format_version"] == 2
    assert manifest["source"]["kind"] == "folder"
    assert manifest["classes"] == built.classes == ["cat", "dog"]
    assert manifest["image"] == {"channels": 3, "width": 6, "height": 5}
    assert manifest["splits"]["validation"]["label_histogram"] == {"cat": 2, "dog": 2}
    assert [built.rows(split) for split in SPLITS] == [18, 4, 2]
    assert built.num_classes == 2
    found = sorted(path.name for path in Path(built.uri).iterdir() if not path.name.startswith("."))
    assert found == ["manifest.json", "pool", "rejects.parquet", "test", "validation"]


def test_image_column_is_not_compressed_again(built):
    """JPEG and PNG do not shrink; a dictionary of them would only cost memory."""
    column = pq.ParquetFile(built.shards("pool")[0].uri).metadata.row_group(0).column(1)
    assert (column.path_in_schema, column.compression) == ("image", "UNCOMPRESSED")
    assert not any("DICTIONARY" in encoding for encoding in column.encodings)


def test_fingerprint_and_splits_do_not_depend_on_shard_size(ray_session, built, tmp_path):
    """Shards of 5 or of 100: the same images, in the same order, with the same fingerprint."""
    root = Path(built.manifest["source"]["root"])
    other = build(folder(root, validation=4, test=2, shard_rows=100), str(tmp_path / "p"), 0)
    assert len(other.shards("pool")) == 1
    assert [ids_of(other, s) for s in SPLITS] == [ids_of(built, s) for s in SPLITS]
    assert other.fingerprint == built.fingerprint


def test_fingerprint_changes_with_an_image_a_label_and_a_split(ray_session, built, tmp_path):
    """One pixel, one image moved to another class, another seed: another pool."""
    fingerprints = {built.fingerprint}
    root = tree(tmp_path / "in")
    fingerprints.add(build(folder(root, validation=4, test=2), str(tmp_path / "seed"), 1).fingerprint)
    (root / "cat/000.png").write_bytes(png(999))
    fingerprints.add(build(folder(root, validation=4, test=2), str(tmp_path / "pixel"), 0).fingerprint)
    assert len(fingerprints) == 3


def test_grey_pool_has_one_channel_and_mixed_sizes_are_null(ray_session, tmp_path):
    """channels is 1 only if every image is greyscale; a size is given only if all have it."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(png(1, (6, 5), "L"))
    (tmp_path / "in/b.png").write_bytes(png(2, (7, 5), "L"))
    pool = build(folder(tmp_path / "in"), str(tmp_path / "p"), 0)
    assert pool.manifest["image"] == {"channels": 1, "width": None, "height": None}
    assert pool.classes is None
    assert pool.num_classes == 0
    assert pool.manifest["splits"]["pool"]["label_histogram"] is None
    assert pool.read_shard(pool.shards("pool")[0], ["label"])["label"].to_pylist() == [None, None]


def test_imbalance_is_recorded(ray_session, tmp_path):
    """digits with 5..9 rare by 10: the counts of the paper's program, in pool and manifest."""
    data = DataConfig(
        source="digits", validation=100, test=200, imbalance=ImbalanceConfig(ratio=10.0, classes=[5, 6, 7, 8, 9])
    )
    pool = build(data, str(tmp_path / "p"), 0)
    histogram = pool.manifest["splits"]["pool"]["label_histogram"]
    others = sum(histogram[str(c)] for c in range(5))
    assert sum(histogram[str(c)] for c in range(5, 10)) == round(others / 10)
    assert pool.manifest["imbalance"]["classes"] == [5, 6, 7, 8, 9]
    assert set(pool.manifest["splits"]["validation"]["label_histogram"].values()) == {10}
    assert pool.manifest["image"] == {"channels": 1, "width": 8, "height": 8}


def test_rejected_validation_image_is_a_reject_too(ray_session, tmp_path):
    """A bad image of another split is not in it, and its id says where it was."""
    tree(tmp_path / "in", 2)
    tree(tmp_path / "val", 2)
    (tmp_path / "val/cat/bad.png").write_bytes(b"no")
    pool = build(folder(tmp_path / "in", validation_root=str(tmp_path / "val")), str(tmp_path / "p"), 0)
    assert pool.rows("validation") == 4
    assert store.read_table(f"{pool.uri}/rejects.parquet")["image_id"].to_pylist() == ["validation/cat/bad.png"]


def test_the_end_of_a_build_is_said(ray_session, tmp_path, capsys):
    """The last line names the pool and counts its images and rejects."""
    build(folder(tree(tmp_path / "in", 6)), str(tmp_path / "p"), 0)
    said = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path / "p") in said and "pool 12" in said and "0 rejected" in said


# -------------------------------------------------------------------------------------------- again, and refusals


def test_finished_pool_is_returned_and_not_built_again(built, monkeypatch):
    """The same source, seed and settings: nothing is listed or written."""
    monkeypatch.setattr(pools.sources, "of", lambda data: pytest.fail("built again"))
    data = folder(Path(built.manifest["source"]["root"]), validation=4, test=2)
    assert build(data, built.uri, 0) == built


@pytest.mark.parametrize(
    ("fields", "seed", "message"),
    [
        ({}, 1, "seed: 0 there, 1 now"),
        ({"validation": 6}, 0, r"data\.validation: 4 there, 6 now"),
        ({"shard_rows": 7}, 0, r"data\.shard_rows: 5 there, 7 now"),
        ({"root": "/elsewhere"}, 0, r"data\.root: .* there, '/elsewhere' now"),
    ],
)
def test_another_pool_is_refused(built, fields, seed, message):
    """The error names the field that differs and both values."""
    fields = {"root": built.manifest["source"]["root"], "validation": 4, "test": 2} | fields
    with pytest.raises(UserError, match=f"holds another pool: {message}"):
        build(folder(**fields), built.uri, seed)


def test_half_a_build_is_built_again(ray_session, built, tmp_path):
    """Of another source's half a pool nothing is trusted; what it left is gone, and the pool is the undisturbed one."""
    dest = tmp_path / "p"
    (dest / "pool").mkdir(parents=True)
    store.write_json(str(dest / "building/begun.json"), {})
    (dest / "pool/00099.parquet").write_bytes(b"half")
    pool = build(folder(Path(built.manifest["source"]["root"]), validation=4, test=2), str(dest), 0)
    assert pool.fingerprint == built.fingerprint
    assert not (dest / "pool/00099.parquet").exists()


def test_failed_build_leaves_no_manifest_and_can_be_tried_again(ray_session, tmp_path):
    """All images bad: an error, no manifest; with a good image the same command succeeds."""
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"pool: all 1 images are rejected, the first: a\.png: not an image"):
        build(folder(root), str(tmp_path / "p"), 0)
    with pytest.raises(UserError, match=r"manifest\.json is missing \(its build was not finished\)"):
        Pool.open(str(tmp_path / "p"))
    (root / "b.png").write_bytes(png())
    assert build(folder(root), str(tmp_path / "p"), 0).rows("pool") == 1


def test_trouble_that_is_no_images_fault_stops_the_build(ray_session, tmp_path, monkeypatch):
    """A disk that fails (also when tried again) is an error that names the shard; the images are not rejected."""

    class Broken(sources.Folder):
        def read(self, keys):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(pools.sources, "of", lambda data: Broken(data.root))
    with pytest.raises(RunError, match=r"pool/00000\.parquet: OSError: .*Input/output error"):
        build(folder(tree(tmp_path / "in", 2)), str(tmp_path / "p"), 0)


def test_who_lost_the_lease_writes_no_more_files(ray_session, tmp_path, monkeypatch):
    """Another has built the pool meanwhile, of what its source had then."""
    dest = tmp_path / "p"

    def lost(uri):
        raise lease.Lost(f"{uri}: held by another")

    monkeypatch.setattr(pools.lease, "check", lost)
    with pytest.raises(lease.Lost):
        build(folder(tree(tmp_path / "in")), str(dest), 0)
    assert not (dest / "pool").exists() and not (dest / "manifest.json").exists()


def test_file_that_vanishes_is_a_reject(ray_session, tmp_path, monkeypatch):
    """Listed, but gone when its turn comes: in the rejects with the reason, and the others go on."""

    class Hidden(sources.Folder):
        def read(self, keys):
            return super().read([key.replace("dog/001", "dog/gone") for key in keys])

    monkeypatch.setattr(pools.sources, "of", lambda data: Hidden(data.root))
    pool = build(folder(tree(tmp_path / "in", 3)), str(tmp_path / "p"), 0)
    (reject,) = store.read_table(f"{pool.uri}/rejects.parquet").to_pylist()
    assert reject["image_id"] == "dog/001.png" and "gone since" in reject["reason"]


def test_a_build_that_was_broken_off_goes_on(ray_session, tmp_path):
    """Files that are done stay as they are; those that were not, and one whose images are others now, are written."""
    root = tree(tmp_path / "in")
    (root / "dog/011.png").write_bytes(b"bad")  # in the last file
    dest = tmp_path / "p"
    with pytest.raises(UserError, match="more than data.max_rejects"):
        build(folder(root, max_rejects=0), str(dest), 0)
    done = [path.stem.removeprefix("pool-") + ".parquet" for path in (dest / "building").glob("pool-*.json")]
    before = {name: (dest / "pool" / name).stat().st_mtime_ns for name in done}  # one half done is written again
    assert set(before) - {"00004.parquet"}
    (root / "dog/010.png").unlink()
    (root / "dog/011.png").write_bytes(png(77))
    pool = build(folder(root), str(dest), 0)
    after = {path.name: path.stat().st_mtime_ns for path in (dest / "pool").iterdir()}
    assert all(after[name] == before[name] for name in set(before) - {"00004.parquet"})
    assert not (dest / "building").exists() and len(ids_of(pool)) == 23
    assert pool.fingerprint == build(folder(root), str(tmp_path / "undisturbed"), 0).fingerprint


def test_too_many_rejects_stop_the_build_with_a_summary(ray_session, tmp_path):
    """40 images, 12 of them bad in two ways: the limit, the kinds and an example of each; allowed, they pass."""
    root = tree(tmp_path / "in", 20)
    for i in range(12):
        (root / f"dog/{i:03d}.png").write_bytes(b"" if i < 8 else b"GIF, or not")
    with pytest.raises(UserError) as error:
        build(folder(root), str(tmp_path / "p"), 0)
    said = str(error.value)
    assert re.search(r"1[12] of 40 images are rejected, more than data\.max_rejects \(0\.1\) allows", said)
    assert re.search(r"\d x 'empty file', as dog/00\d\.png: empty file", said)  # the first one found
    assert "x 'not an image in a known format" in said
    pool = build(folder(root, max_rejects=0.5), str(tmp_path / "p"), 0)
    assert (pool.rows("pool"), pool.manifest["rejects"]) == (28, 12)
    with pytest.raises(UserError, match="max_rejects \\(11\\) allows"):
        build(folder(root, max_rejects=11), str(tmp_path / "other"), 0)


@pytest.mark.parametrize("stranger", ["thesis.docx", "pool/mine.parquet"])
def test_other_folders_are_refused_and_left_alone(tmp_path, stranger):
    """A folder that is not a pool, even one with a sub-folder of a split's name, is never written to."""
    (tmp_path / "p" / stranger).parent.mkdir(parents=True)
    (tmp_path / "p" / stranger).write_text("mine")
    with pytest.raises(UserError, match="not empty and not a pool"):
        build(folder(tree(tmp_path / "in", 2)), str(tmp_path / "p"), 0)
    assert (tmp_path / "p" / stranger).read_text() == "mine"


def test_destination_that_is_a_file_is_an_error(tmp_path):
    """A file in the place of the folder."""
    (tmp_path / "p").write_text("x")
    with pytest.raises(UserError, match="expected a folder to build a pool in"):
        build(folder(tree(tmp_path / "in", 2)), str(tmp_path / "p"), 0)


def test_pool_inside_its_source_is_an_error(tmp_path):
    """The next listing would find the shards."""
    with pytest.raises(UserError, match=r"cannot be built inside its own source, data\.root"):
        build(folder(tree(tmp_path / "in", 2)), str(tmp_path / "in/pool"), 0)


@pytest.mark.parametrize("field", ["root", "validation_root", "test_root", "labels"])
def test_keys_in_a_uri_are_refused_before_they_are_shown(tmp_path, capsys, field):
    data = folder(tmp_path).model_copy(update={field: "s3://key:secret@bucket/x"})
    with pytest.raises(UserError, match="s3://bucket/x: expected s3://bucket/key"):
        build(data, str(tmp_path / "p"), 0)
    assert "secret" not in capsys.readouterr().err


def test_empty_source_is_an_error(tmp_path):
    """No images at all; and none but rejects, of which the first is named. Nothing is left behind."""
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=r"data\.root: .*/in: no images"):
        build(folder(tmp_path / "in"), str(tmp_path / "p"), 0)
    (tmp_path / "in/a.txt").write_text("x")
    with pytest.raises(UserError, match=r"no images; 1 rejected, the first: a\.txt: not read"):
        build(folder(tmp_path / "in"), str(tmp_path / "p"), 0)
    assert not [path for path in (tmp_path / "p").iterdir() if not path.name.startswith(".")]


def test_holding_out_everything_is_an_error(tmp_path):
    """A pool without images is no pool."""
    with pytest.raises(UserError, match="take all 4 images, the pool is empty"):
        build(folder(tree(tmp_path / "in", 2), validation=4), str(tmp_path / "p"), 0)


def test_two_files_with_one_id_are_an_error(tmp_path):
    """é composed and é decomposed are two files and one id: both are named, distinguishably."""
    (tmp_path / "in").mkdir()
    names = [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")]
    for name in names:
        (tmp_path / "in" / name).write_bytes(png())
    if len(list((tmp_path / "in").iterdir())) < 2:
        pytest.skip("this file system keeps one of the two names only")
    with pytest.raises(UserError, match=r"two images with the id 'é\.png'.*") as error:
        build(folder(tmp_path / "in"), str(tmp_path / "p"), 0)
    assert all(ascii(name)[1:-1] in str(error.value) for name in names)


def test_same_id_in_two_splits_is_an_error(tmp_path):
    """A class that is called validation, and a validation tree with the same file: one id, two images."""
    for path in ("in/validation/cat/1.png", "in/cat/1.png", "val/cat/1.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(png())
    with pytest.raises(UserError, match=r"two images with the id 'validation/cat/1\.png'"):
        build(folder(tmp_path / "in", validation_root=str(tmp_path / "val")), str(tmp_path / "p"), 0)


# ------------------------------------------------------------------------------------------------------- opening


def test_open_errors(tmp_path):
    """No folder, no manifest, JSON of something else, another version: each is said, with the path."""
    with pytest.raises(UserError, match=r"no pool here: manifest\.json is missing"):
        Pool.open(str(tmp_path / "nowhere"))
    for content, message in (
        ("{", "expected JSON"),
        ("[1]", "not the manifest of a pool"),
        ('{"a": 1}', "not the manifest of a pool"),
        ('{"format_version": 99, "fingerprint": ""}', "format_version 99, expected 2"),
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=message):
            Pool.open(str(tmp_path))


def test_damaged_shards_are_named(ray_session, tmp_path):
    """Truncated, another file, flipped bits, absent: the error names the shard."""
    pool = build(folder(tree(tmp_path / "in", 4)), str(tmp_path / "p"), 0)
    first, second = pool.shards("pool")
    path = Path(first.uri)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"00000\.parquet: expected a whole Parquet file"):
        pool.read_shard(first)
    path.write_bytes(Path(second.uri).read_bytes())
    with pytest.raises(UserError, match=r"00000\.parquet: 3 images, but the manifest says 5"):
        pool.read_shard(first)
    position = whole.index(b"IHDR")
    path.write_bytes(whole[:position] + b"XXXX" + whole[position + 4 :])
    with pytest.raises(UserError, match=r"00000\.parquet: expected a whole Parquet file"):
        pool.read_shard(first)
    path.unlink()
    with pytest.raises(UserError, match=r"00000\.parquet: no such file"):
        pool.read_shard(first, ["image_id"])


def test_labels_of_gives_the_hidden_labels(built):
    """Any order of ids, over all shards; an id outside is an error that names it, whether between or beyond."""
    ids = ids_of(built)[::-3]
    labels = built.labels_of(ids)
    assert set(labels) == set(ids)
    assert all(label == int(i.startswith("dog")) for i, label in labels.items())
    assert built.labels_of([]) == {}
    for stranger in ("aaa", "cat/000.png~", "zzz", ids_of(built, "validation")[0]):
        with pytest.raises(UserError, match=f"no image '{stranger}' in the pool"):
            built.labels_of([ids[0], stranger])


def test_labels_of_an_unlabelled_pool_is_an_error(ray_session, tmp_path):
    """The simulated oracle knows nothing here."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(png())
    pool = build(folder(tmp_path / "in"), str(tmp_path / "p"), 0)
    with pytest.raises(UserError, match=r"image 'a\.png' has no label"):
        pool.labels_of(["a.png"])


def test_locate_gives_the_shards_of_ids_in_order(built):
    """Each shard once, in the order of the pool."""
    shards = built.shards("pool")
    assert built.locate([shards[2].last_id, shards[0].first_id, shards[2].first_id]) == [shards[0], shards[2]]


def test_pool_is_picklable(built):
    """Tasks and actors get it by value."""
    assert pickle.loads(pickle.dumps(built)) == built


@pytest.mark.skipif(not IMAGENET.exists(), reason=f"no ImageNet samples at {IMAGENET} (set RAYPFK_DATA)")
def test_real_imagenet_files(ray_session, tmp_path):
    """200 real JPEGs, flat: all are in, sizes mixed, colour."""
    pool = build(folder(IMAGENET, shard_rows=64), str(tmp_path / "p"), 0)
    assert (pool.rows("pool"), pool.manifest["rejects"]) == (200, 0)
    assert pool.manifest["image"] == {"channels": 3, "width": None, "height": None}
    widths = np.concatenate([pool.read_shard(s, ["width"])["width"].to_numpy() for s in pool.shards("pool")])
    assert widths.min() > 10


# ------------------------------------------------------------------------------------------------------ by reference


def test_a_pool_by_reference_holds_places_and_no_images(ray_session, tmp_path):
    """The same ids, splits and labels as of copied images, none of which is read; another fingerprint."""
    root = tree(tmp_path / "in")
    (root / "cat/cut.png").write_bytes(b"no image")
    copied = build(folder(root, validation=4, test=2), str(tmp_path / "copied"), 0)
    held = build(folder(root, validation=4, test=2, by_reference=True), str(tmp_path / "held"), 0)
    assert held.by_reference and not copied.by_reference and held.fingerprint != copied.fingerprint
    assert set(ids_of(held)) | set(ids_of(held, "validation")) | set(ids_of(held, "test")) >= set(ids_of(copied))
    table = held.read_shard(held.shards("pool")[0])
    assert table.schema.names == ["image_id", "uri", "label"]
    assert list(held.images(table)) == [Path(uri).read_bytes() for uri in table["uri"].to_pylist()]
    assert held.manifest["image"] == {"channels": None, "width": None, "height": None}
    assert build(folder(root, validation=4, test=2, by_reference=True), held.uri, 0).fingerprint == held.fingerprint


def test_images_without_a_label_are_pool_only(ray_session, tmp_path):
    """A file of labels that leaves some out: no histogram, and no such image in a validation set."""
    root = tree(tmp_path / "in", 3)
    (tmp_path / "labels.csv").write_text("image_id,label\ncat/000.png,a\ndog/001.png,b\n")
    data = folder(root, labels=str(tmp_path / "labels.csv"))
    pool = build(data, str(tmp_path / "pool"), 0)
    assert pool.classes == ["a", "b"] and pool.manifest["splits"]["pool"]["label_histogram"] is None
    assert pool.labels_of(["dog/001.png"]) == {"dog/001.png": 1}
    with pytest.raises(UserError, match="image 'cat/001.png' has no label"):
        pool.labels_of(["cat/001.png"])
    held_out = build(folder(root, labels=data.labels, validation=2), str(tmp_path / "held"), 0)
    assert sorted(ids_of(held_out, "validation")) == ["cat/000.png", "dog/001.png"]
    with pytest.raises(UserError, match=r"validation: image 'validation/.*' has no label; 6 have none"):
        build(folder(root, labels=data.labels, validation_root=str(root)), str(tmp_path / "none"), 0)
