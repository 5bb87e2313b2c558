"""Where drills happen: a Ray of several nodes, a store over HTTP that can be made to misbehave, and drivers.

Also how a finished run is read: by pyarrow alone, straight from the store, so that nothing of raypfk judges itself.
"""

import io
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

from jobs.drill.host import Host
from tests.faulty_s3 import FaultyS3

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "drill"
NODES = 2
"""Beside the head, which runs drivers."""
PATIENCE_S = 600.0
"""A driver that takes longer hangs."""
MOST_STARTS = 6
IMAGES = 480
NOT_BUSY = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


class Missed(Exception):
    """The driver was done before the fault could strike."""


class Failure(Exception):
    """What came is not what was expected of the fault."""


class Place:
    def __init__(self, scratch: Path, s3: FaultyS3):
        self.scratch, self.s3 = scratch, s3
        os.environ.update(s3.environment)
        os.environ.update(
            RAY_AUTH_MODE="disabled",
            RAY_TMPDIR=str(scratch / "ray"),  # a cluster writes its address there: nobody else shall meet it
            RAY_USAGE_STATS_ENABLED="0",
            PYTHONPATH=str(ROOT),
        )
        os.environ.pop("RAY_ADDRESS", None)
        store = s3.store
        self.fs = pafs.S3FileSystem(
            access_key=store.key, secret_key=store.secret, region="us-east-1",
            endpoint_override=f"{store.host}:{store.port}", scheme="http", allow_bucket_creation=True,
        )  # fmt: skip
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # the store says every request
        self.fs.create_dir(BUCKET)
        self.cluster = None
        self.images: dict[str, bytes] = {}
        self._hosts = 0

    def requests(self) -> int:
        return sum(self.s3.requests[method] for method in ("GET", "PUT", "HEAD", "POST", "DELETE"))

    # ---------------------------------------------------------------------------------------------------------- Ray

    def start_ray(self) -> None:
        from ray.cluster_utils import Cluster

        (self.scratch / "ray").mkdir(exist_ok=True)
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.mend_ray()

    def mend_ray(self) -> None:
        """As many nodes as there were."""
        while len(self.cluster.worker_nodes) < NODES:
            self.cluster.add_node(num_cpus=2)

    def lose_node(self, rng: random.Random) -> None:
        nodes = sorted(self.cluster.worker_nodes, key=lambda node: node.unique_id)
        self.cluster.remove_node(rng.choice(nodes), allow_graceful=False)

    def lose_ray(self) -> None:
        for node in [*self.cluster.worker_nodes, self.cluster.head_node]:
            self.cluster.remove_node(node, allow_graceful=False)

    def stop_ray(self) -> None:
        if self.cluster:
            self.cluster.shutdown()

    def workers(self) -> list:
        """Processes of this very cluster that are at work; those of hosts are not among them."""
        return busy([node.all_processes["raylet"][0].process.pid for node in self.cluster.list_all_nodes()])

    def add_host(self, log: Path) -> Host:
        """A node on a host of its own, in place of one here."""
        self.cluster.remove_node(next(iter(self.cluster.worker_nodes)))
        host, self._hosts = Host(self._hosts % 60), self._hosts + 1
        host.start_ray(self.cluster.address, 4, log / "host.log")
        return host

    # ------------------------------------------------------------------------------------------------------- images

    def spoil(self, rng: random.Random) -> list[str]:
        """A folder of digits in the store, `images`, some of which are no images; their ids, which never differ."""
        if not self.images:
            digits = load_digits()
            for i in range(IMAGES):
                stream = io.BytesIO()
                Image.fromarray((digits.images[i] * 15).astype("uint8")).save(stream, "PNG")
                self.images[f"{digits.target[i]}/{i:04d}.png"] = stream.getvalue()
            for name, data in self.images.items():
                self._put(f"images/{name}", data)
        spoilt = sorted(self.images)[7::40]
        for name in spoilt:
            data = self.images[name]
            garbage = (b"", rng.randbytes(300), data[: len(data) // 2], b"<html>502</html>", b"\0" * len(data))
            self._put(f"images/{name}", rng.choice(garbage))
        return spoilt

    def _put(self, name: str, data: bytes) -> None:
        with self.fs.open_output_stream(f"{BUCKET}/{name}") as stream:
            stream.write(data)


def busy(raylets: list[int]) -> list:
    """Processes below these that are at work."""
    import psutil  # Ray brings it

    found = []
    for raylet in raylets:
        for process in psutil.Process(raylet).children(recursive=True):
            try:
                name = (process.cmdline() or [""])[0]
            except psutil.Error:
                continue
            if name.startswith("ray::") and not name.startswith(NOT_BUSY):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


class Undisturbed(NamedTuple):
    """What a run came to that was left alone. blocks: of 4 KiB, of its files."""

    seconds: float
    account: Any
    requests: int
    blocks: int


@dataclass
class Trial:
    """One run of `raypfk run` that a fault strikes. fraction: when, of the undisturbed run's requests."""

    place: Place
    rng: random.Random
    configuration: Path
    out: str
    log: Path
    fraction: float = 0.0
    undisturbed: Undisturbed | None = None
    drivers: list[subprocess.Popen] = field(default_factory=list)
    driver: subprocess.Popen | None = None
    """The one that counts: mostly the latest."""
    starts: int = 0
    injected: int = 0
    notes: list[str] = field(default_factory=list)

    def start(self) -> subprocess.Popen:
        """The command, as a user gives it, once more."""
        self.starts += 1
        self.note(f"driver {self.starts} starts")
        command = [sys.executable, "-m", "raypfk.cli", "run", str(self.configuration), "--out", self.out, "--verbose"]
        environment = {**os.environ, "RAY_ADDRESS": self.place.cluster.address}
        with self.log_of(self.starts).open("wb") as log:
            self.driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self.drivers.append(self.driver)
        return self.driver

    def log_of(self, start: int) -> Path:
        return self.log / f"driver-{start}.log"

    def said(self) -> str:
        """All that the latest driver wrote."""
        return self.log_of(self.starts).read_text(errors="replace")

    def note(self, text: str) -> None:
        self.notes.append(text)
        with (self.log / "notes.txt").open("a") as notes:
            print(time.strftime("%H:%M:%S"), text, file=notes)

    def running(self) -> bool:
        return self.driver.poll() is None

    def wait_until(self, ready: Callable[[], bool], what: str, seconds: float = PATIENCE_S) -> None:
        """Missed where the driver ends before."""
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.running():
                raise Missed(what)
            if time.monotonic() > deadline:
                raise Failure(f"not in {seconds:.0f} s: {what}")
            time.sleep(0.05)

    def wait(self, driver: subprocess.Popen | None = None, seconds: float = PATIENCE_S) -> int:
        """A driver's exit code. One that hangs says where, is ended, and is a failure."""
        driver = driver or self.driver
        try:
            return driver.wait(seconds)
        except subprocess.TimeoutExpired:
            driver.send_signal(signal.SIGABRT)
            driver.wait()
            raise Failure(f"a driver hangs for {seconds:.0f} s") from None

    def end(self) -> None:
        for driver in self.drivers:
            if driver.poll() is None:
                driver.kill()
                driver.wait()

    # -------------------------------------------------------------------------------------------------------- files

    @property
    def _at(self) -> tuple[pafs.FileSystem, str]:
        if self.out.startswith("s3://"):
            return self.place.fs, self.out.removeprefix("s3://")
        return pafs.LocalFileSystem(), self.out

    def exists(self, name: str) -> bool:
        fs, root = self._at
        return fs.get_file_info(f"{root}/{name}").type == pafs.FileType.File

    def read(self, name: str) -> bytes:
        fs, root = self._at
        with fs.open_input_file(f"{root}/{name}") as stream:
            return stream.read()

    def write(self, name: str, data: bytes) -> None:
        fs, root = self._at
        with fs.open_output_stream(f"{root}/{name}") as stream:
            stream.write(data)

    def files(self, folder: str = "", suffix: str = "") -> dict[str, int]:
        """Names and sizes of all files in a folder, and below."""
        fs, root = self._at
        selector = pafs.FileSelector(f"{root}/{folder}".rstrip("/"), recursive=True, allow_not_found=True)
        found = [info for info in fs.get_file_info(selector) if info.type == pafs.FileType.File]
        named = {info.path.removeprefix(f"{root}/"): info.size for info in found if info.path.endswith(suffix)}
        return dict(sorted(named.items()))

    def table(self, name: str) -> pa.Table:
        return pq.ParquetFile(pa.BufferReader(self.read(name))).read()

    def ids(self, folder: str) -> list[str]:
        """image_id of all Parquet files in a folder, or of one file."""
        names = [folder] if folder.endswith(".parquet") else self.files(folder, ".parquet")
        return [image_id for name in names for image_id in self.table(name)["image_id"].to_pylist()]
