"""Tars, tables and lists of images, on this machine and in S3: what they list, how they are read, what they refuse."""

import io
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypfk import sources, store
from raypfk.config import ColumnsConfig, DataConfig
from raypfk.errors import UserError
from raypfk.sources import UNKNOWN, files
from tests.folders import png


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "in")
    return f"s3://{request.getfixturevalue('s3').bucket}/in"


def listed(kind: str, root: str, **fields):
    """The source of this kind, and its listing."""
    config = DataConfig(source=kind, root=root, **fields)
    return sources.of(config), sources.listing(config)


def read(source, entries) -> list[bytes | str]:
    return list(source.read(entries.keys.to_pylist()))


# ------------------------------------------------------------------------------------------------------------- tars


def tar(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return stream.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_tars_give_their_images_with_the_labels_beside_them(root):
    """Ids are the tar's path and the member's; `.cls` holds the label; other parts of a sample are passed over."""
    samples = [(f"{i:03d}", png(i), f"{i % 2}\n".encode()) for i in range(10)]
    for name, part in (("a/x-000.tar", samples[:6]), ("b.tar", samples[6:])):
        members = [
            m
            for key, image, label in part
            for m in ((f"{key}.png", image), (f"{key}.cls", label), (f"{key}.json", b"{}"))
        ]
        store.write_bytes(store.join(root, name), tar(*members))
    source, listing = listed("webdataset", root)
    assert listing.train.ids.to_pylist() == [
        *(f"a/x-000/{i:03d}.png" for i in range(6)),
        *(f"b/{i:03d}.png" for i in range(6, 10)),
    ]
    assert listing.classes == ["0", "1"] and listing.train.labels.tolist() == [i % 2 for i in range(10)]
    assert listing.rejects == [] and read(source, listing.train) == [image for _, image, _ in samples]
    assert read(source, listing.train.take([3, 7])) == [samples[3][1], samples[7][1]]


def test_a_tars_images_come_in_few_requests(s3):
    members = [(f"{i:04d}.png", png(i)) for i in range(300)]
    store.write_bytes(f"s3://{s3.bucket}/in/x.tar", tar(*members))
    s3.requests.clear()
    source, listing = listed("webdataset", f"s3://{s3.bucket}/in")
    assert read(source, listing.train) == [data for _, data in members]
    assert s3.requests["GET"] <= 5 and listing.classes is None


def test_class_names_are_labels_too_and_may_be_missing(root):
    store.write_bytes(store.join(root, "x.tar"), tar(("1.png", png(1)), ("1.cls", b"cat"), ("2.png", png(2))))
    _, listing = listed("webdataset", store.join(root, "x.tar"))
    assert listing.classes == ["cat"] and listing.train.labels.tolist() == [0, UNKNOWN]
    assert listing.train.ids.to_pylist() == ["x/1.png", "x/2.png"]


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (("../evil.png", b"x"), "a path that leaves the tar"),
        (("a/../../evil.png", b"x"), "a path that leaves the tar"),
        (("a\\..\\evil.png", b"x"), "a path that leaves the tar"),
        (("/etc/evil.png", b"x"), "an absolute path"),
        (("C:/evil.png", b"x"), "an absolute path"),
        (special("link.png", tarfile.SYMTYPE, "/etc/passwd"), "a link to /etc/passwd"),
        (special("hard.png", tarfile.LNKTYPE, "good.png"), "a link to good.png"),
        (special("pipe.png", tarfile.FIFOTYPE), "neither a file nor a folder"),
        (special("disk.png", tarfile.BLKTYPE), "neither a file nor a folder"),
        (("notes.docx", b"x"), "the suffix is no image's"),
        (("good.png", b"again"), "there twice in its tar"),
    ],
)
def test_hostile_members_of_a_tar_are_rejected_and_the_others_go_on(tmp_path, member, reason):
    (tmp_path / "x.tar").write_bytes(tar(("good.png", png(1)), member))
    source, listing = listed("webdataset", str(tmp_path))
    assert read(source, listing.train) == [png(1)]
    ((_, why),) = listing.rejects
    assert reason in why


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a whole tar file"),
        (b"no tar at all" * 100, "expected a whole tar file"),
        (tar(("1.png", png(1) * 50))[:1200], "ends within '1.png'"),
        (tar(("1.png", png(1)), ("1.cls", b"\xff\xfe")), "1.cls: expected a class name or index"),
        (tar(("1.png", png(1)), ("1.cls", b"")), "1.cls: expected a class name or index"),
    ],
)
def test_tars_that_are_none_are_named(root, data, message):
    store.write_bytes(store.join(root, "x.tar"), data)
    with pytest.raises(UserError, match=rf"x\.tar: .*{message}"):
        listed("webdataset", root)


def test_compressed_tars_and_none_at_all_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.root: .*expected \.tar files: none is there"):
        listed("webdataset", str(tmp_path))
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"x\.tar\.gz is compressed and cannot be read in parts"):
        listed("webdataset", str(tmp_path))


# ----------------------------------------------------------------------------------------------------------- tables


def test_rows_of_parquet_files_are_images(root):
    """Without ids, the file's path and the row; any row groups; the label column is found."""
    images = [png(i) for i in range(20)]
    for name, part in (("a.parquet", slice(0, 12)), ("deep/b.parquet", slice(12, 20))):
        table = pa.table({"image": images[part], "label": [i % 3 for i in range(20)][part]})
        store.write_table(store.join(root, name), table, row_group_size=5)
    source, listing = listed("parquet", root)
    assert (
        listing.train.ids.to_pylist()[:2] == ["a/000000", "a/000001"]
        and listing.train.ids.to_pylist()[-1] == "deep/b/000007"
    )
    assert listing.classes == ["0", "1", "2"] and listing.train.labels.tolist() == [i % 3 for i in range(20)]
    assert read(source, listing.train) == images
    assert read(source, listing.train.take([2, 11, 19])) == [images[2], images[11], images[19]]


def test_a_row_group_is_read_once_whatever_the_order_of_the_rows(tmp_path, monkeypatch):
    """Ids as of hashes: rows of two files and many groups in turns, some of them twice."""
    for name in "ab":
        table = pa.table({"image": [png(100 * (name == "b") + i) for i in range(30)]})
        store.write_table(str(tmp_path / f"{name}.parquet"), table, row_group_size=7)
    rows = [("a", 29), ("b", 0), ("a", 3), ("b", 15), ("a", 3), ("b", 29), ("a", 0), ("b", 14)]
    groups, read_group = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda file, i, columns: groups.append(i) or read_group(file, i, columns)
    )
    source, _ = listed("parquet", str(tmp_path))
    found = list(source.read([f"{tmp_path}/{name}.parquet#{row}" for name, row in rows]))
    assert found == [png(100 * (name == "b") + row) for name, row in rows] and groups == [0, 4, 0, 2, 4]


def test_columns_have_the_names_that_are_given(root):
    """Ids of their own need not be in order; images may be structs with `bytes`, as Hugging Face's are."""
    images = [{"bytes": png(i), "path": None} for i in range(4)]
    table = pa.table({"pic": images, "key": ["d", "b", "c", "a"], "kind": ["x", "y", "x", None]})
    store.write_table(store.join(root, "t.parquet"), table)
    source, listing = listed(
        "parquet", store.join(root, "t.parquet"), columns=ColumnsConfig(image="pic", id="key", label="kind")
    )
    assert listing.train.ids.to_pylist() == ["a", "b", "c", "d"] and listing.classes == ["x", "y"]
    assert listing.train.labels.tolist() == [UNKNOWN, 1, 0, 0]
    assert read(source, listing.train) == [png(3), png(1), png(2), png(0)]


@pytest.mark.parametrize(
    ("table", "columns", "message"),
    [
        ({"pixels": [b""]}, {}, r"no column 'image' \(data\.columns\.image\), found \['pixels'\]"),
        ({"image": [b""]}, {"id": "key"}, r"no column 'key' \(data\.columns\)"),
        ({"image": [b""], "key": [None]}, {"id": "key"}, "row 0: no key"),
        ({"image": [b""], "label": [0.5]}, {}, "labels are double, expected class names or indices"),
        ({"image": [b""], "label": [-1]}, {}, "the label -1, expected class indices from 0"),
    ],
)
def test_tables_that_do_not_fit_are_named(tmp_path, table, columns, message):
    store.write_table(str(tmp_path / "t.parquet"), pa.table(table))
    with pytest.raises(UserError, match=message):
        listed("parquet", str(tmp_path), columns=ColumnsConfig(**columns))


def test_rows_without_an_image_say_so(tmp_path):
    store.write_table(str(tmp_path / "t.parquet"), pa.table({"image": [png(0), None]}))
    source, listing = listed("parquet", str(tmp_path))
    assert read(source, listing.train) == [png(0), "no image: null"]
    store.write_table(str(tmp_path / "t.parquet"), pa.table({"image": [3, 4]}))
    assert read(source, listing.train) == ["expected bytes, found int64"] * 2
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"t\.parquet: expected a whole Parquet file"):
        listed("parquet", str(tmp_path))
    (tmp_path / "t.parquet").unlink()
    with pytest.raises(UserError, match=r"expected \.parquet files, none is there"):
        listed("parquet", str(tmp_path))


# ------------------------------------------------------------------------------------------------------------ lists


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_list_names_images_by_place(root, suffix):
    """Relative to the list or whole; ids are the places as they are written, or a column of their own."""
    for i in range(3):
        store.write_bytes(store.join(root, f"pics/{i}.png"), png(i))
    places = ["pics/2.png", store.join(root, "pics/0.png"), "pics/1.png"]
    table = {"uri": places, "label": ["b", "a", "b"], "image_id": ["z", "x", "y"]}
    write_list(store.join(root, "list" + suffix), {name: table[name] for name in ("uri", "label")})
    source, listing = listed("manifest", store.join(root, "list" + suffix))
    assert listing.train.ids.to_pylist() == sorted(places) and listing.classes == ["a", "b"]
    assert sorted(read(source, listing.train)) == sorted(png(i) for i in range(3))
    write_list(store.join(root, "list" + suffix), table)
    source, listing = listed("manifest", store.join(root, "list" + suffix))
    assert listing.train.ids.to_pylist() == ["x", "y", "z"] and listing.train.labels.tolist() == [0, 1, 1]
    assert read(source, listing.train) == [png(0), png(1), png(2)]


def write_list(uri: str, table: dict[str, list]) -> None:
    if uri.endswith(".parquet"):
        store.write_table(uri, pa.table(table))
        return
    lines = [",".join(table), *(",".join(map(str, row)) for row in zip(*table.values(), strict=True))]
    store.write_bytes(uri, "\n".join(lines).encode())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"no column 'uri' \(data\.columns\.uri\), found \[\]"),
        ("path,label\na,1\n", r"no column 'uri' \(data\.columns\.uri\), found \['path', 'label'\]"),
        ("uri,label\na.png,1\n,0\n", "row 1: no uri"),
        ("uri\ngopher://x/a.png\n", "gopher://x: not a place that can be read"),
        ("uri\ns3://key:secret@bucket/a.png\n", "credentials come from the environment"),
        ("uri,label\na.png,1,2\n", "expected CSV with the columns uri, label"),
    ],
)
def test_lists_that_are_none_are_named(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        listed("manifest", str(tmp_path / "list.csv"))
    assert "secret" not in str(refused.value)


def test_what_a_list_names_may_be_gone_or_forbidden(s3):
    """The others go on, each with its reason."""
    for i in range(3):
        store.write_bytes(f"s3://{s3.bucket}/{i}.png", png(i))
    places = [f"s3://{s3.bucket}/{i}.png" for i in range(4)]
    write_list(f"s3://{s3.bucket}/list.csv", {"uri": places})
    source, listing = listed("manifest", f"s3://{s3.bucket}/list.csv")
    s3.choose = lambda method, path: "denied" if "1.png" in path else None
    assert read(source, listing.train) == [
        png(0), "cannot be read: permission denied", png(2), "cannot be read: it is gone since it was listed",
    ]  # fmt: skip


def test_what_is_too_long_to_be_an_image_is_not_read(root, tmp_path, monkeypatch):
    """As a file of its own and in a tar, on this machine and in S3."""
    store.write_bytes(f"{root}/list.csv", f"uri\n{root}/0.png\n{root}/1.png\n".encode())
    store.write_bytes(f"{root}/0.png", png(0))
    store.write_bytes(f"{root}/1.png", png(1) + b"." * 1000)
    monkeypatch.setattr(files, "LONGEST", 500)
    source, listing = listed("manifest", f"{root}/list.csv")
    said = "cannot be read: {:,} bytes, expected at most 500"
    assert read(source, listing.train) == [png(0), said.format(len(png(1)) + 1000)]
    span = files.span_key(f"{root}/1.png", 0, 501)
    assert list(source.read([span])) == [said.format(501)]


# ----------------------------------------------------------------------------------------------------------- labels


def test_labels_join_by_id(root):
    """In place of the source's own; images that the file does not name have none; strange ids are counted."""
    for i in range(4):
        store.write_bytes(store.join(root, f"pics/{i}.png"), png(i))
    labels = {"image_id": ["3.png", "0.png", "9.png", "1.png"], "label": ["dog", "cat", "cat", "dog"]}
    write_list(store.join(root, "labels.csv"), labels)
    _, listing = listed("folder", store.join(root, "pics"), labels=store.join(root, "labels.csv"))
    assert listing.classes == ["cat", "dog"] and listing.train.labels.tolist() == [0, 1, UNKNOWN, 1]
    assert listing.notes == [f"{store.join(root, 'labels.csv')}: 1 of its 4 ids are no image's"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_id,label\na,1\na,2\n", "image 'a' stands there 2 times"),
        ("image_id,label\n", "no labels"),
        ("id,label\na,1\n", "expected CSV with the columns image_id, label"),
    ],
)
def test_files_of_labels_that_do_not_fit_are_named(tmp_path, text, message):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(png(1))
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=rf"labels\.csv: .*{message}|labels\.csv: {message}"):
        listed("folder", str(tmp_path / "in"), labels=str(tmp_path / "labels.csv"))
    with pytest.raises(UserError, match=r"labels\.txt: expected a \.csv or \.parquet file"):
        listed("folder", str(tmp_path / "in"), labels=str(tmp_path / "labels.txt"))
