"""One driver at a time, on this machine's files and in S3: who comes second is refused, who died is succeeded."""

import os
import subprocess
import sys
import threading
import time

import pytest

from raypfk import lease, store
from raypfk.config import DataConfig
from raypfk.errors import UserError
from raypfk.filesystems import Local
from raypfk.lease import Lease, Lost
from raypfk.stages import pool

LASTS = 2.0


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "run")
    return f"s3://{request.getfixturevalue('s3').bucket}/run"


def test_a_second_driver_is_refused_while_the_first_renews(place):
    """Named with process and host; and welcome once the first has given it back."""
    first, second = Lease(place, LASTS), Lease(place, LASTS)
    first.take()
    threading.Thread(target=first.keep, daemon=True).start()
    with pytest.raises(UserError, match=r"lease\.json: process \d+ of .* is at work here; expected one driver"):
        second.take()
    first.check()
    first.give_back()
    assert not store.exists(first.uri)
    second.take()
    second.give_back()


def test_of_many_drivers_one_begins(place):
    leases, begun, lock = [Lease(place, LASTS) for _ in range(6)], [], threading.Lock()

    def drive(one: Lease) -> None:
        try:
            one.take()
        except UserError:
            return
        threading.Thread(target=one.keep, daemon=True).start()
        with lock:
            begun.append(one)

    threads = [threading.Thread(target=drive, args=(one,)) for one in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(begun) == 1
    begun[0].give_back()


def test_a_lease_that_ran_out_is_taken_and_its_holder_stops(place):
    """A driver that was away for too long may not say that anything is done."""
    first, second = Lease(place, LASTS), Lease(place, LASTS)
    first.take()
    began = time.monotonic()
    second.take()
    assert LASTS / 2 < time.monotonic() - began < 3 * LASTS
    with pytest.raises(Lost, match="held by process"):
        first.check()
    with pytest.raises(Lost):
        first.renew()
    first.give_back()
    second.check()
    second.give_back()


def test_a_killed_driver_is_succeeded_at_once(place):
    """Its lease has an hour to go, but its process is seen to be gone."""
    code = f"from raypfk.lease import Lease; Lease({place!r}, 3600).take(); import os; os._exit(9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert store.exists(store.join(place, lease.NAME))
    began = time.monotonic()
    with lease.held(place, 3600):
        assert time.monotonic() - began < 5
        with lease.held(place):  # within, it is this process's already
            lease.check(place)
    assert not store.exists(store.join(place, lease.NAME))


def test_a_renewal_that_was_heard_and_said_to_have_failed_is_ones_own(place):
    one = Lease(place, LASTS)
    one.take()
    store.write_bytes(store.join(place, lease.NAME), one._data())
    one.renew()
    one.renew()
    one.give_back()
    assert not store.exists(store.join(place, lease.NAME))


@pytest.mark.parametrize(
    ("changed", "gone"),
    [
        ({}, False),
        ({"pid": 4194305}, True),
        ({"started": "1"}, True),
        ({"boot": "x"}, False),
        ({"namespace": "x"}, False),
    ],
)
def test_a_process_is_gone_only_where_that_can_be_seen(changed, gone):
    """Of another boot, another container or another user it cannot."""
    holder = {"pid": os.getpid(), **lease._process(), **changed}
    assert lease._is_gone(holder) == gone


def test_a_hidden_process_may_be_alive(monkeypatch):
    def kill(pid, signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert not lease._is_gone({"pid": 1, **lease._process()})


def test_a_lease_that_is_not_one_is_not_obeyed_for_ever(place):
    store.write_bytes(store.join(place, lease.NAME), b"\x00not json")
    one = Lease(place, LASTS)
    one.take()
    one.give_back()


def test_a_store_that_refuses_all_conditional_writes_is_named(tmp_path, monkeypatch):
    one = Lease(str(tmp_path), 0.2)
    monkeypatch.setattr(Local, "create", lambda *args: None)
    with pytest.raises(UserError, match=r"lease\.json: cannot be written: the store refuses conditional writes"):
        one.take()


def test_without_a_lease_there_is_nothing_to_check(place):
    lease.check(place)


def test_who_lost_the_lease_deletes_no_pool(tmp_path):
    """A driver that stood still before it deleted half a pool, and goes on when another has finished it."""
    dest, shard = str(tmp_path), store.join(str(tmp_path), "pool", "00000.parquet")
    for path in (store.join(dest, pool.BUILDING, pool.BEGUN), shard):
        store.write_bytes(path, b"{}")
    with lease.held(dest, LASTS / 10):
        store.write_bytes(store.join(dest, lease.NAME), b"another's")
        time.sleep(LASTS / 5)
        with pytest.raises(Lost):
            pool._build(DataConfig(source="digits", validation=10, test=10), dest, 0, None)
    assert store.read_bytes(shard) == b"{}"
