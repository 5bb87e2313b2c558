"""Kill -9 of the driver, then the same command: the selection of an undisturbed run, no finished shard done twice."""

import signal
from pathlib import Path

import pytest

from raypfk import store
from raypfk.run import Run
from tests import driver
from tests.driver import Driver


def test_killed_in_extraction(undisturbed, tmp_path):
    """Killed when some descriptor shards of round 1 are written and others not."""
    out = str(tmp_path / "run")
    command = ("run", driver.configuration(tmp_path), "--out", out)
    folder = Path(out) / "rounds/001/descriptors"
    Driver(*command).when(lambda: len(store.names(str(folder), ".parquet")) >= 3).send(signal.SIGKILL)
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    shards = len(Run.open(out).pool.shards("pool"))
    assert 3 <= len(finished) < shards, "killed too late to prove anything"
    assert Driver(*command).wait() == 0
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == finished
    assert len(list(folder.glob("*.parquet"))) == shards
    driver.assert_same(Run.open(out), undisturbed)


@pytest.mark.slow
def test_killed_in_training(undisturbed, tmp_path):
    """Killed when some epochs of round 1 are kept and others not done."""
    out = str(tmp_path / "run")
    command = ("run", driver.configuration(tmp_path), "--out", out)
    kept = Path(out) / "rounds/001/checkpoint/training.pt"
    Driver(*command).when(kept.exists).send(signal.SIGKILL)
    assert not (Path(out) / "rounds/001/checkpoint/model.pt").exists(), "killed too late to prove anything"
    assert Driver(*command).wait() == 0
    assert not kept.exists()
    driver.assert_same(Run.open(out), undisturbed)
