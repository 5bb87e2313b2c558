"""A pool whose source has got more images: what is new is added, what is there stays."""

import os
from pathlib import Path

import pytest

from raypfk import store
from raypfk.config import DataConfig
from raypfk.errors import UserError
from raypfk.pool import Pool
from raypfk.stages.pool import build
from raypfk.verify import verify
from tests.folders import folder, ids_of, png, tree


def grow(root: Path, pool: Pool, **fields) -> Pool:
    return build(folder(root, **{"validation": 4, "test": 2} | fields), pool.uri, 0, grow=True)


def everything(pool: Pool) -> list[dict]:
    """All of the split "pool", row by row, as its shards have it."""
    return [row for shard in pool.shards("pool") for row in pool.read_shard(shard).to_pylist()]


@pytest.mark.parametrize("by_reference", [False, True])
def test_a_pool_grows_by_what_is_new(ray_session, tmp_path, by_reference):
    """New images before, within, between and behind what is there: written alone, in order, as if all had been there.

    Twice; what was held out stays held out; one bad image is rejected once; files that are there are not touched.
    """
    root, dest = tree(tmp_path / "in"), str(tmp_path / "p")
    first = build(folder(root, validation=4, test=2, by_reference=by_reference), dest, 0)
    held = ids_of(first, "validation") + ids_of(first, "test")
    stamps = {file.uri: os.stat(file.uri).st_mtime_ns for file in first.files("pool")}
    for round_, names in enumerate((("ant", "cat", "dog"), ("cat", "eel"))):
        for name in names:
            for i in range(3 + 4 * round_):
                path = root / ("cat" if name in ("ant", "cat") else "dog") / f"{name}-{round_}-{i}.png"
                path.write_bytes(png(1000 * round_ + 10 * i + len(name)))
        (root / "dog/bad.png").write_bytes(b"bad")
        (root / "dog/notes.txt").write_text("x")
        pool = grow(root, first, by_reference=by_reference)
    assert {uri: os.stat(uri).st_mtime_ns for uri in stamps} == stamps
    assert ids_of(pool, "validation") + ids_of(pool, "test") == held
    ids = ids_of(pool)
    assert ids == sorted(ids) and all(shard.rows <= 10 for shard in pool.shards("pool"))
    assert sum(len(file.uri) > 0 for file in pool.files("pool")) > len(first.files("pool"))
    on_disk = {str(path.relative_to(root)) for path in root.rglob("*.png")} - set(held)
    assert set(ids) == on_disk - (set() if by_reference else {"dog/bad.png"})
    rejects = store.read_table(f"{dest}/rejects.parquet")["image_id"].to_pylist()
    assert sorted(rejects) == (["dog/notes.txt"] if by_reference else ["dog/bad.png", "dog/notes.txt"])
    names = {shard.name for shard in pool.shards("pool")}
    assert len(names) == len(pool.shards("pool")) and verify(dest) == []
    assert pool.labels_of(["cat/ant-0-1.png", "dog/eel-1-2.png"]) == {"cat/ant-0-1.png": 0, "dog/eel-1-2.png": 1}
    if not by_reference:
        for row in everything(pool):
            assert row["image"] == (root / row["image_id"]).read_bytes()


def test_a_pool_grown_is_the_pool_built_at_once(ray_session, tmp_path):
    """The same rows in the same order, the same fingerprint and histogram."""
    root = tree(tmp_path / "in", 4)
    first = build(folder(root), str(tmp_path / "p"), 0)
    tree(root, 30)
    grown = grow(root, first, validation=None, test=None)
    at_once = build(folder(root), str(tmp_path / "other"), 0)
    assert everything(grown) == everything(at_once) and len(everything(grown)) == 60
    assert grown.fingerprint == at_once.fingerprint != first.fingerprint
    assert grown.manifest["splits"]["pool"]["label_histogram"] == {"cat": 30, "dog": 30}
    assert grown.manifest["image"] == at_once.manifest["image"]


def test_the_pool_before_it_grew_is_still_there(ray_session, tmp_path):
    """A run that was begun then goes on with the images of then."""
    root = tree(tmp_path / "in")
    first = build(folder(root, validation=4, test=2), str(tmp_path / "p"), 0)
    rows = everything(first)
    tree(root, 20)
    grown = grow(root, first)
    then = Pool.open(grown.uri).as_of(first.fingerprint, "a run was begun on")
    assert then.manifest == first.manifest and everything(then) == rows
    with pytest.raises(UserError, match="a run was begun on the pool ffffffffffff, but .* is the pool"):
        grown.as_of("f" * 64, "a run was begun on")


def test_nothing_new_changes_nothing(ray_session, tmp_path, capsys):
    root = tree(tmp_path / "in")
    first = build(folder(root, validation=4, test=2), str(tmp_path / "p"), 0)
    manifest = Path(first.uri, "manifest.json").read_bytes()
    assert grow(root, first) == first and Path(first.uri, "manifest.json").read_bytes() == manifest
    assert "nothing new" in capsys.readouterr().err
    digits = build(DataConfig(source="digits", validation=20), str(tmp_path / "digits"), 0)
    assert build(DataConfig(source="digits", validation=20), digits.uri, 0, grow=True) == digits
    assert "digits does not grow" in capsys.readouterr().err


def test_a_new_class_does_not_fit_in_an_old_pool(ray_session, tmp_path):
    root = tree(tmp_path / "in")
    first = build(folder(root, validation=4, test=2), str(tmp_path / "p"), 0)
    (root / "ant").mkdir()
    (root / "ant/1.png").write_bytes(png(9))
    with pytest.raises(UserError, match=r"the class 'ant' is new, expected some of \['cat', 'dog'\]"):
        grow(root, first)
    assert Pool.open(first.uri) == first


def test_growing_that_was_broken_off(ray_session, tmp_path):
    """The pool stays what it was until it has grown; the same command again ends with the undisturbed one."""
    root = tree(tmp_path / "in")
    first = build(folder(root, validation=4, test=2), str(tmp_path / "p"), 0)
    tree(root, 30)
    (root / "dog/029.png").write_bytes(b"bad")
    with pytest.raises(UserError, match="max_rejects"):
        grow(root, first, max_rejects=0)
    assert Pool.open(first.uri) == first and len(ids_of(first)) == 18
    assert (Path(first.uri) / "building").exists()
    (root / "dog/029.png").write_bytes(png(59))
    grown = grow(root, first)
    assert len(ids_of(grown)) == 54 and verify(grown.uri) == []
