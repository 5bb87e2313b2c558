"""One driver at a time: whoever writes a run or a pool holds its lease, a small file that it keeps renewing.

The lease is taken and renewed by conditional writes (create where nothing is; replace what was read), so of two that
come at once one wins. How old it is, is told by the clock of the store. A driver that was killed renews no more: its
lease may be taken when it has run out, or at once where it is seen that the process is gone.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from raypfk import progress, store
from raypfk.errors import RunError, UserError
from raypfk.filesystems import Version

NAME = "lease.json"
LASTS = 60.0
"""Seconds without a renewal after which a lease may be taken by another."""


class Lost(RunError):
    """Another took the lease: this driver was away for too long, and must not write any more."""


class Lease:
    def __init__(self, uri: str, lasts: float = LASTS):
        self.uri, self._lasts = store.join(uri, NAME), lasts
        self._fs, self._path = store.resolve(self.uri)
        self._owner = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), **_process()}
        self._version: Version | None = None
        self._ends = 0.0
        self._lock, self._stop = threading.Lock(), threading.Event()

    def take(self) -> None:
        """UserError that names the holder where it is another's, and is renewed."""
        seen: str | None = None
        deadline, pause = _clock() + 1.5 * self._lasts, min(1.0, self._lasts / 20)
        while True:
            asked = _clock()
            there = self._fs.version(self._path)
            free = there is None or self._is_over(there)
            if free:
                write = self._fs.create if there is None else self._fs.replace
                given = (self._path, self._data()) + (() if there is None else (there,))
                self._version = write(*given)
                if self._version:
                    self._ends = asked + self._lasts
                    return
                if _clock() > deadline:
                    raise UserError(f"{self.uri}: cannot be written: the store refuses conditional writes")
                time.sleep(pause)
                continue  # another was quicker: see whether it stays
            if (seen is not None and there.token != seen) or _clock() > deadline:
                holder = _holder(there)
                raise UserError(f"{self.uri}: {holder} is at work here; expected one driver at a time")
            if seen is None:
                progress.current().say(f"{self.uri}: held by {_holder(there)}, seen {there.age:.0f} s ago: waiting")
            seen = there.token
            time.sleep(pause)

    def renew(self) -> None:
        """Raises Lost where it is another's now."""
        with self._lock:
            asked = _clock()
            now = self._fs.replace(self._path, self._data(), self._version)
            there = None if now else self._fs.version(self._path)
            if there and _read(there).get("owner") == self._owner["owner"]:
                # Ours, of a renewal that was heard although it was said to have failed.
                now = self._fs.replace(self._path, self._data(), there)
            if now is None:
                who = _holder(there) if there else "nobody"
                self._ends = 0.0
                raise Lost(f"{self.uri}: held by {who} now, after this driver was away for too long")
            self._version, self._ends = now, asked + self._lasts

    def check(self) -> None:
        """Before anything is said to be done: raises Lost where the lease may be another's."""
        if _clock() > self._ends - self._lasts / 2:
            self.renew()

    def keep(self) -> None:
        """Renews until `give_back`. Trouble of the store is left to the next turn: the lease may outlast it."""
        while not self._stop.wait(self._lasts / 4):
            try:
                self.renew()
            except Lost:
                return  # `check` says so where it matters
            except Exception:
                continue

    def give_back(self) -> None:
        self._stop.set()
        with self._lock, suppress(Exception):
            there = self._fs.version(self._path)
            if there and self._version and there.token == self._version.token:
                self._fs.delete(self._path)

    def _data(self) -> bytes:
        return json.dumps({**self._owner, "renewed": time.time()}).encode()

    def _is_over(self, there: Version) -> bool:
        return there.age > self._lasts or _is_gone(_read(there))


_held: dict[str, Lease] = {}


@contextmanager
def held(uri: str, lasts: float = LASTS) -> Iterator[None]:
    """The lease of a run or a pool while it is worked at; this process may ask for it again within."""
    if uri in _held:
        yield
        return
    lease = _held[uri] = Lease(uri, lasts)
    try:
        lease.take()
        threading.Thread(target=lease.keep, name="lease", daemon=True).start()
        yield
    finally:
        del _held[uri]
        lease.give_back()


def check(uri: str) -> None:
    """Before anything at `uri` is said to be done: raises Lost where this process's lease may be another's now."""
    if uri in _held:
        _held[uri].check()


def _clock() -> float:
    """Seconds that pass while a machine sleeps, too, where they can be had."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _process() -> dict[str, str]:
    """What tells this process from a later one of the same number, and from one of another container."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot, open("/proc/self/stat") as stat:
            started = stat.read().rsplit(")", 1)[1].split()[19]
            return {"boot": boot.read().strip(), "namespace": os.readlink("/proc/self/ns/pid"), "started": started}
    except OSError:  # not Linux
        return {}


def _is_gone(holder: dict) -> bool:
    """Whether the holder is a process of this machine's that has ended."""
    mine = _process()
    if not mine or any(holder.get(name) != mine[name] for name in ("boot", "namespace")):
        return False
    try:
        os.kill(int(holder["pid"]), 0)
        with open(f"/proc/{int(holder['pid'])}/stat") as stat:
            state, *rest = stat.read().rsplit(")", 1)[1].split()
    except (ProcessLookupError, KeyError, ValueError, TypeError, ArithmeticError):
        return True
    except OSError:  # another user's, and hidden
        return False
    return state == "Z" or rest[18] != holder.get("started")


def _read(there: Version) -> dict:
    try:
        holder = json.loads(there.data)
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _holder(there: Version) -> str:
    holder = _read(there)
    return f"process {holder.get('pid', '?')} of {holder.get('host', 'an unknown host')}"
