"""A store of production's: Ceph's object gateway, which checks signatures, on a cluster of one node on loopback.

One monitor and one OSD that keeps all in memory; no manager, no authentication between them. Debian's packages
radosgw, ceph-mon and ceph-osd (which bring radosgw-admin and ceph) have all that it takes.
"""

import http.client
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import faulty_s3
from tests.faulty_s3 import Store

PROGRAMS = ("ceph-mon", "ceph-osd", "ceph", "radosgw", "radosgw-admin", "setpriv")
STARTS_WITHIN = 120.0
"""Seconds for each step."""
CONFIGURATION = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{monitor}
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
mon cluster log file = {folder}/cluster.log
paxos propose interval = 0.02
mon data = {folder}/monitor
mon allow pool size one = true
mon pg warn min per osd = 0
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 8589934592
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off
rgw frontends = beast endpoint=127.0.0.1:{gateway}
rgw data = {folder}/gateway
[mon]
public addr = v2:127.0.0.1:{monitor}
[osd]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
"""


def available() -> bool:
    return all(shutil.which(name) for name in PROGRAMS)


@contextmanager
def running() -> Iterator[Store]:
    """The gateway, once it answers."""
    with tempfile.TemporaryDirectory(prefix="raypfk-ceph-") as folder:
        node = _Node(Path(folder))
        try:
            node.start()
            yield node.store
        finally:
            node.stop()


class _Node:
    def __init__(self, folder: Path):
        self._folder, self._daemons = folder, []
        monitor, gateway = _free_ports(2)
        self.store = Store("127.0.0.1", gateway)
        for name in ("monitor", "osd", "gateway"):
            (folder / name).mkdir()
        (folder / "ceph.conf").write_text(
            CONFIGURATION.format(fsid=uuid.uuid4(), folder=folder, monitor=monitor, gateway=gateway)
        )

    def start(self) -> None:
        self._done("ceph-mon", "--id", "a", "--mkfs")
        self._daemon("ceph-mon", "--id", "a")
        disk = str(uuid.uuid4())
        self._done("ceph", "osd", "new", disk)
        self._done("ceph-osd", "--id", "0", "--mkfs", "--osd-uuid", disk)
        self._daemon("ceph-osd", "--id", "0")
        keys = ("--access-key", self.store.key, "--secret", self.store.secret)
        self._done("radosgw-admin", "user", "create", "--uid", "test", "--display-name", "test", *keys)
        self._daemon("radosgw", "--name", "client.gateway")
        self._wait_for_answer()

    def stop(self) -> None:
        """At once: nothing is kept."""
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()

    def _done(self, program: str, *options: str) -> None:
        command = [program, "--conf", str(self._folder / "ceph.conf"), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=STARTS_WITHIN)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr[-2000:]}")

    def _daemon(self, program: str, *options: str) -> None:
        # Dies with its parent, also where that is killed.
        command = ["setpriv", "--pdeathsig", "KILL", program, "--conf", str(self._folder / "ceph.conf"), *options, "-f"]
        with open(self._folder / f"{program}.out", "wb") as out:
            self._daemons.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out))

    def _wait_for_answer(self) -> None:
        deadline = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < deadline and self._daemons[-1].poll() is None:
            try:
                connection = http.client.HTTPConnection(self.store.host, self.store.port, timeout=5)
                connection.request("GET", "/")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"radosgw does not answer: {(self._folder / 'radosgw.out').read_text()[-2000:]}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


STORES = {"moto": faulty_s3.moto, "radosgw": running}
"""What the tests of S3 and the drill can be run against."""
