"""The command line's errors, one by one: an exit code, one message that says what is wrong, no traceback."""

import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.exceptions import RayTaskError

from raypfk import __version__, cli, loop, store
from raypfk.errors import RunError, UserError
from raypfk.lease import Lost
from raypfk.rejects import TooMany
from raypfk.retry import GaveUp
from raypfk.run import Run
from tests import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture
def call(capsys):
    """Runs the program in this process; gives exit code, stdout, stderr."""

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.run_command(cli.cli, [str(a) for a in args])
        out = capsys.readouterr()
        assert "Traceback" not in out.err
        return stop.value.code or 0, out.out, out.err

    return run


@pytest.fixture
def yaml_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny.TREE))
    return path


def test_help_and_version(call):
    """--help lists every command; --version says which."""
    code, out, _ = call("--help")
    assert code == 0
    for command in ("demo", "run", "status", "pool", "extract", "score", "acquire", "label", "train", "evaluate"):
        assert command in out
    assert __version__ in call("--version")[1]


MISTAKES = {
    "unknown command": (["fly"], "No such command 'fly'"),
    "no config": (["run", "--out", "x"], "expected one configuration"),
    "two configs": (["run", "a.yaml", "--config", "b.yaml", "--out", "x"], "expected one configuration"),
    "no out": (["run", "{yaml}"], "Missing option '--out'"),
    "absent config": (["run", "nowhere.yaml", "--out", "x"], "nowhere.yaml: cannot be read"),
    "unknown strategy": (["run", "{yaml}", "--out", "x", "--strategy", "psychic"], "strategy: expected badge, bald, "),
    "unknown key": (["run", "{yaml}", "--out", "x", "--set", "train.speed=9"], "train.speed: unknown key"),
    "wrong type": (
        ["run", "{yaml}", "--out", "x", "--set", "train.epochs=many"],
        "train.epochs: expected a valid integer, found 'many'",
    ),
    "malformed set": (
        ["run", "{yaml}", "--out", "x", "--set", "train.epochs"],
        "--set train.epochs: expected dotted.key=value",
    ),
    "rounds no number": (["run", "{yaml}", "--out", "x", "--rounds", "few"], "'few' is not a valid integer"),
    "no run to show": (["status", "{tmp}/none"], "no run here"),
    "no run to extract": (["extract", "{tmp}/none", "--round", "1"], "no run here"),
    "no round": (["extract", "{tmp}/none"], "Missing option '--round'"),
    "rare without imbalance": (
        ["pool", "build", "digits", "{tmp}/p", "--rare", "5"],
        "--imbalance and --rare go together",
    ),
    "bad rare": (["pool", "build", "digits", "{tmp}/p", "--imbalance", "5", "--rare", "x"], "expected class indices"),
    "bad validation": (
        ["pool", "build", "digits", "{tmp}/p", "--validation", "lots"],
        "expected a number of images, a share",
    ),
}


@pytest.mark.parametrize(("args", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_users_mistake_exits_with_2(call, yaml_file, tmp_path, args, message):
    """Each mistake: exit code 2 and a message that names what is wrong."""
    code, _, err = call(*(a.format(yaml=yaml_file, tmp=tmp_path) for a in args))
    assert code == 2
    assert message in err


RUN_MISTAKES = {
    "tap that does not exist": ("model.taps=[conv1, conv9]", "model.taps[1]: 'conv9' is not a layer of lenet"),
    "unknown network": ("model.name=lenot", "model.name: 'lenot' is not a known network"),
    "too small": ("image={size: 8}", "lenet needs images of 16x16 pixels"),
    "channels": ("image.mean=[0.1, 0.2]", "image.mean: expected 1 or 1 values, found 2"),
    "resize below size": ("image.resize=12", "image.resize: 12 is smaller than image.size 16"),
    "no test images": ("data.test=null", "has no test images"),
    "class out of range": ("data.imbalance.classes=[12]", "data.imbalance.classes"),
    "absent pool": ("data={pool: nowhere}", "nowhere: no pool here"),
}


@pytest.mark.parametrize(("assignment", "message"), RUN_MISTAKES.values(), ids=RUN_MISTAKES)
def test_what_only_the_data_shows_exits_with_2(call, ray_session, yaml_file, tmp_path, assignment, message):
    """A mistake that needs the pool or the network to be seen is told before anything is trained."""
    code, _, err = call("run", yaml_file, "--out", tmp_path / "run", "--set", assignment)
    assert code == 2
    assert message in err
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_damaged_run_is_named(call, ray_session, tmp_path):
    """run.json that is no JSON or of another format, a truncated shard, a checkpoint that runs code: each is named."""
    run = tiny.begin(tiny.config(), tmp_path / "run")
    record = store.read_json(f"{run.uri}/run.json")
    shard = run.pool.shards("validation")[0]
    whole = Path(shard.uri).read_bytes()
    Path(shard.uri).write_bytes(whole[: len(whole) // 2])
    code, _, err = call("extract", run.uri, "--round", "1")
    assert code == 2 and shard.uri in err
    Path(shard.uri).write_bytes(whole)
    Path(run.round(0).checkpoint).write_bytes(pickle.dumps(os.system))
    code, _, err = call("extract", run.uri, "--round", "1")
    assert code == 2 and "model.pt" in err
    store.write_json(f"{run.uri}/run.json", record | {"format": 99})
    assert "format 99, expected 1" in call("status", run.uri)[2]
    Path(f"{run.uri}/run.json").write_text("{")
    code, _, err = call("status", run.uri)
    assert code == 2 and "run.json: expected JSON" in err


def test_another_pool_under_a_run_is_refused(call, ray_session, tmp_path):
    """A run whose pool was replaced by another is refused, naming both."""
    run = tiny.begin(tiny.config(), tmp_path / "run")
    manifest = f"{run.uri}/pool/manifest.json"
    store.write_json(manifest, store.read_json(manifest) | {"fingerprint": "f" * 64})
    code, _, err = call("status", run.uri)
    assert code == 2 and run.pool.fingerprint[:12] in err and "f" * 12 in err


def test_status_as_json(call, ray_session, tmp_path):
    """status --json prints one JSON object on stdout."""
    run = tiny.begin(tiny.config(), tmp_path / "run")
    code, out, _ = call("status", run.uri, "--json")
    state = json.loads(out)
    assert code == 0 and state["done"][0]["round"] == 0 and not state["finished"]


def test_a_failure_exits_with_1_and_names_its_cause(call, monkeypatch, tmp_path):
    """What is not the user's mistake: exit code 1, the kind of error and its message."""
    from raypfk import status

    def broken(run_dir):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(status, "read", broken)
    code, _, err = call("status", tmp_path)
    assert code == 1 and "RuntimeError: the disk is on fire" in err


CHAINS = {
    "a store's words, a library's below": (
        [RunError("stopped"), PermissionError(13, "denied", "s3://b/k"), KeyError("y")], "failed: RunError: stopped", 1
    ),
    "ours below a library's": ([ValueError("x"), Lost("held by another")], "failed: Lost: held by another", 1),
    "the system's below a library's": (
        [ValueError("x"), GaveUp("s3://b/k: failed 12 times"), KeyError("y")], "failed: GaveUp: s3://b/k: failed 12", 1
    ),
    "none of them": ([ValueError("x"), KeyError("y")], "failed: KeyError: 'y'", 1),
    "a user's mistake within": ([RunError("stopped"), TooMany("12 of 40 images")], "raypfk: 12 of 40 images", 2),
    "as Ray hands it on": (
        [RayTaskError("write", "a long story", UserError("no such file")).as_instanceof_cause()], "no such file\n", 2
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_of_what_errors_were_raised_from_the_one_that_says_most_is_shown(call, monkeypatch, name):
    """Each of a chain is raised from the next."""
    chain, message, code = CHAINS[name]
    for error, cause in itertools.pairwise(chain):
        error.__cause__ = cause

    def fail(_):
        raise chain[0]

    monkeypatch.setattr("raypfk.verify.verify", fail)
    came, _, said = call("verify", "x")
    assert came == code and message in said and "long story" not in said


def test_a_dashboards_address_is_refused(yaml_file, tmp_path):
    """RAY_ADDRESS=http://... breaks ray.init: say what to set instead."""
    command = [sys.executable, "-m", "raypfk.cli", "run", str(yaml_file), "--out", str(tmp_path / "run")]
    environment = os.environ | {"RAY_ADDRESS": "http://127.0.0.1:8265"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "RAY_API_SERVER_ADDRESS" in done.stderr and "Traceback" not in done.stderr


def test_a_relative_place_in_a_job_is_refused(call, ray_session, monkeypatch, yaml_file):
    """A submitted job runs in a copy of the folder that is deleted: --out must not lie in it."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for command in (("run", yaml_file), ("experiment", ROOT / "configs/experiments/digits.yaml")):
        code, _, err = call(*command, "--out", "runs/x")
        assert code == 2 and "give an absolute path or a URI" in err


def test_ones_own_strategy_lies_in_the_current_folder(call, ray_session, monkeypatch, yaml_file, tmp_path):
    (tmp_path / "lies_here.py").write_text("def bare(logits):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    code, _, err = call("run", yaml_file, "--out", "run", "--strategy", "lies_here:bare")
    assert code == 2 and "strategy: 'lies_here:bare': expected a function under by_kernel" in err


def test_a_run_knows_what_began_it(call, ray_session, monkeypatch, yaml_file, tmp_path):
    """Its report names that command."""
    args = ["run", str(yaml_file), "--out", str(tmp_path / "a run")]
    monkeypatch.setattr(sys, "argv", ["raypfk", *args])
    monkeypatch.setattr(loop, "do_round", lambda run, number: None)
    assert call(*args)[0] == 0
    assert Run.open(str(tmp_path / "a run")).command == f"raypfk run {yaml_file} --out '{tmp_path}/a run'"


def test_what_a_laptop_lacks_is_said(call, ray_session, yaml_file, tmp_path):
    """More CPUs or GPUs than a local Ray has: an error, not a wait for ever."""
    code, _, err = call("run", yaml_file, "--out", tmp_path / "run", "--set", "resources.extract_gpus=1")
    assert code == 2 and "asks for 1 GPU, there are 0" in err


def test_a_sigterm_while_an_object_is_destroyed_is_not_lost():
    """Python prints what is raised there, and goes on."""
    script = """
import os, signal, time, click
from raypfk import cli
class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
@click.command()
def work():
    Slow()
    time.sleep(30)
cli.run_command(work, [])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 143
    assert done.stderr.strip() == "raypfk: stopped by SIGTERM; the same command goes on from here"


def test_importing_the_program_is_cheap():
    """`raypfk --help` loads neither Ray nor torch."""
    script = "import sys, raypfk.cli; print(any(m in sys.modules for m in ('ray', 'torch', 'torchvision')))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT).stdout == "False\n"
