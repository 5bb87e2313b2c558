"""Machines that are taken away. SIGTERM to a driver: it ends cleanly, and the same command goes on from there.

Two drivers on one run, by the command line. A training on other numbers of workers than it began with.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ray.train import FailureConfig

from raypfk import store
from raypfk.errors import RunError
from raypfk.run import Run
from raypfk.stages import fitting, train
from tests import driver, tiny
from tests.driver import Driver


def _stop(begun: Driver, *there_before: Path) -> None:
    """SIGTERM, twice; it ends as promised and leaves no lease and no process."""
    leases = [path / "lease.json" for path in there_before]
    assert all(lease.exists() for lease in leases)
    begun.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    code = begun.send(signal.SIGTERM)
    # A shell says 143 of both: Ray's core sets SIGTERM back to its default while it shuts down, after all else.
    assert code in (143, -signal.SIGTERM), begun.said()
    if code == 143:
        assert begun.said().endswith("raypfk: stopped by SIGTERM; the same command goes on from here\n")
    assert "Traceback" not in begun.said()
    assert not any(lease.exists() for lease in leases)
    deadline = time.monotonic() + driver.PATIENCE_S
    while begun.left():  # Ray's processes are told to end, and not waited for
        assert time.monotonic() < deadline, f"left over: {begun.left()}"
        time.sleep(0.1)


def test_a_run_stopped_twice_ends_as_if_undisturbed(undisturbed, tmp_path):
    """SIGTERM in extraction and, gone on with, in training: the last finished epoch is kept, and gone on from."""
    out = tmp_path / "run"
    command = ("run", driver.configuration(tmp_path), "--out", str(out))
    folder, kept = out / "rounds/001/descriptors", out / "rounds/001/checkpoint/training.pt"
    _stop(Driver(*command).when(lambda: len(store.names(str(folder), ".parquet")) >= 3), out)
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    _stop(Driver(*command, "--set", "train.checkpoint_every=3").when(kept.exists), out)
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == finished
    epochs = torch.load(io.BytesIO(kept.read_bytes()), weights_only=True)["epochs"]
    assert 3 <= epochs < 40, "stopped too late to prove anything"
    last = Driver(*command)
    assert last.wait() == 0, last.said()
    assert f"training goes on after epoch {epochs} of 40" in last.said()
    driver.assert_same(Run.open(str(out)), undisturbed)


def test_a_stopped_pool_build_is_no_pool_and_is_built_again(tmp_path):
    dest = tmp_path / "pool"
    command = ("pool", "build", "digits", str(dest), "--validation", "100", "--shard-rows", "1")
    _stop(Driver(*command).when(lambda: len(store.names(str(dest / "pool"), ".parquet")) >= 3), dest)
    assert not (dest / "manifest.json").exists()
    again = Driver(*command[:-1], "128")
    assert again.wait() == 0, again.said()
    assert "half of another pool, building it again" in again.said()
    assert json.loads((dest / "manifest.json").read_text())["splits"]["validation"]["rows"] == 100


def test_of_two_drivers_the_second_is_refused(tmp_path):
    """It names the first, which goes on undisturbed and, once it is stopped, leaves the place to the next."""
    out = tmp_path / "run"
    changes = {"strategy": "random", "rounds": 1, "train__epochs": 10**6}
    command = ("run", driver.configuration(tmp_path, **changes), "--out", str(out))
    kept = out / "rounds/001/checkpoint/training.pt"
    first = Driver(*command).when(kept.exists)
    second = Driver(*command)
    assert second.wait() == 2, second.said()
    assert f"process {first.process.pid} of " in second.said() and "one driver at a time" in second.said()
    assert first.process.poll() is None
    assert json.loads((out / "lease.json").read_text())["pid"] == first.process.pid
    _stop(first, out)


@pytest.mark.slow
def test_a_training_goes_on_without_a_lost_node(tmp_path):
    """On one worker instead of two, from an epoch that was kept. (pytest -m slow tests/test_preempt.py)"""
    command = [sys.executable, "-m", "tests.lose_a_worker", str(tmp_path)]
    done = subprocess.run(command, cwd=driver.ROOT, capture_output=True, text=True, timeout=driver.PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert "same weights" in done.stdout


@pytest.mark.slow
def test_workers_that_die_again_and_again(ray_session, tmp_path, monkeypatch):
    """Each after the epoch that it kept: more often than Ray Train allows, and the training comes to its end.

    pytest -m slow tests/test_preempt.py
    """
    run = tiny.labelled(tmp_path, train__workers=1, train__epochs=3)
    worker = train.train_worker

    def dying(settings: dict) -> dict:
        keep = fitting.Keeper.keep

        def keep_and_die(keeper) -> None:
            keep(keeper)
            if train._kept(settings["job"])["epochs"] < 3:
                os._exit(9)

        fitting.Keeper.keep = keep_and_die
        return worker(settings)

    monkeypatch.setattr(train, "train_worker", dying)
    monkeypatch.setattr(fitting, "FailureConfig", lambda max_failures: FailureConfig(max_failures=0))
    assert train.train(run, 1)["epochs"] == 3


@pytest.mark.slow
def test_a_diverged_worker_is_not_tried_again(ray_session, tmp_path):
    """It would diverge again. (pytest -m slow tests/test_preempt.py)"""
    run = tiny.labelled(tmp_path, train__workers=1, train__lr=1e30)
    with pytest.raises(RunError, match="training diverged in epoch"):
        train.train(run, 1)
