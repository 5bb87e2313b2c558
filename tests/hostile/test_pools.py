"""Manifests of pools that say what cannot be, or lead elsewhere."""

import json

import pytest

from raypfk.errors import UserError
from raypfk.pool import Pool
from tests.hostile import manifest, refusal, split

pytestmark = pytest.mark.usefixtures("limits")


def of_pool(**changes) -> dict:
    """A manifest whose split "pool" is otherwise."""
    return manifest(splits=manifest()["splits"] | {"pool": split(**changes)})


def of_shard(**changes) -> dict:
    return of_pool(shards=[split()["shards"][0] | changes])


def without(name: str) -> dict:
    return {key: value for key, value in manifest().items() if key != name}


def of_file(**changes) -> dict:
    return of_pool(files=[split()["files"][0] | changes])


SHARD = r"splits\.pool\.shards\.0\."
FILE = r"splits\.pool\.files\.0\."

BAD = {
    "empty": (b"", "expected JSON"),
    "not JSON": (b"{", "expected JSON"),
    "binary": (bytes(range(256)), "expected JSON"),
    "nested": (b"[" * 100_000, "expected JSON, found one nested too deep"),
    "an integer of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "expected JSON"),
    "a list": ([1], "not the manifest of a pool"),
    "a word": ("pool", "not the manifest of a pool"),
    "null": (None, "not the manifest of a pool"),
    "another's": ({"name": "webapp", "start_url": "/"}, "not the manifest of a pool"),
    "later format": (manifest(format_version=99), "format_version 99, expected 2"),
    "format that is text": (manifest(format_version="1"), "format_version '1', expected 2"),
    "no splits": (without("splits"), "splits: missing"),
    "no data": (without("data"), "data: missing"),
    "no classes": (without("classes"), "classes: missing"),
    "fingerprint that is a number": (manifest(fingerprint=7), "fingerprint: expected a valid string, found 7"),
    "classes that are text": (manifest(classes="cats"), "classes: expected a valid list, found 'cats'"),
    "classes that are numbers": (manifest(classes=[0]), "classes.0: expected a valid string, found 0"),
    "splits that are a list": (manifest(splits=[]), "splits: expected a valid dictionary"),
    "two splits": (manifest(splits={"pool": split(), "test": split()}), "splits.validation: missing"),
    "source that is unknown": (manifest(data={"source": "gopher"}), "data.source: expected .* found 'gopher'"),
    "setting that is unknown": (manifest(data={"source": "digits", "run": "rm"}), "data.run: unknown key"),
    "rows below 0": (of_pool(rows=-1), "splits.pool.rows: expected greater than or equal to 0, found -1"),
    "rows that are text": (of_pool(rows="2"), "splits.pool.rows: expected a valid integer, found '2'"),
    "rows without number": (of_pool(rows=10**30), "splits.pool.rows: expected .*, found 1000000000"),
    "rows that are not its shards'": (of_pool(rows=3), "splits.pool: 3 rows, but its files have 2"),
    "shards that are a number": (of_pool(shards=1), "splits.pool.shards: expected a valid list, found 1"),
    "shard that is text": (of_pool(shards=["00000.parquet"]), "splits.pool.shards.0: expected a valid dictionary"),
    "shard of more rows than its files": (of_shard(rows=3), "splits.pool: 2 rows, but its shards have 3"),
    "shard of an unknown file": (of_shard(files=["1.parquet"]), "is of the file 1.parquet, which is not listed"),
    "shard without a file": (of_shard(files=[]), SHARD + "files: "),
    "shard that writes outside": (of_shard(name="../00000.parquet"), SHARD + "name: .*found '../0000"),
    "file outside": (of_file(name="../../other/00000.parquet"), FILE + "name: .*found '../../other"),
    "file at an absolute path": (of_file(name="/etc/00000.parquet"), FILE + "name: .*found '/etc"),
    "file outside, with backslashes": (of_file(name="..\\00000.parquet"), FILE + "name: "),
    "file that is no Parquet": (of_file(name="00000.pickle"), FILE + "name: .*found '00000.pickle'"),
    "file whose content is no hash": (of_file(content="0x"), FILE + "content: "),
    "shard without rows": (of_shard(rows=0), SHARD + "rows: expected greater than or equal to 1, found 0"),
    "shard of too many rows": (of_shard(rows=10**18), SHARD + "rows: expected less than or equal to"),
    "file without a hash": (of_file(sha256=None), FILE + "sha256: expected a valid string, found None"),
    "ids that are numbers": (of_shard(first_id=0, last_id=1), SHARD + "first_id: expected a valid string, found 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_manifest_is_refused(tmp_path, name):
    """Before anything that it names is opened: each line names the file and the field."""
    content, message = BAD[name]
    path = tmp_path / "manifest.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(UserError, match=message) as refused:
        Pool.open(str(tmp_path))
    said = str(refused.value)
    assert all(line.startswith(str(path)) and len(line) < 1000 for line in said.splitlines()), said


def test_a_good_manifest_is_taken(tmp_path):
    """What the rows above change was no mistake before; what a later version adds is none either."""
    (tmp_path / "manifest.json").write_text(json.dumps(manifest(colour="blue")))
    assert Pool.open(str(tmp_path)).rows("pool") == 2


def test_a_manifest_that_is_no_file_is_never_opened(tmp_path):
    """A device is not read; it is no pool."""
    (tmp_path / "manifest.json").symlink_to("/dev/zero")
    refusal(lambda: Pool.open(str(tmp_path)), "no pool here: manifest.json is missing", str(tmp_path))
