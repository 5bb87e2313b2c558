"""Kill -9 of the driver, then the same command: the selection of an undisturbed run, no finished shard done twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from raypfk import store
from raypfk.run import Run
from tests import tiny

ROOT = Path(__file__).parent.parent
CHANGES = {"data__shard_rows": 32, "rounds": 2, "train__epochs": 40, "train__batch_size": 2}
PATIENCE_S = 900


@pytest.fixture(scope="module")
def configuration(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kill") / "run.yaml"
    path.write_text(yaml.safe_dump(tiny.config(**CHANGES).model_dump()))
    return path


@pytest.fixture(scope="module")
def undisturbed(configuration) -> Run:
    out = str(configuration.parent / "undisturbed")
    _start(configuration, out).wait(PATIENCE_S)
    return Run.open(out)


def test_killed_in_extraction(configuration, undisturbed, tmp_path):
    """Killed when some descriptor shards of round 1 are written and others not."""
    out = str(tmp_path / "run")
    folder = Path(out) / "rounds/001/descriptors"
    _kill_when(_start(configuration, out), lambda: len(store.names(str(folder), ".parquet")) >= 3)
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    shards = len(Run.open(out).pool.shards("pool"))
    assert 3 <= len(finished) < shards, "killed too late to prove anything"
    assert _start(configuration, out).wait(PATIENCE_S) == 0
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == finished
    assert len(list(folder.glob("*.parquet"))) == shards
    _assert_same(Run.open(out), undisturbed)


def test_killed_in_training(configuration, undisturbed, tmp_path):
    """Killed when some epochs of round 1 are kept and others not done."""
    out = str(tmp_path / "run")
    kept = Path(out) / "rounds/001/checkpoint/training.pt"
    _kill_when(_start(configuration, out), kept.exists)
    assert not (Path(out) / "rounds/001/checkpoint/model.pt").exists(), "killed too late to prove anything"
    assert _start(configuration, out).wait(PATIENCE_S) == 0
    assert not kept.exists()
    _assert_same(Run.open(out), undisturbed)


def _start(configuration: Path, out: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "raypfk.cli", "run", str(configuration), "--out", out]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def _kill_when(process: subprocess.Popen, ready) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def _assert_same(run: Run, other: Run) -> None:
    for number in (1, 2):
        mine, theirs = (r.read(r.round(number).selection) for r in (run, other))
        assert mine.to_pylist() == theirs.to_pylist()
        mine, theirs = (store.read_json(r.round(number).metrics)["confusion"] for r in (run, other))
        assert mine == theirs
