"""A whole run in object storage: moto's S3 over HTTP on loopback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bucket(monkeypatch):
    """An empty bucket; its endpoint is in the environment, and no proxy is asked."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    server.stop()


def test_a_run_in_a_bucket(bucket, tmp_path):
    """`--out s3://…`: pool, descriptors, checkpoint and metrics are objects; the same command goes on from them."""
    configuration = tmp_path / "run.yaml"
    configuration.write_text(yaml.safe_dump(tiny.config().model_dump()))
    listings = []
    for _ in range(2):
        _raypfk("run", str(configuration), "--out", "s3://bucket/runs/one")
        listing = {o["Key"]: o["LastModified"] for o in bucket.list_objects_v2(Bucket="bucket")["Contents"]}
        listing.pop("runs/one/run.json")
        listings.append(listing)
    assert listings[0] == listings[1]
    files = {key.removeprefix("runs/one/") for key in listings[0]}
    assert {"pool/manifest.json", "rounds/001/metrics.json", "rounds/001/checkpoint/model.pt"} <= files
    assert "rounds/001/descriptors/00000.parquet" in files and "rounds/001/checkpoint/training.pt" not in files
    assert "finished" in _raypfk("status", "s3://bucket/runs/one")


def _raypfk(*args: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "raypfk.cli", *args], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
