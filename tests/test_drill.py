"""The drill in short: runs on a Ray of three nodes that faults strike end like one that is left alone."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.drill.account import account
from jobs.drill.place import Trial
from raypfk import loop
from tests import tiny

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds",
    [
        ("S3: 503", "driver killed"),
        ("worker killed", "node killed"),
        ("lease ran out", "shard damaged"),
    ],
)
def test_faults_lose_nothing(kinds, tmp_path):
    command = [sys.executable, "jobs/drill_faults.py", "--runs", str(len(kinds)), "--seed", "3", "--keep", tmp_path]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    for kind in kinds:
        command += ["--only", kind]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["runs"] == said["selections_equal"] == said["verified"] == len(kinds)
    assert said["lost"] == said["duplicated"] == 0 and said["faults"] >= len(kinds)


def test_what_is_lost_or_there_twice_is_counted(ray_session, tmp_path):
    """The drill's own count, without raypfk's help; `raypfk verify` agrees that something is wrong."""
    out = tmp_path / "run"
    loop.run(tiny.config(), str(out))
    trial = Trial(None, random.Random(0), tmp_path / "run.yaml", str(out), tmp_path)
    whole = account(trial, 1)
    assert (whole.lost, whole.duplicated, whole.clean) == (0, 0, True) and len(whole.images) == 1281
    described = out / "rounds/001/descriptors/00001.parquet"
    table = pq.ParquetFile(described).read()
    pq.write_table(pa.concat_tables([table[2:], table[-1:]]), described)
    broken = account(trial, 1, whole.images)
    assert (broken.lost, broken.duplicated, broken.clean) == (2, 1, False) and broken.selections == whole.selections
    shutil.rmtree(out / "pool/test")
    assert account(trial, 1, whole.images).lost == 2 + 200
