"""A whole run in object storage: moto's S3 over HTTP on loopback."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from sklearn.datasets import load_digits

from raypfk import images, store
from tests import faulty_s3, tiny

ROOT = Path(__file__).parent.parent


def test_a_run_in_a_bucket(s3, tmp_path):
    """`--out s3://…`: pool, descriptors, checkpoint and metrics are objects; the same command goes on from them."""
    configuration = tmp_path / "run.yaml"
    configuration.write_text(yaml.safe_dump(tiny.config().model_dump()))
    listings = []
    for _ in range(2):
        _raypfk("run", str(configuration), "--out", f"s3://{s3.bucket}/runs/one")
        listing = {o["Key"]: o["LastModified"] for o in s3.client.list_objects_v2(Bucket=s3.bucket)["Contents"]}
        listing.pop("runs/one/run.json")
        listings.append(listing)
    assert listings[0] == listings[1]
    files = {key.removeprefix("runs/one/") for key in listings[0]}
    assert {"pool/manifest.json", "rounds/001/metrics.json", "rounds/001/checkpoint/model.pt"} <= files
    assert "rounds/001/descriptors/00000.parquet" in files and "rounds/001/checkpoint/training.pt" not in files
    assert "runs/one/lease.json" not in listings[0]
    assert "finished" in _raypfk("status", f"s3://{s3.bucket}/runs/one")
    _raypfk("verify", f"s3://{s3.bucket}/runs/one")


def test_a_run_by_reference_selects_what_one_with_copies_does(s3, tmp_path):
    """Class folders in a bucket: `pool build` once by reference and once with copies, in a store that has trouble; an
    image costs one request to copy, and none to refer to."""
    digits = load_digits()
    for i in range(400):
        pixels = (digits.images[i] * 15).astype(np.uint8)
        s3.client.put_object(Bucket=s3.bucket, Key=f"in/{digits.target[i]}/{i:03d}.png", Body=images.encode_png(pixels))
    selections = []
    for name, options in (("copied", ()), ("held", ("--by-reference",))):
        asked = []
        s3.choose = lambda method, path, a=asked: a.append(path) if path.startswith(f"/{s3.bucket}/in/") else None
        _raypfk(
            "pool", "build", f"s3://{s3.bucket}/in", f"s3://{s3.bucket}/{name}", "--validation", "100", "--test", "50",
            "--shard-rows", "64", *options,
        )  # fmt: skip
        assert len(set(asked)) == len(asked) == (0 if options else 400)
        numbers = itertools.count()
        s3.choose = lambda method, path, n=numbers: faulty_s3.PASSING[next(n) % 4] if next(n) % 40 == 0 else None
        tree = tiny.config(data={"pool": f"s3://{s3.bucket}/{name}"}, image={"size": 16, "resize": 16, "channels": 1})
        configuration, out = tmp_path / f"{name}.yaml", f"s3://{s3.bucket}/runs/{name}"
        configuration.write_text(yaml.safe_dump(tree.model_dump()))
        _raypfk("run", str(configuration), "--out", out)
        s3.choose = lambda method, path: None
        selections.append(store.read_table(f"{out}/rounds/001/selection.parquet").replace_schema_metadata())
        _raypfk("verify", out)
    assert selections[0] == selections[1] and sum(s3.injected.values()) > 10


def _raypfk(*args: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "raypfk.cli", *args], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
