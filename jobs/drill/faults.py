"""What can go wrong, one class a kind. `prepare` comes before the driver starts, `strike` at the drawn time, `ended`
whenever a driver has ended, `restore` after all; each may raise Missed or Failure."""

import json
import os
import re
import signal
import subprocess
import time

from jobs.drill.host import Host, possible
from jobs.drill.place import Failure, Missed, Trial, busy


class Fault:
    name: str
    configuration, compared_with = "digits", "digits"
    needs_root = False
    timed = True
    """Whether it strikes at a time; else it is there from the beginning."""

    def prepare(self, trial: Trial) -> None:
        pass

    def strike(self, trial: Trial) -> None:
        pass

    def ended(self, trial: Trial, code: int) -> None:
        pass

    def restore(self, trial: Trial) -> None:
        pass


# -------------------------------------------------------------------------------------------------------- processes


class DriverKilled(Fault):
    name = "driver killed"
    signal = signal.SIGKILL

    def strike(self, trial: Trial) -> None:
        trial.driver.send_signal(self.signal)
        trial.injected += 1


class DriverTerminated(DriverKilled):
    name = "driver terminated"
    signal = signal.SIGTERM


class WorkerKilled(Fault):
    name = "worker killed"

    def strike(self, trial: Trial) -> None:
        trial.wait_until(lambda: bool(trial.place.workers()), "a worker is at work")
        for worker in trial.rng.sample(trial.place.workers(), 1):
            trial.note(f"killing {worker.cmdline()[0]}")
            worker.kill()
            trial.injected += 1


class NodeKilled(Fault):
    """A node of the cluster, for good; another comes a little later."""

    name = "node killed"

    def strike(self, trial: Trial) -> None:
        trial.place.lose_node(trial.rng)
        trial.injected += 1
        time.sleep(trial.rng.uniform(1, 15))
        trial.place.mend_ray()


class ClusterLost(Fault):
    """All nodes with the head; another cluster comes, and with its address the same command again."""

    name = "cluster lost"

    def strike(self, trial: Trial) -> None:
        trial.place.lose_ray()
        trial.injected += 1
        trial.wait()
        trial.place.start_ray()


class HostCutOff(Fault):
    """A host with half of the places, whose cable is cut: for good, or until its node has been given up."""

    name, needs_root = "host cut off", True
    host: Host | None = None

    def prepare(self, trial: Trial) -> None:
        self.host = trial.place.add_host(trial.log)

    def strike(self, trial: Trial) -> None:
        trial.wait_until(lambda: bool(self._busy()), "a worker is at work on the host")
        trial.note(f"cutting off {', '.join(worker.cmdline()[0] for worker in self._busy())}")
        self.host.cut()
        trial.injected += 1
        if trial.rng.random() < 0.5:
            until = time.monotonic() + 90.0
            while trial.running() and time.monotonic() < until:
                time.sleep(0.1)
            self.host.mend()
            trial.note("the cable is mended")

    def restore(self, trial: Trial) -> None:
        if self.host:
            self.host.close()
            self.host = None

    def _busy(self) -> list:
        raylet = self.host.raylet()
        return busy([raylet]) if raylet else []


# -------------------------------------------------------------------------------------------------------------- S3


class StoreTrouble(Fault):
    """Of the requests of some seconds, and until enough have met it, a share goes wrong."""

    fault: str
    seconds, share, least, most = 10.0, 0.2, 3, 10**6

    def strike(self, trial: Trial) -> None:
        s3 = trial.place.s3
        s3.injected.clear()
        s3.stall_seconds = 35.0  # longer than the client waits for an answer

        def choose(method: str, path: str) -> str | None:
            met = s3.injected[self.fault] < self.most and trial.rng.random() < self.share
            return self.fault if met else None

        s3.choose, until = choose, time.monotonic() + self.seconds
        while trial.running() and (time.monotonic() < until or s3.injected[self.fault] < self.least):
            time.sleep(0.05)
        self.restore(trial)
        trial.injected += s3.injected[self.fault]
        if not trial.injected:
            raise Missed(self.fault)

    def restore(self, trial: Trial) -> None:
        trial.place.s3.choose = lambda method, path: None


class Throttled(StoreTrouble):
    name, fault, share = "S3: 503", "slow_down", 0.7


class Reset(StoreTrouble):
    name, fault = "S3: reset", "reset"


class AnswerLost(StoreTrouble):
    """Done, and nobody hears of it."""

    name, fault = "S3: answer lost", "lost"


class Errors(StoreTrouble):
    """Done, and said to have failed."""

    name, fault = "S3: 500", "error"


class Stalled(StoreTrouble):
    name, fault, share, least, most = "S3: stall", "stall", 1.0, 2, 2


class Truncated(StoreTrouble):
    name, fault = "S3: truncated", "truncate"


# ------------------------------------------------------------------------------------------------- disks and objects


class DiskFull(Fault):
    """The run's directory lies on a disk that has no room for it; when a driver ends of that, the disk grows."""

    name, timed, needs_root = "disk full", False, True

    def prepare(self, trial: Trial) -> None:
        trial.out = str(trial.place.scratch / "disk" / trial.log.name)
        os.makedirs(trial.out)
        size = 4 * max(16, int(trial.fraction * trial.undisturbed.blocks))
        trial.note(f"a disk of {size} KiB")
        self._mount(trial, f"size={size}k")

    def strike(self, trial: Trial) -> None:
        if trial.wait() == 0:
            raise Missed("there is room enough")
        if "No space left on device" not in trial.said():
            raise Failure(f"expected a word of the full disk: {trial.said()[-500:]}")
        trial.injected += 1
        self._mount(trial, "remount,size=1g")

    def restore(self, trial: Trial) -> None:
        if os.path.ismount(trial.out):
            subprocess.run(["umount", "--lazy", trial.out], check=True)

    @staticmethod
    def _mount(trial: Trial, options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", trial.out], check=True)


class ShardDamaged(Fault):
    """Bytes of a shard of the finished pool change; once a driver stumbled over it, the right object comes back."""

    name = "shard damaged"

    def strike(self, trial: Trial) -> None:
        trial.wait_until(lambda: trial.exists("pool/manifest.json"), "the pool is built")
        self.shard = trial.rng.choice(list(trial.files("pool/pool")))
        self.data = trial.read(self.shard)
        damaged = bytearray(self.data)
        for _ in range(16):
            damaged[trial.rng.randrange(len(damaged))] ^= 1 << trial.rng.randrange(8)
        trial.write(self.shard, bytes(damaged))
        trial.injected += 1

    def ended(self, trial: Trial, code: int) -> None:
        if trial.starts > 1 and code:
            raise Failure(f"the shard is whole again, and yet: {trial.said()[-500:]}")
        if trial.starts == 1:
            trial.note("stumbled" if code else "nobody read it any more")
            if code and self.shard not in trial.said().strip().rsplit("raypfk: ", 1)[-1]:
                raise Failure(f"expected an error that names {self.shard}: {trial.said()[-500:]}")
            trial.write(self.shard, self.data)


class ImagesCorrupt(Fault):
    """A pool by reference, and from its beginning some of the images are garbage, of another kind in each run; what is
    undisturbed is a run whose pool was copied from such images, and refused them."""

    name, timed, configuration, compared_with = "images corrupt", False, "by reference", "copied"

    def prepare(self, trial: Trial) -> None:
        self.spoilt = trial.place.spoil(trial.rng)
        trial.injected += len(self.spoilt)

    def ended(self, trial: Trial, code: int) -> None:
        if code:
            raise Failure(f"expected that the others go on: {trial.said()[-500:]}")
        rejected = set(trial.ids("rounds/001/rejects"))
        if rejected != set(self.spoilt):
            raise Failure(f"expected the rejects {self.spoilt}, found {sorted(rejected)}")


# ----------------------------------------------------------------------------------------------------------- leases


class LeaseRanOut(Fault):
    """The driver stands still until a second one takes its lease, and goes on beside it: it must end itself."""

    name = "lease ran out"

    def strike(self, trial: Trial) -> None:
        trial.wait_until(lambda: trial.exists("lease.json"), "the lease is taken")
        first = trial.driver
        first.send_signal(signal.SIGSTOP)
        trial.injected += 1
        second = trial.start()
        trial.wait_until(lambda: _holder(trial) == second.pid, "the second driver holds the lease")
        time.sleep(trial.rng.uniform(0, 20))
        first.send_signal(signal.SIGCONT)
        code, said = trial.wait(first), trial.log_of(trial.starts - 1).read_text(errors="replace")
        trial.note(f"the first driver ended with {code}")
        if code != 1 or "after this driver was away for too long" not in said:
            raise Failure(f"expected that the first driver finds its lease lost: {code}, {said[-500:]}")


class TwoDrivers(Fault):
    """The same command a second time meanwhile: it is refused, and the first goes on. Where the first was through and
    had given its lease back, the second finds all done."""

    name = "two drivers"

    def strike(self, trial: Trial) -> None:
        trial.wait_until(lambda: trial.exists("lease.json"), "the lease is taken")
        first = trial.driver
        second = trial.start()
        trial.injected += 1
        code = trial.wait(second)
        refused = code == 2 and "one driver at a time" in trial.said()
        late = code == 0 and not re.search(r"round \d+: \w+ in", trial.said()) and trial.wait(first) == 0
        if not refused and not late:
            raise Failure(f"expected that the second driver is refused: {code}, {trial.said()[-500:]}")
        trial.driver = first


def _holder(trial: Trial) -> int | None:
    try:
        return json.loads(trial.read("lease.json"))["pid"]
    except (OSError, ValueError):
        return None


_ALL = (
    DriverKilled(),
    DriverTerminated(),
    WorkerKilled(),
    NodeKilled(),
    ClusterLost(),
    HostCutOff(),
    Throttled(),
    Reset(),
    AnswerLost(),
    Errors(),
    Stalled(),
    Truncated(),
    DiskFull(),
    ShardDamaged(),
    ImagesCorrupt(),
    LeaseRanOut(),
    TwoDrivers(),
)
FAULTS = {fault.name: fault for fault in _ALL if not fault.needs_root or possible()}
LEFT_OUT = [fault.name for fault in _ALL if fault.name not in FAULTS]
"""What only root can do on Linux, where this is not."""
