"""A host for a node of Ray: a network namespace at the end of a cable that can be cut. Linux, and root, only."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


def possible() -> bool:
    if os.geteuid() != 0:
        return False
    with suppress(OSError):
        return subprocess.run(["ip", "netns", "list"], capture_output=True).returncode == 0
    return False


class Host:
    """number: of 0 to 60; hosts of the same number have the same address."""

    def __init__(self, number: int):
        self.name = f"drill{os.getpid()}-{number}"
        here, self.cable = f"d{os.getpid()}h{number}", f"d{os.getpid()}n{number}"
        self.address = f"10.213.77.{4 * number + 2}"
        _ip("netns", "add", self.name)
        _ip("link", "add", here, "type", "veth", "peer", "name", self.cable, "netns", self.name)
        _ip("address", "add", f"10.213.77.{4 * number + 1}/30", "dev", here)
        _ip("link", "set", here, "up")
        for command in (
            f"address add {self.address}/30 dev {self.cable}",
            f"link set {self.cable} up",
            "link set lo up",
            f"route add default via 10.213.77.{4 * number + 1}",
        ):
            _ip("-n", self.name, *command.split())

    def start_ray(self, head: str, cpus: int, log: Path) -> None:
        """A node of the cluster, in the background."""
        ray = [Path(sys.executable).parent / "ray", "start", "--block", "--disable-usage-stats"]
        options = [f"--address={head}", f"--node-ip-address={self.address}", f"--num-cpus={cpus}"]
        with log.open("wb") as stream:
            subprocess.Popen(
                ["ip", "netns", "exec", self.name, *ray, *options, "--object-store-memory=157286400"],
                stdout=stream, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def processes(self) -> list[int]:
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(pid) for pid in done.stdout.split()]

    def raylet(self) -> int | None:
        """Its process's number, where it runs yet."""
        for pid in self.processes():
            with suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(b"/raylet"):
                    return pid
        return None

    def cut(self) -> None:
        """From now on nothing comes, and nothing goes."""
        _ip("-n", self.name, "link", "set", self.cable, "down")

    def mend(self) -> None:
        _ip("-n", self.name, "link", "set", self.cable, "up")

    def close(self) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _ip("netns", "del", self.name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
