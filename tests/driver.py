"""A driver in a process of its own: to be killed, stopped, or met by another."""

import os
import subprocess
import sys
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path

import yaml

from raypfk import store
from raypfk.run import Run
from tests import tiny

ROOT = Path(__file__).parent.parent
PATIENCE_S = 900
CHANGES = {"data__shard_rows": 32, "rounds": 2, "train__epochs": 40, "train__batch_size": 2}
"""Of tests/tiny.py: long enough to be broken off anywhere."""


class Driver:
    """`raypfk ARGUMENTS`, begun now. Its Ray's processes are known by a variable that they inherit."""

    def __init__(self, *arguments: str):
        self._mark, self._said = uuid.uuid4().hex, tempfile.TemporaryFile("w+")  # noqa: SIM115 - read when it is over
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "raypfk.cli", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=self._said,
            env=environment | {"RAYPFK_TEST_DRIVER": self._mark},
        )  # fmt: skip
        weakref.finalize(self, self.process.kill)  # a test that failed leaves none that runs for ever

    def when(self, ready: Callable[[], bool]) -> "Driver":
        """Waits until it is so while the driver is at work."""
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            assert self.process.poll() is None, f"the driver ended before its time: {self.said()}"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return self

    def send(self, signal: int) -> int:
        """The exit code with which it ends."""
        self.process.send_signal(signal)
        return self.wait()

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def said(self) -> str:
        self._said.seek(0)
        return self._said.read()

    def left(self) -> list[int]:
        """What is left of it and of its Ray."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self._mark.encode() in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:  # ended just now
                continue
        return found


def configuration(folder: Path, **changes) -> str:
    """A file of tests/tiny.py's configuration with CHANGES."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tiny.config(**(CHANGES | changes)).model_dump()))
    return str(path)


def assert_same(run: Run, other: Run) -> None:
    for number in (1, 2):
        mine, theirs = (r.read(r.round(number).selection) for r in (run, other))
        assert mine.to_pylist() == theirs.to_pylist()
        mine, theirs = (store.read_json(r.round(number).metrics)["confusion"] for r in (run, other))
        assert mine == theirs
