"""Images that kill their process, or never end: found, rejected with their reason, and the others go on."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from raypfk import isolated, loop, store
from raypfk.config import DataConfig
from raypfk.errors import UserError
from raypfk.images import BadImage
from raypfk.run import Run
from raypfk.schema import SELECTION
from raypfk.stages import train
from raypfk.stages.pool import build
from tests import tiny

ROOT = Path(__file__).parent.parent
POISON = {"SEGFAULT": "kills the process: signal 11", "HANG": "takes more than 3 s"}


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------- decoding, apart


def test_a_child_decodes_as_this_process_does(tmp_path):
    """A mark that is there sends images to a child; pixels and reasons are the same, and the mark goes."""
    rng, mark = np.random.default_rng(0), str(tmp_path / "mark")
    encoded = [png(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)) for _ in range(3)] + [b"no image", "not read"]
    for how in ({"max_pixels": 1000}, {"size": 4, "resize": 5, "channels": 1, "max_pixels": 1000}):
        here = list(isolated.decoded(encoded, how, mark))
        assert not store.exists(mark)
        store.write_bytes(mark, b"")
        child = list(isolated.decoded(encoded, how, mark))
        assert not store.exists(mark)
        for a, b in zip(here, child, strict=True):
            assert str(a) == str(b) if isinstance(a, BadImage) else torch.equal(a, b)


def test_a_mark_stays_where_the_work_does_not_end(tmp_path):
    mark = str(tmp_path / "mark")
    work = isolated.decoded([png(np.zeros((4, 4), np.uint8))] * 2, {"max_pixels": 100}, mark)
    next(work)
    assert store.exists(mark)
    work.close()
    assert store.exists(mark)


@pytest.fixture
def poisoned(monkeypatch):
    """In children of this process, and of no other, the words kill."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests" / "poison"), str(ROOT)]))
    monkeypatch.setenv("RAYPFK_DECODE_SECONDS", "3")
    monkeypatch.setattr(isolated, "SECONDS", 3)


def test_what_kills_the_child_is_known_and_the_next_image_has_another(poisoned, tmp_path):
    mark, good = str(tmp_path / "mark"), png(np.zeros((4, 4), np.uint8))
    store.write_bytes(mark, b"")
    encoded = [good, good + b"SEGFAULT", good, good + b"HANG", good + b"MEMORY", good]
    found = [str(x) if isinstance(x, BadImage) else "good" for x in isolated.decoded(encoded, {"max_pixels": 99}, mark)]
    assert found == [
        "good", "decoding it kills the process: signal 11", "good", "decoding it takes more than 3 s",
        "decoding it takes more than 8 GiB", "good",
    ]  # fmt: skip


def test_a_child_that_dies_between_two_images_blames_neither():
    good, how = png(np.zeros((4, 4), np.uint8)), {"max_pixels": 99}
    with isolated._Child() as child:
        first = child.decode(good, how)
        child._process.kill()
        child._process.wait()
        assert torch.equal(child.decode(good, how), first)


def test_an_image_that_finds_no_memory_here_is_given_to_a_child(monkeypatch):
    good, how = png(np.zeros((4, 4), np.uint8)), {"max_pixels": 99}
    (expected,) = isolated.decoded([good], how, None)

    def full(data, how):
        raise MemoryError

    monkeypatch.setattr(isolated, "_decode", full)
    (found,) = isolated.decoded([good], how, None)
    assert torch.equal(found, expected)


# --------------------------------------------------------------------------------------------------- a whole run


def test_a_run_goes_on_past_poison(poisoned, tmp_path):
    """A pool by reference: no image is looked at before extraction. Its run ends; the poison is in the rejects."""
    _digits(tmp_path / "in")
    _raypfk(
        "pool", "build", str(tmp_path / "in"), str(tmp_path / "pool"), "--validation", "60", "--test", "30",
        "--shard-rows", "32", "--by-reference",
    )  # fmt: skip
    references = [
        row
        for path in store.paths(str(tmp_path / "pool/pool"), ".parquet")
        for row in store.read_table(path, ["image_id", "uri"]).to_pylist()
    ]
    for row, word in zip((references[5], references[-3]), POISON, strict=True):
        with open(row["uri"], "ab") as stream:
            stream.write(word.encode())
    tree = tiny.config(data={"pool": str(tmp_path / "pool")}, image={"size": 16, "resize": 16, "channels": 1})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree.model_dump()))
    _raypfk("run", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"))
    folder = str(tmp_path / "run/rounds/001/rejects/pool")
    rejects = {
        r["image_id"]: r["reason"] for p in store.paths(folder, ".parquet") for r in store.read_table(p).to_pylist()
    }
    assert set(rejects) == {references[5]["image_id"], references[-3]["image_id"]}
    for row, reason in zip((references[5], references[-3]), POISON.values(), strict=True):
        assert reason in rejects[row["image_id"]]
    assert store.names(folder, ".trying") == []
    _raypfk("verify", str(tmp_path / "run"))


def test_too_many_bad_images_stop_a_stage_with_a_summary(ray_session, tmp_path):
    """A third of a pool by reference went bad: extraction stops, each time, and goes on where `max_rejects` allows it,
    or where what was bad is mended. No bad image is chosen, nor drawn at random beside."""
    _digits(tmp_path / "in")
    data = DataConfig(
        source="folder", root=str(tmp_path / "in"), validation=60, test=30, shard_rows=32, by_reference=True
    )
    pool = build(data, str(tmp_path / "pool"), 0)
    uri_of = {row["image_id"]: row["uri"] for s in pool.shards("pool") for row in pool.read_shard(s).to_pylist()}
    uris = list(uri_of.values())
    whole = [Path(uri).read_bytes() for uri in uris[::3]]
    trusted = [row["uri"] for s in pool.shards("validation") for row in pool.read_shard(s).to_pylist()]
    for uri in [*uris[::3], *trusted[:2]]:
        Path(uri).write_bytes(b"")
    tree = {"data": {"pool": pool.uri}, "image": {"size": 16, "resize": 16, "channels": 1}, "elsewhere": {"share": 0.5}}
    run = tiny.begin(tiny.config(**tree), tmp_path / "run")
    for _ in range(2):
        with pytest.raises(UserError, match=r"of 210 images are rejected, more than data.max_rejects .*empty file"):
            loop.do_stage(run, 1, "extract")
    allowed = tiny.config(**tree | {"data": {"pool": pool.uri, "max_rejects": 0.5}})
    run = Run.create_or_open(allowed, run.uri, pool)
    loop.do_stage(run, 1, "extract")
    assert run.done(1, "extract")["rejected"] == len(uris[::3]) == 70
    assert run.done(1, "extract")["validation_rejected"] == 2
    for stage in ("score", "acquire"):
        loop.do_stage(run, 1, stage)
    chosen = run.read(run.round(1).selection, SELECTION)["image_id"].to_pylist()
    assert len(chosen) == 12 and not {uri_of[image_id] for image_id in chosen} & set(uris[::3])
    run = tiny.begin(tiny.config(**tree), tmp_path / "mended")
    with pytest.raises(UserError, match="of 210 images are rejected"):
        loop.do_stage(run, 1, "extract")
    for uri, data in zip(uris[::3], whole, strict=True):
        Path(uri).write_bytes(data)
    loop.do_stage(run, 1, "extract")
    assert run.done(1, "extract")["rejected"] == 0


def test_too_many_bad_images_stop_pretraining(ray_session, tmp_path):
    """Each time; once they are mended it begins anew."""
    _digits(tmp_path / "in")
    data = DataConfig(source="folder", root=str(tmp_path / "in"), validation=60, test=30, by_reference=True)
    pool = build(data, str(tmp_path / "pool"), 0)
    uris = [row["uri"] for shard in pool.shards("pool") for row in pool.read_shard(shard).to_pylist()]
    whole = [Path(uri).read_bytes() for uri in uris[::3]]
    for uri in uris[::3]:
        Path(uri).write_bytes(b"")
    settings = {"epochs": 1, "batch_size": 50, "lr": 0.05}
    config = tiny.config(
        data={"pool": pool.uri}, image={"size": 16, "resize": 16, "channels": 1}, pretrain=settings
    )  # fmt: skip
    run = Run.create_or_open(config, str(tmp_path / "run"), pool)
    for _ in range(2):
        with pytest.raises(UserError, match="70 of 210 images are rejected"):
            loop.do_round(run, 0)
    for uri, image in zip(uris[::3], whole, strict=True):
        Path(uri).write_bytes(image)
    loop.do_round(run, 0)
    assert run.done(0, "train")["forward"] == 4 * 210


def test_training_goes_on_without_labelled_images_that_are_gone(ray_session, tmp_path, capsys):
    """`random` buys images that nobody has looked at: 2 of the 12 are bad. Where all are, training stops."""
    _digits(tmp_path / "in")
    data = DataConfig(source="folder", root=str(tmp_path / "in"), validation=60, test=30, by_reference=True)
    pool = build(data, str(tmp_path / "pool"), 0)
    image = {"size": 16, "resize": 16, "channels": 1}
    run = tiny.labelled(tmp_path, data={"pool": pool.uri}, image=image, train__epochs=1)
    labelled = set(run.read(run.round(1).labels)["image_id"].to_pylist())
    places = [
        Path(row["uri"]) for shard in pool.shards("pool") for row in pool.read_shard(shard).to_pylist()
        if row["image_id"] in labelled
    ]  # fmt: skip
    for place in places[:2]:
        place.write_bytes(b"")
    loop.do_stage(run, 1, "train")
    assert run.done(1, "train")["forward"] == 10
    assert "2 of 12 labelled images cannot be read" in capsys.readouterr().err
    for place in places:
        place.write_bytes(b"")
    with pytest.raises(UserError, match=r"12 of 12 images are rejected, more than data\.max_rejects"):
        train.train(run, 1)


def _digits(root: Path) -> None:
    """300 of them, a folder for each class."""
    digits = load_digits()
    for i in range(300):
        folder = root / str(digits.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.png").write_bytes(png((digits.images[i] * 15).astype(np.uint8)))


def _raypfk(*args: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "raypfk.cli", *args], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
