"""Files of a run that a person, a tool or an accident wrote: run.json, markers, metrics, answers, leases."""

import json
import os
import socket
from types import SimpleNamespace

import pyarrow as pa
import pytest

from raypfk import descriptor_files, lease, status
from raypfk.lease import Lease
from raypfk.run import Run
from raypfk.schema import LABELS, SELECTION, RoundDir
from raypfk.stages.label import label
from tests import tiny
from tests.hostile import manifest, refusal

pytestmark = pytest.mark.usefixtures("limits")


def content(value) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


# --------------------------------------------------------------------------------------- run.json, markers, metrics


@pytest.fixture
def run(tmp_path):
    """A run of nothing yet, in a pool of nothing."""
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/manifest.json").write_text(json.dumps(manifest()))
    (tmp_path / "run/rounds/001/done").mkdir(parents=True)
    (tmp_path / "run/rounds/000/done").mkdir(parents=True)
    (tmp_path / "run/rounds/000/done/train.json").write_text('{"seconds": 1.0}')
    (tmp_path / "run/run.json").write_text(json.dumps(record(tmp_path)))
    return tmp_path / "run"


def record(folder, **changes) -> dict:
    pool = {"uri": str(folder / "pool"), "fingerprint": "f" * 64}
    return {"format": 1, "id": "abc", "seed": 1, "pool": pool, "config": tiny.TREE} | changes


BAD_RUNS = {
    "empty": (lambda f: b"", "expected JSON"),
    "not JSON": (lambda f: b"{", "expected JSON"),
    "nested": (lambda f: b"[" * 100_000, "expected JSON, found one nested too deep"),
    "a list": (lambda f: [], "expected a JSON object, found list"),
    "null": (lambda f: None, "expected a JSON object, found NoneType"),
    "no format": (lambda f: {}, "format None, expected 1"),
    "later format": (lambda f: record(f, format=2), "format 2, expected 1"),
    "no id": (lambda f: record(f, id=None), "id: expected text, found None"),
    "no configuration": (lambda f: record(f, config="x"), "config: expected an object, found 'x'"),
    "unknown setting": (lambda f: record(f, config=tiny.TREE | {"speed": 9}), "speed: unknown key"),
    "no pool": (lambda f: record(f, pool=[]), r"pool: expected an object, found \[\]"),
    "pool without a place": (lambda f: record(f, pool={"fingerprint": "f"}), "uri: expected text, found none"),
    "pool that is not there": (lambda f: record(f, pool={"uri": "/nowhere", "fingerprint": "f"}), "no pool here"),
    "another pool": (
        lambda f: record(f, pool={"uri": str(f / "pool"), "fingerprint": "e" * 64}), "begun on the pool eeee",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RUNS)
def test_a_bad_run_json_is_refused(run, name):
    """The file and the field are named, or the pool that it does not fit."""
    make, message = BAD_RUNS[name]
    (run / "run.json").write_bytes(content(make(run.parent)))
    refusal(lambda: Run.open(str(run)), message)


def test_a_good_run_json_is_taken(run):
    """What the rows above change was no mistake before."""
    assert status.read(str(run))["done"][0]["round"] == 0


BAD_MARKERS = {
    "empty": (b"", "expected JSON"),
    "not JSON": (b"done", "expected JSON"),
    "a list": ([], "expected a JSON object, found list"),
    "true": (True, "expected a JSON object, found bool"),
    "no seconds": ({}, "seconds: expected a number, found none"),
    "seconds that are text": ({"seconds": "1"}, "seconds: expected a number, found '1'"),
}


@pytest.mark.parametrize("name", BAD_MARKERS)
def test_a_bad_marker_is_refused(run, name):
    """A stage is neither taken for done nor done again by a file that says neither."""
    data, message = BAD_MARKERS[name]
    (run / "rounds/001/done/extract.json").write_bytes(content(data))
    refusal(lambda: status.read(str(run)), rf"done/extract\.json: .*{message}|done/extract\.json: {message}", str(run))


BAD_METRICS = {
    "not JSON": (b"{", "expected JSON"),
    "a list": ([], "expected a JSON object, found list"),
    "no count": ({"test_accuracy": 0.5}, "labelled: expected a whole number, found none"),
    "accuracy that is text": ({"labelled": 1, "test_accuracy": "good"}, "test_accuracy: expected a number"),
}


@pytest.mark.parametrize("name", BAD_METRICS)
def test_bad_metrics_are_refused(run, name):
    data, message = BAD_METRICS[name]
    (run / "rounds/001/done/evaluate.json").write_text('{"seconds": 1.0}')
    (run / "rounds/001/metrics.json").write_bytes(content(data))
    refusal(lambda: status.read(str(run)), r"metrics\.json: " + message, str(run))


# ---------------------------------------------------------------------------------------------- a person's answers

NAMES = ["cat", "dog", "héron"]
ANSWERS = "image_id,label\na,cat\nb,dog\n"


class AskedRun(SimpleNamespace):
    """A run that has selected the images a and b, and asks a person."""

    def round(self, number: int) -> RoundDir:
        return RoundDir(self.uri, number)

    def read(self, uri: str, schema: pa.Schema) -> pa.Table:
        rows = [{"image_id": i, "position": n} for n, i in enumerate("ab")]
        return pa.Table.from_pylist(rows, SELECTION)

    def labelled(self, before: int) -> pa.Table:
        return LABELS.empty_table()

    def write(self, uri: str, table: pa.Table) -> None:
        self.written = table


def answered(folder, text: str | bytes, names: list[str] = NAMES) -> list[int]:
    run = AskedRun(uri=str(folder), pool=SimpleNamespace(classes=names), config=SimpleNamespace(oracle="file"))
    path = folder / "rounds/001/labels.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    label(run, 1)
    return run.written["label"].to_pylist()


CLASS = "expected one of the classes cat, dog, héron, found "
BAD_ANSWERS = {
    "empty": ("", "expected CSV with the columns image_id,label"),
    "no header": ("a,cat\nb,dog\n", "expected CSV with the columns image_id,label: .*'image_id'"),
    "no labels": ("image_id\na\nb\n", "expected CSV with the columns image_id,label: .*'label'"),
    "semicolons": ("image_id;label\na;cat\nb;dog\n", "expected CSV with the columns image_id,label"),
    "a row too short": ("image_id,label\na,cat\nb\n", "Expected 2 columns, got 1: b"),
    "a column twice": ("image_id,label,label\na,cat,dog\nb,dog,dog\n", "the column 'label' is there 2 times"),
    "utf-16": (ANSWERS.encode("utf-16"), "expected CSV as UTF-8 text, found a NUL byte"),
    "latin-1": ("image_id,label\na,h\xe9ron\nb,dog\n".encode("latin-1"), "expected CSV .* invalid UTF8"),
    "a spreadsheet": (b"PK\x03\x04" + bytes(100), "expected CSV as UTF-8 text, found a NUL byte"),
    "unknown image": (ANSWERS + "z,cat\n", "'z' was not selected in round 1"),
    "an image twice": (ANSWERS + "b,cat\n", "image 'b' is there 2 times, expected once"),
    "an image missing": ("image_id,label\na,cat\n", f"image 'b': {CLASS}no label"),
    "a label missing": ("image_id,label\na,cat\nb,\n", f"image 'b': {CLASS}no label"),
    "unknown class": ("image_id,label\na,cat\nb,dgo\n", f"image 'b': {CLASS}'dgo'"),
    "class with a space": ("image_id,label\na,cat\nb, dog\n", f"image 'b': {CLASS}' dog'"),
    "index below 0": ("image_id,label\na,cat\nb,-1\n", f"image 'b': {CLASS}'-1'"),
    "index beyond": ("image_id,label\na,cat\nb,3\n", f"image 'b': {CLASS}'3'"),
    "index of another script": ("image_id,label\na,cat\nb,²\n", f"image 'b': {CLASS}'²'"),
    "index of 5,000 digits": (f"image_id,label\na,cat\nb,{'9' * 5000}\n", f"image 'b': {CLASS}'9+'"),
    "a quote that is not closed": ('image_id,label\na,cat\nb,"dog\nc,dog\n', f"image 'b': {CLASS}'dog"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_bad_answers_are_refused(tmp_path, name):
    """The file and the image are named; no label is guessed."""
    text, message = BAD_ANSWERS[name]
    refusal(lambda: answered(tmp_path, text), message, "rounds/001/labels.csv: ")


GOOD_ANSWERS = {
    "as asked": ANSWERS,
    "in another order": "image_id,label\nb,dog\na,cat\n",
    "a mark of the byte order": "\ufeff" + ANSWERS,
    "columns without a name": "image_id,label,,\na,cat,,\nb,dog,,\n",
    "more columns": "who,image_id,label\nme,a,cat\nme,b,dog\n",
    "Windows line ends": ANSWERS.replace("\n", "\r\n"),
    "quotes": 'image_id,label\n"a","cat"\n"b","dog"\n',
    "indices": "image_id,label\na,0\nb,1\n",
}


@pytest.mark.parametrize("name", GOOD_ANSWERS)
def test_answers_of_other_programs_are_taken(tmp_path, name):
    """What spreadsheets make of the file is read as it was meant."""
    assert answered(tmp_path, GOOD_ANSWERS[name]) == [0, 1]


# ---------------------------------------------------------------------------------------------------------- leases


def garbage(**changes) -> bytes:
    """A lease of this machine's, but for the changes."""
    owner = {"owner": "x", "host": socket.gethostname(), "pid": os.getpid(), **lease._process()}
    return json.dumps(owner | changes).encode()


BAD_LEASES = {
    "empty": b"",
    "binary": bytes(range(256)),
    "a list": b"[1]",
    "nested": b"[" * 100_000,
    "process that is none": garbage(pid=None),
    "process that is infinite": garbage(pid=1e400),
    "process that is a path": garbage(pid="../../etc/passwd"),
    "process of 5,000 digits": b'{"pid": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("name", BAD_LEASES)
def test_a_bad_lease_is_not_obeyed_for_ever(tmp_path, name):
    """It runs out like any other, and is written over."""
    (tmp_path / lease.NAME).write_bytes(BAD_LEASES[name])
    one = Lease(str(tmp_path), 0.4)
    one.take()
    assert json.loads((tmp_path / lease.NAME).read_text())["pid"] == os.getpid()
    one.give_back()


# ------------------------------------------------------------------------------------------ descriptors' metadata

BAD_ORIGINS = {
    "none": (None, "no raypfk.descriptors in its metadata"),
    "not JSON": (b"{", r"raypfk\.descriptors: expected a JSON object, found b'{'"),
    "nested": (b"[" * 100_000, "expected a JSON object, found b"),
    "a list": (b"[]", r"expected a JSON object, found b'\[\]'"),
    "later format": (b'{"format": 9}', "has format 9, expected 1"),
}


@pytest.mark.parametrize("name", BAD_ORIGINS)
def test_bad_metadata_of_descriptors_are_refused(name):
    text, message = BAD_ORIGINS[name]
    table = pa.table({"image_id": ["a"]}).replace_schema_metadata(text and {descriptor_files.KEY: text})
    refusal(lambda: descriptor_files.origin_of("d/00000.parquet", table), message, "d/00000.parquet: ")
