"""What it costs to make a pool of images in S3: images a second and requests an image.

    python jobs/bench_pool.py --images 4000 --files DIR --store radosgw

The peers are plain boto3 loops with as many requests in flight, in one warm process for each of Ray's CPUs, that do
what the user gets: for a pool of copies they list, fetch, decode and put the bytes back, as many images to an object as
a shard has; for one by reference they list, fetch, decode and resize. The floor only lists and fetches. raypfk's build
also hashes every image, writes Parquet and says what it did; by reference, Ray Data streams the images as extraction
does. Figures are taken in turns; requests are counted in a pass of its own, behind a proxy, that is not timed.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # python jobs/… puts jobs/ there, not the repository

import click
import numpy as np

from raypfk import images, session
from raypfk.config import DataConfig
from raypfk.run import ImageSpec
from raypfk.sources.files import IN_FLIGHT
from raypfk.stages import pool as stage
from raypfk.stages.stream import Decoder, decoded
from tests import faulty_s3, rados_gateway

BUCKET = "bench"
SPEC = ImageSpec(224, 256, 3, (0.5,), (0.5,), 100_000_000)


class Bench:
    """count: images, that lie in s3://bench/in. rows: of a pool's shard. cpus: processes of each."""

    def __init__(self, count: int, rows: int, cpus: int):
        self.count, self.rows, self.cpus, self._builds = count, rows, cpus, 0

    def fill(self, files: list[bytes]) -> None:
        client = _client()
        client.create_bucket(Bucket=BUCKET)

        def put(i: int) -> None:
            client.put_object(Bucket=BUCKET, Key=f"in/{i // 1000:03d}/{i:07d}.jpg", Body=files[i % len(files)])

        with ThreadPoolExecutor(16) as threads:
            list(threads.map(put, range(self.count)))

    def data(self, **fields) -> DataConfig:
        return DataConfig(source="folder", root=f"s3://{BUCKET}/in", shard_rows=self.rows, **fields)

    def build(self, **fields):
        self._builds += 1
        return stage.build(self.data(**fields), f"s3://{BUCKET}/pools/{self._builds}", 0)

    def stream(self, pool) -> None:
        """Fetches and decodes a pool by reference, as extraction does."""
        found = decoded(pool.shards("pool"), Decoder(pool, SPEC)).map_batches(_rows, batch_size=None).take_all()
        if sum(row["rows"] for row in found) != self.count:
            raise SystemExit(f"{found} images, expected {self.count}")

    def loop(self, what: str) -> float:
        """Seconds of the boto3 loop: "fetch", "resize" or "copy"."""
        with get_context("spawn").Pool(self.cpus) as processes:
            processes.map(_warm, range(self.cpus), 1)
            began = time.perf_counter()
            pages = _client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="in/")
            keys = [item["Key"] for page in pages for item in page["Contents"]]
            parts = [(keys[i :: self.cpus], what, self.rows) for i in range(self.cpus)]
            if sum(processes.map(_loop, parts, 1)) != self.count:
                raise SystemExit("the loop lost images")
            return time.perf_counter() - began


def _rows(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"rows": np.array([len(batch["image"])])}


def _client():
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(max_pool_connections=IN_FLIGHT[True]))


def _warm(_: int) -> None:
    """What a process imports is not the loop's cost."""
    import torch
    import torchvision.io  # noqa: F401

    torch.set_num_threads(1)
    _client()
    time.sleep(0.5)  # so that each process takes one


def _loop(part: tuple[list[str], str, int]) -> int:
    keys, what, rows = part
    client = _client()

    def get(key: str) -> bytes:
        return client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    done = 0
    held: list[bytes] = []
    with ThreadPoolExecutor(IN_FLIGHT[True]) as threads:
        for data in threads.map(get, keys):
            done += 1
            if what == "resize":
                how = {"size": SPEC.size, "resize": SPEC.resize, "channels": SPEC.channels}
                images.load(data, **how, max_pixels=SPEC.max_pixels)
            elif what == "copy":
                images.decode(data, None, SPEC.max_pixels)
                held.append(data)
                if len(held) == rows or done == len(keys):
                    client.put_object(Bucket=BUCKET, Key=f"copies/{os.getpid()}-{done}", Body=b"".join(held))
                    held = []
    return done


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


@click.command()
@click.option("--images", "count", default=4000, show_default=True)
@click.option("--files", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="JPEGs.")
@click.option("--rows", default=512, show_default=True, help="Images of a pool's shard.")
@click.option("--store", type=click.Choice(list(rados_gateway.STORES)), default="moto", show_default=True)
@click.option("--turns", default=3, show_default=True)
def main(count, files, rows, store, turns):
    contents = [path.read_bytes() for path in sorted(files.glob("*.[jJ]*"))]
    with rados_gateway.STORES[store]() as behind:
        address = f"http://{behind.host}:{behind.port}"
        os.environ.update(
            AWS_ACCESS_KEY_ID=behind.key, AWS_SECRET_ACCESS_KEY=behind.secret, AWS_DEFAULT_REGION="us-east-1",
            AWS_ENDPOINT_URL=address, NO_PROXY=behind.host, no_proxy=behind.host,
        )  # fmt: skip
        with session.ray_session():
            bench = Bench(count, rows, session.cpus())
            bench.fill(contents)
            rates = measure(bench, turns)
        requests = count_requests(behind, bench)
    report(bench, store, {name: count / statistics.median(taken) for name, taken in rates.items()}, requests)


def measure(bench: Bench, turns: int) -> dict[str, list[float]]:
    """Seconds of each, in turns, after one that warms the workers."""
    held = bench.build(by_reference=True)
    bench.stream(held)
    seconds: dict[str, list[float]] = {name: [] for name in ("build", "copy", "stream", "resize", "listing", "fetch")}
    for _ in range(turns):
        seconds["build"].append(timed(bench.build))
        seconds["listing"].append(timed(lambda: bench.build(by_reference=True)))
        seconds["stream"].append(timed(lambda: bench.stream(held)))
        for name in ("copy", "resize", "fetch"):
            seconds[name].append(bench.loop(name))
        print({name: round(taken[-1], 2) for name, taken in seconds.items()}, flush=True)
    return seconds


def count_requests(behind: faulty_s3.Store, bench: Bench) -> dict[str, float]:
    """Requests an image, of building a pool of copies, one by reference, and of streaming that."""
    found = {}
    with faulty_s3.running(behind) as proxy:
        os.environ.update(proxy.environment)
        from raypfk import s3

        s3._client.cache_clear()
        with session.ray_session():
            held = None
            for name in ("build", "listing", "stream"):
                proxy.requests.clear()
                if name == "stream":
                    bench.stream(held)
                else:
                    held = bench.build(by_reference=name == "listing")
                found[name] = sum(proxy.requests.values()) / bench.count
    return found


def report(bench: Bench, store: str, rates: dict[str, float], requests: dict[str, float]) -> None:
    print(f"{bench.count:,} images in {store}, {bench.cpus} processes, {IN_FLIGHT[True]} requests in flight in each")
    names = {
        "build": "pool build, copies", "copy": "boto3 loop, decoded and copied",
        "stream": "fetched by reference, resized", "resize": "boto3 loop, decoded and resized",
        "listing": "pool build, by reference", "fetch": "boto3 loop, only fetched",
    }  # fmt: skip
    for name, rate in rates.items():
        asked = f"  {requests[name]:.3f} requests an image" if name in requests else ""
        print(f"{names[name]:32s} {rate:10,.0f} images/s{asked}")
    build, copy, stream, resize, fetch = (rates[name] for name in ("build", "copy", "stream", "resize", "fetch"))
    print(json.dumps({
        "name": "bench_pool", "figure": round(build, 1), "unit": "images/s", "peer": round(copy, 1),
        "floor": round(fetch, 1), "vs_peer": round(build / copy, 3), "of_floor": round(build / fetch, 3),
        "by_reference": round(stream, 1), "by_reference_peer": round(resize, 1),
        "by_reference_vs_peer": round(stream / resize, 3),
        "requests_per_image": {name: round(value, 4) for name, value in requests.items()}, "store": store,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
