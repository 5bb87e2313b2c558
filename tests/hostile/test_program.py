"""The program on hostile input: exit code 2, one message, no traceback; and a whole pool of bad images."""

import json

import pyarrow.parquet as pq
import pytest
import yaml

from raypfk import cli
from raypfk.config import DataConfig
from raypfk.stages import pool as pools
from tests import tiny
from tests.hostile import manifest, split
from tests.hostile.test_images import BAD, JPEG, ODD, PNG
from tests.hostile.test_tars import BROKEN, END, GOOD, LOST
from tests.hostile.test_tars import REJECTED as BAD_MEMBERS


@pytest.fixture
def call(capsys):
    """Runs the program in this process; gives exit code and what it said on stderr."""

    def run(*args) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            cli.run_command(cli.cli, [str(a) for a in args])
        return stop.value.code or 0, capsys.readouterr().err

    return run


def yaml_bomb(folder) -> list:
    pairs = zip("abcdefgh", "bcdefghi", strict=True)
    text = "a: &a [x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in pairs)
    (folder / "run.yaml").write_text(text)
    return ["run", folder / "run.yaml", "--out", folder / "out"]


def yaml_code(folder) -> list:
    (folder / "run.yaml").write_text(yaml.safe_dump(tiny.TREE) + "x: !!python/object/apply:os.system [ls]\n")
    return ["run", folder / "run.yaml", "--out", folder / "out"]


def yaml_without_end(folder) -> list:
    return ["run", "/dev/zero", "--out", folder / "out"]


def run_of_garbage(folder) -> list:
    (folder / "run.json").write_text("[]")
    return ["status", folder]


def run_in_a_pool_outside(folder) -> list:
    shards = [split()["shards"][0] | {"name": "../../x.parquet"}]
    splits = manifest()["splits"] | {"pool": split(shards=shards)}
    (folder / "manifest.json").write_text(json.dumps(manifest(splits=splits)))
    pool = {"uri": str(folder), "fingerprint": "f" * 64}
    (folder / "run.json").write_text(json.dumps({"format": 1, "id": "a", "pool": pool, "config": tiny.TREE}))
    return ["extract", folder, "--round", 1]


def damaged_tar(folder) -> list:
    (folder / "in").mkdir()
    (folder / "in/x.tar").write_bytes(GOOD + BROKEN + LOST + END)
    return ["pool", "build", f"webdataset:{folder / 'in'}", folder / "out"]


def list_with_keys(folder) -> list:
    (folder / "list.csv").write_text("uri\ns3://AKIA:SECRET@bucket/a.png\n")
    return ["pool", "build", f"manifest:{folder / 'list.csv'}", folder / "out"]


def list_without_end(folder) -> list:
    (folder / "list.csv").symlink_to("/dev/zero")
    return ["pool", "build", f"manifest:{folder / 'list.csv'}", folder / "out"]


def nothing_but_bad_images(folder) -> list:
    (folder / "in").mkdir()
    (folder / "in/a.jpg").write_bytes(b"<html>Sign in</html>")
    return ["pool", "build", folder / "in", folder / "out"]


MISTAKES = {
    yaml_bomb: "run.yaml: not YAML: more than 32 aliases",
    yaml_code: "run.yaml: not YAML: could not determine a constructor",
    yaml_without_end: "/dev/zero: expected a YAML file of at most 1048576 bytes",
    run_of_garbage: "run.json: expected a JSON object, found list",
    run_in_a_pool_outside: "manifest.json: splits.pool.shards.0.name: expected the name of a .parquet file",
    damaged_tar: "x.tar: expected a whole tar file: at byte 1024, after 1 members",
    list_with_keys: "credentials come from the environment",
    list_without_end: "list.csv: expected a file, found neither a file nor a folder",
    nothing_but_bad_images: "all 1 images are rejected, the first: a.jpg: not an image in a known format",
}


@pytest.mark.parametrize("make", MISTAKES, ids=lambda make: make.__name__)
def test_the_program_exits_with_2_and_one_message(ray_session, call, tmp_path, make):
    """Whatever comes, it is said in words; no traceback, no secret, and nothing that passes for a pool."""
    code, said = call(*make(tmp_path))
    assert code == 2 and MISTAKES[make] in said, said
    assert "Traceback" not in said and "SECRET" not in said
    assert sum("raypfk: " in line for line in said.splitlines()) == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


def rows(path) -> dict[str, str]:
    table = pq.read_table(path)
    return dict(zip(*(table[name].to_pylist() for name in ("image_id", "reason")), strict=True))


def test_a_pool_of_all_bad_images_loses_none(ray_session, tmp_path):
    """Every bad image of this corpus, every odd and two good ones: each in the pool, or rejected with a reason."""
    (tmp_path / "in").mkdir()
    for i, data in enumerate([*(data for data, _ in BAD.values()), *ODD.values(), PNG, JPEG]):
        (tmp_path / "in" / f"{i:03d}.jpg").write_bytes(data)
    data = DataConfig(source="folder", root=str(tmp_path / "in"), max_rejects=1.0)
    pool = pools.build(data, str(tmp_path / "out"), 0)
    rejects = rows(tmp_path / "out/rejects.parquet")
    assert sorted(rejects) == [f"{i:03d}.jpg" for i in range(len(BAD))]
    assert pool.rows("pool") == len(ODD) + 2
    assert all(reason and "\n" not in reason for reason in rejects.values())


def test_a_tar_of_all_bad_members_loses_none(ray_session, tmp_path):
    """Names that cannot be written as they are included: the rejects can be, and the good ones are in the pool."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.tar").write_bytes(GOOD + b"".join(data for data, _, _ in BAD_MEMBERS.values()) + LOST + END)
    pool = pools.build(DataConfig(source="webdataset", root=str(tmp_path / "in")), str(tmp_path / "out"), 0)
    assert pool.rows("pool") == 2
    assert set(rows(tmp_path / "out/rejects.parquet")) == {name for _, name, _ in BAD_MEMBERS.values()}
