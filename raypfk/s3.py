"""S3, and stores that speak as it does, through boto3: one set of rules for credentials, retries and errors.

Credentials come from AWS's standard chain (environment, profile, web identity, container, instance); where it finds
none, or AWS_NO_SIGN_REQUEST is set, requests go unsigned, as public buckets take them. AWS_ENDPOINT_URL names another
store. Every request that may pass is tried again (retry.py); 403 and 404 are final, and name bucket and key.
"""

import io
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any

import boto3
import botocore.exceptions as boto_errors
import pyarrow as pa
from botocore import UNSIGNED
from botocore.config import Config

from raypfk.errors import UserError
from raypfk.filesystems import Entry, Filesystem, TooLong, Version
from raypfk.retry import Transient, retried

CONNECTIONS = 64
"""Requests that one process may have in flight."""
LISTERS = 16
PAGE = 1000
TAIL = 1 << 16
"""Bytes of an object's end that its first request brings: Parquet's footer, mostly."""
TIMEOUTS = {"connect_timeout": 10, "read_timeout": 30}
LOOK_AGAIN = 60.0
"""Seconds between two looks for credentials, where there were none."""
_AGAIN = frozenset((408, 409, 425, 429, 500, 502, 503, 504))
_AGAIN_CODES = frozenset(("RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "IncompleteBody"))
_BROKEN = (
    boto_errors.HTTPClientError,  # time-outs, resets, refused connections
    boto_errors.IncompleteReadError,
    boto_errors.ResponseStreamingError,
    boto_errors.CredentialRetrievalError,  # the instance's metadata service is throttled, too
    ConnectionError,
    TimeoutError,
)
_FINAL = (boto_errors.SSLError, boto_errors.ProxyConnectionError)


def _unsigned() -> bool:
    return os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "yes", "true")


@lru_cache(maxsize=1)
def _client():
    session = boto3.Session()
    options = {"signature_version": UNSIGNED} if _unsigned() or session.get_credentials() is None else {}
    config = Config(
        max_pool_connections=CONNECTIONS,
        retries={"total_max_attempts": 1},  # retry.py's turn: it also covers what breaks while a body is read
        # Stores other than Amazon's often do not know the checksums that newer clients add to every request.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        **TIMEOUTS,
        **options,
    )
    region = session.region_name or "us-east-1"
    return session.client("s3", region_name=region, config=config)


def _is_signed_now(refused: Any) -> bool:
    """Of a client that was refused: whether it was unsigned for lack of credentials, and there are some now. An
    instance's metadata service that is throttled seems to have none."""
    if _unsigned() or refused.meta.config.signature_version is not UNSIGNED:
        return False
    if _client() is refused:  # else another thread has been here
        if not _credentials_in(int(time.monotonic() // LOOK_AGAIN)):
            return False
        _client.cache_clear()
    return True


@lru_cache(maxsize=1)
def _credentials_in(_: int) -> bool:
    return boto3.Session().get_credentials() is not None


class S3(Filesystem):
    """Paths are "bucket/key"."""

    def read(self, path: str, most: int | None = None) -> bytes:
        def get(at: dict[str, str]) -> bytes:
            answer = _client().get_object(**at)
            if most is not None and answer["ContentLength"] > most:
                answer["Body"].close()
                raise TooLong(f"s3://{path}", answer["ContentLength"], most)
            return self._whole(answer)

        return self._do(path, get)

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        return self.range(path, start, stop)[0] if stop > start else b""

    def range(self, path: str, start: int, stop: int, token: str | None = None) -> tuple[bytes, int, str]:
        """Bytes [start, stop), or the last -start of them; the object's size; a token of what it is now.

        OSError where it is no longer what `token` says.
        """
        wanted = f"bytes={start}" if start < 0 else f"bytes={start}-{stop - 1}"

        def get(at: dict[str, str]) -> tuple[bytes, int, str]:
            same = {"IfMatch": token} if token else {}
            try:
                answer = _client().get_object(**at, Range=wanted, **same)
            except boto_errors.ClientError as error:
                if _status(error) == 416:  # nothing in an empty object
                    return b"", 0, ""
                if _status(error) == 412:
                    raise OSError(f"s3://{path}: it changed while it was read") from None
                raise
            data = self._whole(answer)
            size = answer.get("ContentRange", f"/{len(data)}").rsplit("/", 1)[1]
            return data, int(size), answer["ETag"]

        return self._do(path, get)

    def open(self, path: str) -> "_Parts":
        return _Parts(self, path)

    @staticmethod
    def _whole(answer: dict[str, Any]) -> bytes:
        data, expected = answer["Body"].read(), answer["ContentLength"]
        if len(data) != expected:
            raise Transient(f"{len(data)} of {expected} bytes came")
        return data

    def write(self, path: str, data: Any) -> None:
        self._do(path, lambda at: _client().put_object(**at, Body=pa.BufferReader(data)))

    def create(self, path: str, data: bytes) -> Version | None:
        return self._conditionally(path, data, IfNoneMatch="*")

    def replace(self, path: str, data: bytes, version: Version) -> Version | None:
        made = self._conditionally(path, data, IfMatch=version.token)
        there = None if made else self.version(path)
        if there is not None and there.token == version.token:
            # Refused, though nobody wrote: Ceph's gateway takes an ETag in its quotes for reading, not for writing.
            made = self._conditionally(path, data, IfMatch=version.token.strip('"'))
        return made

    def _conditionally(self, path: str, data: bytes, **condition: str) -> Version | None:
        def put(at: dict[str, str]) -> Version | None:
            try:
                _client().put_object(**at, Body=data, **condition)
            except boto_errors.ClientError as error:
                if _status(error) in (404, 412):
                    return None
                raise
            return self.version(path)

        made = self._do(path, put)
        # A try that seemed to fail may have been heard, and some stores pass over the condition.
        found = self.version(path) if made is None else made
        return found if found is not None and found.data == bytes(data) else None

    def version(self, path: str) -> Version | None:
        def get(at: dict[str, str]) -> Version:
            answer = _client().get_object(**at)
            now = _date(answer["ResponseMetadata"]["HTTPHeaders"].get("date")) or answer["LastModified"]
            age = max(0.0, (now - answer["LastModified"]).total_seconds())
            return Version(self._whole(answer), answer["ETag"], age)

        try:
            return self._do(path, get)
        except FileNotFoundError:
            return None

    def size(self, path: str) -> int | None:
        try:
            return self._do(path, lambda at: _client().head_object(**at)["ContentLength"])
        except FileNotFoundError:
            return None

    def is_folder(self, path: str) -> bool:
        return next(iter(self._pages(path, "", "/", 1)), None) is not None

    def list(self, path: str, recursive: bool = False) -> Iterator[Entry]:
        """Pages follow one another; of a tree, the folders directly below `path` are listed at the same time."""
        below: list[str] = []
        for entry in self._pages(path, "", "/"):
            if entry.is_folder and recursive:
                below.append(entry.path)
            else:
                yield entry
        with ThreadPoolExecutor(LISTERS) as threads:
            for entries in threads.map(lambda name: list(self._pages(path, name + "/", "")), below):
                yield from entries

    def _pages(self, path: str, below: str, delimiter: str, most: int | None = None) -> Iterator[Entry]:
        """Entries below path/below; their paths are relative to `path`."""
        key = path.partition("/")[2].strip("/")
        root = key + "/" if key else ""
        options: dict[str, Any] = {"Prefix": root + below, "Delimiter": delimiter, "MaxKeys": most or PAGE}
        while True:
            page = self._do(path, lambda at, o=options: _client().list_objects_v2(Bucket=at["Bucket"], **o))
            for item in page.get("CommonPrefixes", ()):
                yield Entry(item["Prefix"].removeprefix(root).rstrip("/"), True)
            for item in page.get("Contents", ()):
                name = item["Key"].removeprefix(root)
                if name and not name.endswith("/"):  # keys that stand for folders
                    yield Entry(name, False)
            if not page.get("IsTruncated"):
                return
            options["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, path: str) -> None:
        self._do(path, lambda at: _client().delete_object(**at))

    def delete_folder(self, path: str) -> None:
        bucket, _, root = path.rstrip("/").partition("/")
        keys = [f"{root}/{entry.path}" for entry in self.list(path, recursive=True)]
        for start in range(0, len(keys), 1000):
            wanted = {"Objects": [{"Key": key} for key in keys[start : start + 1000]], "Quiet": True}
            answer = self._do(path, lambda at, w=wanted: _client().delete_objects(Bucket=at["Bucket"], Delete=w))
            if errors := answer.get("Errors"):
                raise OSError(f"s3://{bucket}/{errors[0]['Key']}: cannot be deleted: {errors[0]['Code']}")

    def _do(self, path: str, request: Callable[[dict[str, str]], Any]) -> Any:
        bucket, _, key = path.partition("/")
        at, uri = {"Bucket": bucket, "Key": key}, f"s3://{path}"

        def attempt() -> Any:
            client = _client()
            try:
                return request(at)
            except boto_errors.ClientError as error:
                if _status(error) in (401, 403) and _is_signed_now(client):
                    raise Transient from error
                raise _explained(error, uri, bucket, key) from error
            except _FINAL as error:
                raise OSError(f"{uri}: {_without_secrets(str(error))}") from None
            except _BROKEN as error:
                raise Transient from error
            except (boto_errors.BotoCoreError, ValueError) as error:
                raise UserError(f"{uri}: {_without_secrets(str(error))}") from None

        return retried(attempt, uri)


class _Parts(io.RawIOBase):
    """An object of which only what is asked for is fetched; the end comes first, and with it the size."""

    def __init__(self, fs: S3, path: str):
        self._fs, self._path, self._at = fs, path, 0
        self._tail, self._size, self._token = fs.range(path, -TAIL, 0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size < 0 else min(self._at + size, self._size)
        first = self._size - len(self._tail)
        if self._at >= first:
            data = self._tail[self._at - first : stop - first]
        elif stop > self._at:
            data, _, _ = self._fs.range(self._path, self._at, stop, self._token)
        else:
            data = b""
        self._at += len(data)
        return data


def _explained(error: boto_errors.ClientError, uri: str, bucket: str, key: str) -> Exception:
    status, code = _status(error), error.response.get("Error", {}).get("Code", "")
    if status in _AGAIN or code in _AGAIN_CODES or "Throttl" in code:
        return Transient(f"{status} {code}")
    if code == "NoSuchBucket":
        return UserError(f"{uri}: no such bucket {bucket!r}")
    if status == 404:
        return FileNotFoundError(2, f"no such object: bucket {bucket!r}, key {key!r}", uri)
    if status in (401, 403):
        return PermissionError(13, f"access denied ({code or status}): bucket {bucket!r}, key {key!r}", uri)
    message = error.response.get("Error", {}).get("Message")  # None, of Ceph's gateway
    return OSError(f"{uri}: {status} {code}" + (f": {_without_secrets(message)}" if message else ""))


def _status(error: boto_errors.ClientError) -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _date(text: str | None) -> datetime | None:
    try:
        return parsedate_to_datetime(text) if text else None
    except ValueError:
        return None


_SECRETS = re.compile(r"(X-Amz-(?:Signature|Credential|Security-Token)=|AWSAccessKeyId=|Signature=)[^&\s\"']+")


def _without_secrets(text: str) -> str:
    return _SECRETS.sub(r"\1...", " ".join(text.split()))
