"""`ray job submit` against a real head with token authentication."""

import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from raypfk.run import Run
from tests import tiny

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PATIENCE_S = 900


@pytest.fixture
def head(tmp_path_factory):
    """A Ray head with a token; gives the environment to submit with. Its ports are its own: others may run one too."""
    ports = {name: _free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # a job's `python` is what the head finds under this name
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard-port']}",
    }
    folder = tmp_path_factory.mktemp("ray", numbered=True)
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus", "4", "--disable-usage-stats"]
    command += [f"--temp-dir={folder}", *(f"--{name}={port}" for name, port in ports.items())]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(lambda: _ray("job", "list", environment=environment).returncode == 0)
        yield environment
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
def test_a_submitted_job_selects_what_a_laptop_selects(head, ray_session, tmp_path):
    """jobs/run.py through `ray job submit`, and the loop in this process: the same selection."""
    configuration = tmp_path / "run.yaml"
    configuration.write_text(yaml.safe_dump(tiny.config().model_dump()))
    entrypoint = ["python", "jobs/run.py", "--config", str(configuration), "--out", str(tmp_path / "job")]
    done = _ray("job", "submit", "--working-dir", ".", "--", *entrypoint, environment=head)
    assert done.returncode == 0, done.stdout[-3000:]
    run = Run.open(str(tmp_path / "job"))
    selection = run.read(run.round(1).selection)["image_id"].to_pylist()
    assert selection == tiny.select(tmp_path / "laptop")


def _ray(*args: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([BIN / "ray", *args], cwd=ROOT, env=environment, capture_output=True, text=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(ready) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < deadline, "the head did not come up"
        time.sleep(2)
