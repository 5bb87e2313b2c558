"""`raypfk verify` finds what was done to a pool or a run behind its back, and says it in words."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from raypfk import cli, loop, store
from raypfk.errors import UserError
from raypfk.verify import verify
from tests import tiny

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def finished(ray_session, tmp_path_factory):
    """A finished run of two rounds; its pool lies in it."""
    return Path(loop.run(tiny.config(rounds=2), str(tmp_path_factory.mktemp("runs") / "finished")).uri)


@pytest.fixture
def run(finished, tmp_path):
    """A copy to break."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    record = json.loads((copy / "run.json").read_text())
    record["pool"]["uri"] = str(copy / "pool")
    (copy / "run.json").write_text(json.dumps(record))
    return copy


def test_a_finished_run_and_its_pool_have_no_problems(run):
    assert verify(str(run)) == [] and verify(str(run / "pool")) == []


def test_neither_run_nor_pool(tmp_path):
    with pytest.raises(UserError, match=r"neither a run \(run\.json\) nor a pool \(manifest\.json\) is here"):
        verify(str(tmp_path))


def test_the_command_says_what_is_wrong_and_exits_with_1(run):
    """Problems on standard output, one a line; 0 without any."""
    command = CliRunner()
    assert command.invoke(cli.cli, ["verify", str(run)], standalone_mode=False).return_value == 0
    (run / "rounds/001/metrics.json").write_text("{")
    found = command.invoke(cli.cli, ["verify", str(run)], standalone_mode=False)
    assert found.return_value == 1 and "metrics.json: expected JSON" in found.output and "1 problem" in found.output


# ------------------------------------------------------------------------------------------------------------ pools


def edit(path: Path, change) -> None:
    """Writes change(table) in a Parquet file's place."""
    table = pq.ParquetFile(path).read()
    pq.write_table(change(table), path)


def without_first(table: pa.Table) -> pa.Table:
    return table[1:]


def twice_first(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table[:1], table])


def relabel(table: pa.Table) -> pa.Table:
    at = table.column_names.index("label")
    return table.set_column(at, table.schema.field("label"), pc.if_else(pc.equal(table["label"], 0), 1, 0))


def note(pool: Path, name: str, file: dict | None) -> None:
    """What a build says of a file that it wrote, or of one whose images were all rejected."""
    store.write_json(str(pool / f"building/{name}.json"), {"plan": "", "written": {"file": file}})


def test_what_a_finished_build_left_harms_nobody(run):
    """It was ended between its last two steps."""
    store.write_json(str(run / "pool/building/begun.json"), {})
    note(run / "pool", "pool-00001", {"name": "00001.parquet"})
    note(run / "pool", "pool-00098", None)
    assert verify(str(run / "pool")) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda pool: (pool / "pool/00001.parquet").unlink(), r"pool/00001\.parquet: no such file"),
        (lambda pool: flip(pool / "pool/00001.parquet"), r"00001\.parquet: sha256 is \w+, the manifest says \w+"),
        (lambda pool: cut(pool / "pool/00001.parquet"), r"00001\.parquet: expected a whole file of images"),
        (lambda pool: edit(pool / "pool/00001.parquet", without_first), r"00001\.parquet: 127 images, .* says 128"),
        (lambda pool: edit(pool / "pool/00001.parquet", twice_first), r"image 'train/\d+' is there 2 times"),
        (lambda pool: edit(pool / "test/00000.parquet", relabel), r"test has \d+ images of class '0', .* says \d+"),
        (lambda pool: edit(pool / "pool/00000.parquet", relabel), r"have the fingerprint \w+, the manifest says"),
        (lambda pool: shutil.copy(pool / "pool/00000.parquet", pool / "pool/x.parquet"), r"x\.parquet: not in the man"),
        (lambda pool: (pool / "rejects.parquet").unlink(), r"rejects\.parquet: no such file"),
        (lambda pool: (pool / "manifest.json").write_text("{}"), r"manifest\.json: not the manifest of a pool"),
        (
            lambda pool: note(pool, "pool-00099", {"name": "00099.parquet"}),
            r"building/pool-00099\.json: of a build that",
        ),
        (lambda pool: reject_one(pool), r"rejects\.parquet: image 'train/\d+' is rejected, and in the pool too"),
    ],
)
def test_what_is_wrong_with_a_pool_is_named(run, change, expected):
    change(run / "pool")
    problems = "\n".join(verify(str(run / "pool")))
    assert pa.compute.match_substring_regex(pa.array([problems]), expected)[0].as_py(), problems


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def reject_one(pool: Path) -> None:
    first = json.loads((pool / "manifest.json").read_text())["splits"]["pool"]["shards"][0]["first_id"]
    store.write_table(str(pool / "rejects.parquet"), pa.table({"image_id": [first], "reason": ["ugly"]}))


# ------------------------------------------------------------------------------------------------------------- runs


def move(table: pa.Table) -> pa.Table:
    """The first image's row under another name."""
    ids = table["image_id"].to_pylist()
    ids[0] = "stranger"
    return table.set_column(table.column_names.index("image_id"), "image_id", pa.array(ids))


def worse_first(table: pa.Table) -> pa.Table:
    return table.set_column(table.column_names.index("rank"), "rank", pc.add(table["rank"], 1))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: edit(r / "descriptors/00002.parquet", without_first), r"of the pool is neither described nor rej"),
        (lambda r: edit(r / "descriptors/00002.parquet", twice_first), r"is accounted for 2 times"),
        (lambda r: edit(r / "descriptors/00002.parquet", move), r"image 'stranger' is not in the pool"),
        (lambda r: (r / "descriptors/00002.parquet").unlink(), r"descriptors/00002\.parquet: no such file"),
        (lambda r: edit(r / "validation.parquet", without_first), r"image '.*' of the pool is neither described"),
        (lambda r: edit(r / "candidates.parquet", move), r"candidates\.parquet: image 'stranger' is not in the pool"),
        (lambda r: edit(r / "candidates.parquet", lambda t: t[::2]), r"ranks are not 0, 1, 2, \.\.\. by falling score"),
        (lambda r: edit(r / "selection.parquet", move), r"selection\.parquet: image 'stranger' is not in the pool"),
        (lambda r: edit(r / "selection.parquet", twice_first), r"is selected 2 times"),
        (lambda r: edit(r / "selection.parquet", without_first), r"11 images are selected, expected 12"),
        (lambda r: edit(r / "labels.parquet", move), r"labels\.parquet: image 'stranger' was not selected"),
        (lambda r: edit(r / "labels.parquet", without_first), r"was selected and has no label"),
        (lambda r: edit(r / "labels.parquet", relabel), r"has the label \d, the pool says \d"),
        (lambda r: flip(r / "checkpoint/model.pt"), r"model\.pt|descriptors of weights"),
        (lambda r: (r / "done/score.json").unlink(), r"round 1: acquire is marked as done, score is not"),
        (lambda r: (r / "metrics.json").unlink(), r"metrics\.json: no such file"),
        (lambda r: foreign(r / "labels.parquet"), r"labels\.parquet belongs to the run other"),
    ],
)
def test_what_is_wrong_with_a_run_is_named(run, change, expected):
    change(run / "rounds/001")
    problems = "\n".join(verify(str(run)))
    assert pa.compute.match_substring_regex(pa.array([problems]), expected)[0].as_py(), problems


def foreign(path: Path) -> None:
    edit(path, lambda table: table.replace_schema_metadata({"raypfk.run": "other"}))


def test_a_selection_of_labelled_images_is_found(run):
    """Round 2 that selects what round 1 did."""
    shutil.copy(run / "rounds/001/selection.parquet", run / "rounds/002/selection.parquet")
    assert any("was labelled before" in problem for problem in verify(str(run)))
