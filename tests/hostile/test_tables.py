"""Parquet files and CSV lists of images that are damaged, of another kind, or made to be misread."""

import os
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypfk import sources
from raypfk.config import ColumnsConfig, DataConfig
from raypfk.stages import pool as pools
from tests.folders import png
from tests.hostile import refusal

pytestmark = pytest.mark.usefixtures("limits")
IMAGES = [png(i) for i in range(4)]


def read(kind: str, path, **fields) -> list[bytes | str]:
    """All that a source at `path` gives; in the way of a build: listed, ids compared, then read."""
    config = DataConfig(source=kind, root=str(path), **fields)
    listing = sources.listing(config)
    splits, _ = sources.split(listing, config, 0)
    pools._refuse_empty(config, listing, splits)
    pools._refuse_same_ids(splits)
    return list(sources.of(config).read(listing.train.keys.to_pylist()))


# --------------------------------------------------------------------------------------------------------- Parquet


def parquet(table: dict | pa.Table, **options) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), sink, **options)
    return sink.getvalue().to_pybytes()


def beside(**columns) -> bytes:
    return parquet({"image": IMAGES, **columns})


def twice(name: str) -> bytes:
    columns = {"image": pa.array(IMAGES), "label": pa.array([0, 1, 0, 1])}
    return parquet(pa.Table.from_arrays([*columns.values(), columns[name]], names=[*columns, name]))


def flipped_page() -> bytes:
    data = bytearray(parquet({"image": IMAGES}, write_page_checksum=True, compression="none", use_dictionary=False))
    data[data.index(IMAGES[1]) + 10] ^= 1
    return bytes(data)


GOOD = parquet({"image": IMAGES})
FOOTER = struct.unpack("<I", GOOD[-8:-4])[0]
WHOLE = r"x\.parquet: expected a whole Parquet file: "
INDICES = "expected class indices from 0 to 999999, or names"

BAD_PARQUET: dict[str, tuple[bytes, str]] = {
    "empty": (b"", WHOLE + "Parquet file size is 0 bytes"),
    "no Parquet": (b"hello" * 50, WHOLE + "Parquet magic bytes not found"),
    "magic and nothing else": (b"PAR1PAR1", WHOLE),
    "cut at the end": (GOOD[:-20], WHOLE),
    "cut in the middle": (GOOD[: len(GOOD) // 2], WHOLE),
    "footer of 2 GiB": (GOOD[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1", WHOLE + ".*footer's .2147483647"),
    "footer of -1 bytes": (GOOD[:-8] + b"\xff\xff\xff\xffPAR1", WHOLE),
    "footer of 3 bytes": (GOOD[:-8] + b"\3\0\0\0PAR1", WHOLE + "Couldn't deserialize thrift"),
    "footer of noise": (GOOD[: -8 - FOOTER] + b"\xff" * FOOTER + GOOD[-8:], WHOLE + "Couldn't deserialize thrift"),
    "encrypted": (GOOD[:-4] + b"PARE", WHOLE + "Could not read encrypted metadata"),
    "a page's checksum": (flipped_page(), WHOLE + "could not verify page integrity"),
    "no image column": (parquet({"pic": IMAGES}), r"no column 'image' \(data\.columns\.image\), found \['pic'\]"),
    "two image columns": (twice("image"), r"x\.parquet: the column 'image' is there 2 times"),
    "two label columns": (twice("label"), r"x\.parquet: the column 'label' is there 2 times"),
    "images of a kind that cannot be picked": (
        parquet({"image": pa.array(IMAGES, pa.binary_view())}), WHOLE + ".*binary_view",
    ),
    "no rows": (parquet({"image": pa.array([], pa.binary())}), "data.root: .*: no images"),
    "id that is null": (beside(key=["a", None, "b", "c"]), r"x\.parquet: row 1: no key"),
    "id that is empty": (beside(key=["a", "", "b", "c"]), "row 1: key: expected one line of text, found ''"),
    "id with a NUL": (beside(key=["a", "b\0", "c", "d"]), r"row 1: key: expected one line of text, found 'b\\x00'"),
    "ids that are one": (beside(key=["a", "a", "b", "c"]), r"two images with the id 'a': '.*x\.parquet#0' and '.*#1'"),
    "ids that are no text": (beside(key=[b"\xff", b"b", b"c", b"d"]), "key: expected text, found bytes .* not UTF-8"),
    "ids that are lists": (beside(key=[[1]] * 4), "key: expected text or whole numbers, found list<"),
    "ids that are no numbers": (beside(key=[float("nan")] * 4), "key: expected text or whole numbers, found double"),
    "labels that are fractions": (beside(label=[0.5] * 4), r"x\.parquet: labels are double, expected class names"),
    "labels that are times": (beside(label=pa.array(range(4), pa.timestamp("s"))), "labels are timestamp"),
    "labels below 0": (beside(label=[0, -1, 1, 2]), f"the label -1, {INDICES}"),
    "labels beyond all classes": (beside(label=[0, 10**15, 1, 2]), f"the label 1000000000000000, {INDICES}"),
    "labels of 64 bits": (beside(label=pa.array([2**64 - 1] * 4, pa.uint64())), f"the label 18446.*, {INDICES}"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PARQUET)
def test_a_bad_parquet_file_is_refused_by_its_name(tmp_path, name):
    """Listed or read, whichever shows it first: the file is named, and the column or row."""
    data, message = BAD_PARQUET[name]
    (tmp_path / "x.parquet").write_bytes(data)
    columns = ColumnsConfig(id="key" if name.startswith("id") else None)
    refusal(lambda: read("parquet", tmp_path / "x.parquet", columns=columns), message, str(tmp_path))


REJECTED = {
    "numbers": ([1, 2], "expected bytes, found int64"),
    "text": (["a", "b"], "expected bytes, found string"),
    "nulls": (pa.array([None, None], pa.binary()), "no image: null"),
    "nulls of no type": (pa.nulls(2), "expected bytes, found null"),
    "structs without bytes": ([{"path": "x"}] * 2, "expected bytes, found struct<path: string>"),
    "structs of numbers": ([{"bytes": 3}] * 2, "expected bytes, found int64"),
    "structs of nothing": (
        pa.array([None, {"bytes": None}], pa.struct([("bytes", pa.binary())])), "no image: null",
    ),
    "lists": ([[1], [2]], "expected bytes, found list<"),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_a_column_that_holds_no_images_gives_rejects(tmp_path, name):
    """Each row says what it has in an image's place."""
    column, reason = REJECTED[name]
    (tmp_path / "x.parquet").write_bytes(parquet({"image": column}))
    found = read("parquet", tmp_path)
    assert len(found) == 2 and all(isinstance(why, str) and why.startswith(reason) for why in found), found


# ------------------------------------------------------------------------------------------------------------ lists

NO_URI = r"list\.csv: no column 'uri' \(data\.columns\.uri\), found "
NO_TEXT = r"list\.csv: expected CSV as UTF-8 text, found a NUL byte at \d+ \(UTF-16, or binary\)"

BAD_LISTS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", NO_URI + r"\[\]"),
    "header only": ("uri,label\n", "data.root: .*: no images"),
    "no header": ("a.png,1\nb.png,2\n", NO_URI + r"\['a.png', '1'\]"),
    "another column": ("path,label\na.png,1\n", NO_URI + r"\['path', 'label'\]"),
    "semicolons": ("uri;label\na.png;1\n", NO_URI + r"\['uri;label'\]"),
    "tabs": ("uri\tlabel\na.png\t1\n", NO_URI + r"\['uri\\tlabel'\]"),
    "a comment first": ("# my list\nuri\na.png\n", NO_URI + r"\['# my list'\]"),
    "a row too short": ("uri,label\na.png,1\nb.png\n", r"list\.csv: expected CSV .* Expected 2 columns, got 1: b\.png"),
    "a row too long": ("uri,label\na.png,1,2\n", "expected CSV .* Expected 2 columns, got 3"),
    "column twice": ("uri,uri\na.png,b.png\n", "the column 'uri' is there 2 times, expected once"),
    "a NUL": ("uri\na\0b.png\n", NO_TEXT),
    "utf-16": ("uri,label\na.png,1\n".encode("utf-16"), NO_TEXT),
    "binary": (bytes(range(256)) * 9, NO_TEXT),
    "latin-1": ("uri\ncaf\xe9.png\n".encode("latin-1"), "expected CSV .* invalid UTF8"),
    "a quote that is not closed": ('uri\n"a.png\nb.png\n', r"row 0: uri: expected one line of text, found 'a\.png\\nb"),
    "a label's quote that is not closed": ('uri,label\na.png,"cat\nb.png,dog\n', "row 0: label: expected one line"),
    "no place": ("uri,label\na.png,1\n,0\n", "row 1: no uri"),
    "one place twice": ("uri\na.png\na.png\n", "two images with the id 'a.png'"),
    "one id twice": ("uri,image_id\na.png,x\nb.png,x\n", "two images with the id 'x'"),
    "unknown scheme": ("uri\ngopher://x/a.png\n", "gopher://x: not a place that can be read or written"),
    "web page": ("uri\nhttps://x.org/a.png\n", "https://x.org: not a place that can be read or written"),
    "s3 with keys": ("uri\ns3://AKIA:SECRET@bucket/a.png\n", "s3://bucket/a.png: .*credentials come from"),
    "web page with a password": ("uri\nhttps://me:SECRET@x.org/a.png\n", "x.org/a.png: expected https://host/path"),
    "s3 without a bucket": ("uri\ns3:///a.png\n", "expected s3://bucket/key"),
    "label below 0": ("uri,label\na.png,-1\nb.png,2\n", f"the label '-1', {INDICES}"),
    "label beyond all classes": ("uri,label\na.png,999999999999\n", f"the label '999999999999', {INDICES}"),
    "label of 5,000 digits": ("uri,label\na.png," + "9" * 5000 + "\n", INDICES),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LISTS)
def test_a_bad_list_is_refused_by_its_name(tmp_path, name):
    """Nothing is guessed; and no key that stands in it is repeated."""
    text, message = BAD_LISTS[name]
    (tmp_path / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "SECRET" not in refusal(lambda: read("manifest", tmp_path / "list.csv"), message)


ODD_LABELS = {
    "NA and null": (["NA", "null", "NaN", ""], ["NA", "NaN", "null"], [0, 2, 1, -1]),
    "numbers among names": (["007", "cat", "7", ""], ["007", "7", "cat"], [0, 2, 1, -1]),
    "digits of other scripts": (["²", "1", "2", "²"], ["1", "2", "²"], [2, 0, 1, 2]),
    "numbers with zeros before": (["00", "01", "2", "0"], ["0", "1", "2"], [0, 1, 2, 0]),
}


@pytest.mark.parametrize("name", ODD_LABELS)
def test_odd_labels_are_names_unless_all_are_numbers(tmp_path, name):
    """A class may be called NA or 007; nothing but an empty field means that there is none."""
    given, classes, expected = ODD_LABELS[name]
    rows = [f"{i}.png,{label}" for i, label in enumerate(given)]
    (tmp_path / "list.csv").write_text("\n".join(["uri,label", *rows]))
    listing = sources.listing(DataConfig(source="manifest", root=str(tmp_path / "list.csv")))
    assert listing.classes == classes and listing.train.labels.tolist() == expected


PLACES = {
    "folder": "a folder",
    "zero": "neither a file nor a folder",
    "pipe": "neither a file nor a folder",
    "loop": "too many levels of symbolic links",
    "film.png": "1,073,741,825 bytes, expected at most 1,073,741,824",
    "nowhere.png": "it is gone since it was listed",
    "a.png/b.png": "not a directory",
    "x" * 5000: "file name too long",
}


def test_places_that_cannot_be_read_say_why(tmp_path):
    """A device without end, a pipe that nobody writes to and a link to itself are rejects; the others go on."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "film.png").touch()
    os.truncate(tmp_path / "film.png", (1 << 30) + 1)  # takes no room
    (tmp_path / "a.png").write_bytes(png(1))
    rows = [f"{place},{i}" for i, place in enumerate(["a.png", *PLACES])]
    (tmp_path / "list.csv").write_text("\n".join(["uri,image_id", *rows]))
    assert read("manifest", tmp_path / "list.csv") == [png(1), *(f"cannot be read: {why}" for why in PLACES.values())]


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/random", "/tmp", "pipe"])
def test_a_list_that_is_no_file_is_never_opened(tmp_path, target):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "list.csv").symlink_to(target)
    message = r"list\.csv: expected a file, found (a folder|neither a file nor a folder)"
    refusal(lambda: read("manifest", tmp_path / "list.csv"), message)


# ------------------------------------------------------------------------------------------------- files of labels

BAD_LABELS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "expected CSV with the columns image_id, label"),
    "no label column": ("image_id,class\na.png,1\n", "expected CSV with the columns image_id, label: .*'label'"),
    "a column twice": ("image_id,label,label\na.png,1,2\n", "the column 'label' is there 2 times"),
    "an id twice": ("image_id,label\na.png,1\na.png,2\n", "image 'a.png' stands there 2 times"),
    "an id missing": ("image_id,label\n,1\n", "row 0: no image_id"),
    "no labels": ("image_id,label\na.png,\n", "no labels"),
    "utf-16": ("image_id,label\na.png,1\n".encode("utf-16"), "expected CSV as UTF-8 text, found a NUL byte"),
    "a label below 0": ("image_id,label\na.png,-1\n", f"the label '-1', {INDICES}"),
    "a label that goes on": ('image_id,label\na.png,"cat\nb.png,dog\n', "row 0: label: expected one line of text"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LABELS)
def test_a_bad_file_of_labels_is_refused_by_its_name(tmp_path, name):
    text, message = BAD_LABELS[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(png(1))
    (tmp_path / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    refusal(lambda: read("folder", tmp_path / "in", labels=str(tmp_path / "labels.csv")), message, "labels.csv: ")


def test_labels_that_are_fractions_are_refused(tmp_path):
    """In Parquet they have a type, and it is said."""
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "labels.parquet").write_bytes(parquet({"image_id": ["a.png"], "label": [0.5]}))
    labels = str(tmp_path / "labels.parquet")
    refusal(lambda: read("folder", tmp_path, labels=labels), r"labels\.parquet: labels are double, expected class")
