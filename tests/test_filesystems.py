"""This machine's files and S3 over HTTP keep the same promises; what may pass is tried again, what may not is named."""

import errno
import hashlib
import os
import threading
import time

import pyarrow as pa
import pytest
from botocore.exceptions import ClientError

from raypfk import retry, store
from raypfk.errors import UserError
from raypfk.filesystems import Arrow, Entry, Local, TooLong
from raypfk.retry import GaveUp, Transient, retried
from tests.conftest import STORE


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "root")
    return f"s3://{request.getfixturevalue('s3').bucket}/some/root"


@pytest.fixture
def quick(monkeypatch):
    """Pauses between tries as short as a test wants."""
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)


# ------------------------------------------------------------------------------------------------- what all must do


def test_files_are_written_read_listed_and_deleted(root):
    fs, path = store.resolve(root)
    assert not store.exists(root) and store.names(root) == []
    for name in ("b.txt", "a.txt", "deep/er/c.txt"):
        store.write_bytes(store.join(root, name), name.encode())
    assert store.read_bytes(store.join(root, "deep/er/c.txt")) == b"deep/er/c.txt"
    assert store.names(root, ".txt") == ["a.txt", "b.txt"]
    assert set(fs.list(path)) == {Entry("a.txt", False), Entry("b.txt", False), Entry("deep", True)}
    assert {entry.path for entry in fs.list(path, recursive=True)} == {"a.txt", "b.txt", "deep/er/c.txt"}
    assert store.exists(store.join(root, "deep")) and store.exists(store.join(root, "a.txt"))
    assert not store.exists(store.join(root, "a.tx")) and not store.exists(store.join(root, "deep/e"))
    assert fs.size(f"{path}/b.txt") == 5 and fs.size(f"{path}/deep") is None
    store.delete(store.join(root, "a.txt"))
    store.delete(store.join(root, "deep"))
    store.delete(store.join(root, "nothing"))
    assert {entry.path for entry in fs.list(path, recursive=True)} == {"b.txt"}


def test_what_pyarrow_alone_knows_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Its filesystem of local files stands for hdfs:// and the like, which have folders and renames."""
    fs, path = Arrow("file:///"), str(tmp_path / "deep/file")
    assert fs.version(path) is None and fs.size(path) is None and list(fs.list(str(tmp_path / "none"))) == []
    fs.write(path, b"old")
    assert (fs.read(path), fs.read_range(path, 1, 2), fs.size(path)) == (b"old", b"l", 3)
    with pytest.raises(TooLong, match="3 bytes, expected at most 2"):
        fs.read(path, 2)
    put = fs._put

    def broken(where, data):
        put(where, data[:2])
        raise PermissionError(13, "no more")

    monkeypatch.setattr(fs, "_put", broken)
    with pytest.raises(PermissionError):
        fs.write(path, b"newer")
    assert fs.read(path) == b"old" and list(fs.list(str(tmp_path), recursive=True)) == [Entry("deep/file", False)]
    fs.delete_folder(str(tmp_path / "deep"))
    assert not fs.is_folder(str(tmp_path / "deep"))


def test_of_many_that_create_one_file_one_does(root):
    fs, path = store.resolve(store.join(root, "file"))
    made = _at_once(8, lambda i: fs.create(path, f"by {i}".encode()))
    winners = [i for i, version in enumerate(made) if version]
    assert len(winners) == 1 and fs.read(path) == f"by {winners[0]}".encode()


def test_of_many_that_replace_one_version_one_does(root):
    fs, path = store.resolve(store.join(root, "file"))
    first = fs.create(path, b"first")
    made = _at_once(8, lambda i: fs.replace(path, f"by {i}".encode(), first))
    winners = [version for version in made if version]
    assert len(winners) == 1 and fs.read(path) == winners[0].data == fs.version(path).data
    assert fs.replace(path, b"late", first) is None and fs.replace(path, b"next", winners[0])
    fs.delete(path)
    assert fs.version(path) is None and fs.replace(path, b"gone", first) is None


def test_age_is_told_by_the_keeper_of_the_file(root):
    fs, path = store.resolve(store.join(root, "file"))
    assert fs.create(path, b"x").age < 3
    time.sleep(2.1)
    assert 1 <= fs.version(path).age < 6


def test_columns_of_a_table_are_fetched_alone(root):
    table = pa.table({"small": list(range(1000)), "large": [bytes([i % 256]) * 2000 for i in range(1000)]})
    uri = store.join(root, "table.parquet")
    store.write_table(uri, table, compression="none", use_dictionary=False)
    assert store.read_table(uri) == table
    assert store.read_table(uri, ["small"]) == table.select(["small"])
    with pytest.raises(UserError, match=r"none\.parquet: no such file"):
        store.read_table(store.join(root, "none.parquet"), ["small"])
    store.write_bytes(uri, store.read_bytes(uri)[:-1000])
    for columns in (None, ["small"]):
        with pytest.raises(UserError, match=r"table\.parquet: expected a whole Parquet file"):
            store.read_table(uri, columns)
    for broken in (b"", b"PAR1"):
        store.write_bytes(uri, broken)
        with pytest.raises(UserError, match=r"table\.parquet: expected a whole Parquet file"):
            store.read_table(uri, ["small"])


def _at_once(count: int, action) -> list:
    results, gate = [None] * count, threading.Barrier(count)

    def run(i: int) -> None:
        gate.wait()
        results[i] = action(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# ------------------------------------------------------------------------------------------------------- requests


def test_an_object_costs_one_request(s3):
    uri = f"s3://{s3.bucket}/key"
    store.write_bytes(uri, b"x" * 100_000)
    assert s3.requests == {"PUT": 1}
    store.read_bytes(uri)
    assert s3.requests == {"PUT": 1, "GET": 1}


def test_few_columns_cost_few_requests_and_bytes(s3):
    table = pa.table({"small": list(range(1000)), "large": [bytes([i % 256]) * 20_000 for i in range(1000)]})
    uri = f"s3://{s3.bucket}/table.parquet"
    store.write_table(uri, table, compression="none", use_dictionary=False)
    s3.requests.clear()
    store.read_table(uri, ["small"])
    assert s3.requests["GET"] <= 3 and s3.requests["HEAD"] == 0


def test_listings_come_in_pages(s3, monkeypatch):
    """A page for the folders, and as many as each of them needs."""
    from raypfk import s3 as client

    monkeypatch.setattr(client, "PAGE", 10)
    names = [f"f{i % 3}/{i:05d}" for i in range(45)]
    for name in names:
        s3.client.put_object(Bucket=s3.bucket, Key=f"root/{name}", Body=b"")
    fs, path = store.resolve(f"s3://{s3.bucket}/root")
    s3.requests.clear()
    assert sorted(entry.path for entry in fs.list(path, recursive=True)) == sorted(names)
    assert s3.requests["GET"] == 1 + 3 * 2
    store.delete(f"s3://{s3.bucket}/root")
    assert list(fs.list(path, recursive=True)) == []


# --------------------------------------------------------------------------------------------------------- trouble


@pytest.mark.parametrize("fault", ["slow_down", "error", "reset", "lost", "truncate"])
def test_what_may_pass_is_tried_again(s3, quick, fault):
    uri = f"s3://{s3.bucket}/key"
    s3.once(fault, fault, fault)
    store.write_bytes(uri, b"data" * 1000)
    s3.once(fault, fault, fault)
    assert store.read_bytes(uri) == b"data" * 1000
    s3.once(fault, fault)
    assert store.names(f"s3://{s3.bucket}") == ["key"]
    assert s3.injected[fault] >= 6


def test_a_stalled_answer_is_given_up_and_asked_for_again(s3, quick, monkeypatch):
    from raypfk import s3 as client

    monkeypatch.setitem(client.TIMEOUTS, "read_timeout", 1)
    client._client.cache_clear()
    store.write_bytes(f"s3://{s3.bucket}/key", b"data")
    s3.stall_seconds = 5
    s3.once("stall")
    began = time.monotonic()
    assert store.read_bytes(f"s3://{s3.bucket}/key") == b"data" and time.monotonic() - began < 4.5


@pytest.mark.parametrize("fault", ["lost", "error"])
def test_a_conditional_write_whose_answer_is_lost_still_counts(s3, quick, fault):
    fs, path = store.resolve(f"s3://{s3.bucket}/key")
    s3.once(fault, method="PUT")
    first = fs.create(path, b"mine")
    assert first and first.data == b"mine"
    s3.once(fault, method="PUT")
    assert fs.replace(path, b"mine too", first) and fs.create(path, b"another's") is None


def test_a_store_may_know_a_version_without_its_quotes_only(s3):
    """As Ceph's gateway does where a write is conditional."""
    from raypfk import s3 as client

    sent = []
    client._client().meta.events.register(
        "before-send.s3.PutObject", lambda request, **_: sent.append(request.headers.get("If-Match"))
    )
    fs, path = store.resolve(f"s3://{s3.bucket}/key")
    first = fs.create(path, b"first")
    s3.once("refused", method="PUT")
    assert fs.replace(path, b"second", first) and fs.read(path) == b"second"
    tag = hashlib.md5(b"first").hexdigest()
    assert [str(came, "ascii") for came in sent[1:]] == [f'"{tag}"', tag]
    assert fs.replace(path, b"late", first) is None


def test_what_stays_broken_is_given_up_with_its_name(s3, quick, monkeypatch):
    monkeypatch.setattr(retry, "GIVE_UP_AFTER", 0.05)
    s3.choose = lambda method, path: "slow_down"
    with pytest.raises(GaveUp, match=rf"s3://{s3.bucket}/key: failed \d+ times in \d+ s, last: .*SlowDown"):
        store.read_bytes(f"s3://{s3.bucket}/key")


def test_what_cannot_pass_fails_at_once_and_is_named(s3):
    with pytest.raises(UserError, match=rf"s3://{s3.bucket}/none: no such file"):
        store.read_bytes(f"s3://{s3.bucket}/none")
    with pytest.raises(UserError, match="no such bucket 'nowhere-at-all'"):
        store.read_bytes("s3://nowhere-at-all/key")
    with pytest.raises(FileNotFoundError, match=f"bucket '{s3.bucket}', key 'none'"):
        store.fetch(f"s3://{s3.bucket}/none")
    assert s3.requests["GET"] == 3


def test_access_denied_fails_at_once_and_is_named(s3):
    s3.once("denied", "denied")
    with pytest.raises(UserError, match=rf"access denied \(AccessDenied\): bucket '{s3.bucket}', key 'key'"):
        store.read_bytes(f"s3://{s3.bucket}/key")
    assert s3.requests["GET"] == 1


def test_an_error_may_come_without_a_message():
    from raypfk.s3 import _explained

    answer = {"Error": {"Code": "InvalidBucketName", "Message": None}, "ResponseMetadata": {"HTTPStatusCode": 400}}
    error = _explained(ClientError(answer, "GetObject"), "s3://b/key", "b", "key")
    assert type(error) is OSError and str(error) == "s3://b/key: 400 InvalidBucketName"


def test_an_object_that_changes_while_it_is_read_is_named(s3):
    uri = f"s3://{s3.bucket}/table.parquet"
    fs, path = store.resolve(uri)
    store.write_bytes(uri, b"x" * 200_000)
    stream = fs.open(path)
    store.write_bytes(uri, b"y" * 200_000)
    with pytest.raises(OSError, match="changed while it was read"):
        stream.read(10)


# ---------------------------------------------------------------------------------------------------- credentials


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:secret@bucket/x", "s3://", "s3://bucket:80/x", "s3:///x", "abfss://:secret@account/x",
        "abfss://box@account/x?client_secret=secret", "gs://user:secret@box/x", "hdfs://host/x?a=1&delegation_token=secret",
    ],
)  # fmt: skip
def test_keys_in_a_uri_are_refused_and_not_shown(uri):
    with pytest.raises(UserError, match=r"expected \w+://\w+/\w+; credentials come from") as refused:
        store.exists(uri)
    assert "secret" not in str(refused.value)


KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def _hide_keys(monkeypatch, tmp_path) -> None:
    """There are none anywhere that they are looked for."""
    for name in KEYS:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.parametrize("how", ["asked for", "no credentials"])
def test_public_buckets_are_read_unsigned(s3, monkeypatch, tmp_path, how):
    from raypfk import s3 as client

    s3.client.put_object(Bucket=s3.bucket, Key="key", Body=b"public", ACL="public-read")
    if how == "asked for":
        monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    else:
        _hide_keys(monkeypatch, tmp_path)
    client._client.cache_clear()
    s3.signed.clear()
    assert store.read_bytes(f"s3://{s3.bucket}/key") == b"public"
    assert s3.signed == [False]


def test_credentials_that_come_late_are_looked_for_again(s3, monkeypatch, tmp_path):
    """Of an instance whose metadata service was throttled: what was refused unsigned is asked for again, signed."""
    from raypfk import s3 as client

    store.write_bytes(f"s3://{s3.bucket}/key", b"private")
    keys = {name: os.environ[name] for name in KEYS}
    _hide_keys(monkeypatch, tmp_path)
    client._client.cache_clear()
    client._credentials_in.cache_clear()
    s3.signed.clear()
    s3.once("denied", "denied")
    with pytest.raises(PermissionError):
        store.fetch(f"s3://{s3.bucket}/key")
    client._credentials_in.cache_clear()  # a minute later
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    assert store.fetch(f"s3://{s3.bucket}/key") == b"private" and s3.signed == [False, False, True]


def test_requests_that_were_refused_together_are_all_signed_then(s3, monkeypatch, tmp_path):
    from raypfk import s3 as client

    store.write_bytes(f"s3://{s3.bucket}/key", b"private")
    monkeypatch.setattr(client.boto3.Session, "get_credentials", lambda session: None)
    client._client.cache_clear()
    client._credentials_in.cache_clear()
    client._client()
    monkeypatch.undo()
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    s3.once(*["denied"] * 8, method="GET")
    assert _at_once(8, lambda i: store.fetch(f"s3://{s3.bucket}/key")) == [b"private"] * 8


@pytest.mark.skipif(STORE == "moto", reason="moto checks no signatures")
@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "SignatureDoesNotMatch"),
        ("AWS_ACCESS_KEY_ID", "nobody", "InvalidAccessKeyId"),
        ("AWS_NO_SIGN_REQUEST", "1", "AccessDenied"),
    ],
)
def test_wrong_keys_or_none_fail_at_once_and_are_named(s3, monkeypatch, name, value, code):
    from raypfk import s3 as client

    store.write_bytes(f"s3://{s3.bucket}/key", b"private")
    monkeypatch.setenv(name, value)
    client._client.cache_clear()
    s3.requests.clear()
    for action in (store.read_bytes, store.names, lambda uri: store.write_bytes(uri, b"")):
        with pytest.raises(UserError, match=rf"access denied \({code}\): bucket '{s3.bucket}', key 'key'"):
            action(f"s3://{s3.bucket}/key")
    assert s3.requests == {"GET": 2, "PUT": 1}


def test_secrets_in_an_error_are_not_shown():
    from raypfk.s3 import _without_secrets

    text = _without_secrets("GET https://b/k?X-Amz-Credential=AKIA123&X-Amz-Signature=abc&x=1 failed")
    assert "AKIA123" not in text and "abc" not in text and "x=1 failed" in text


# ----------------------------------------------------------------------------------------------------------- pauses


def test_pauses_double_up_to_a_limit_with_full_jitter(monkeypatch):
    asked = []
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: asked.append((low, high)) or high)
    clock = [0.0]

    def fail():
        raise Transient("no")

    with pytest.raises(GaveUp, match=r"it: failed 15 times in 1[0-9]+ s, last: no"):
        retried(fail, "it", sleep=lambda s: clock.__setitem__(0, clock[0] + s), clock=lambda: clock[0])
    assert [high for _, high in asked][:8] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 20.0] and max(asked) == (0, 20.0)


def test_a_full_disk_names_the_file_and_leaves_what_was_there(tmp_path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/file'"):
        Local().write(str(path), b"after")
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["file"]
