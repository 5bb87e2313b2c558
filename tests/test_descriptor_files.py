"""Descriptor files, without Ray: what is written is read back, and whatever does not fit is named."""

import gc
from dataclasses import replace

import pyarrow as pa
import pytest
import torch

from raypfk import descriptor_files as files
from raypfk import pfk, store
from raypfk.errors import UserError
from raypfk.pfk import Descriptors
from raypfk.pfk.compress import DTYPES
from raypfk.pool import Pool
from raypfk.run import ImageSpec, Run
from raypfk.schema import descriptors as descriptor_schema
from tests import tiny

LENGTHS = (10, 20, 50)  # LeNet's conv1, conv2, fc1
IDS = ["a", "b", "c", "d", "e"]


def entry(name: str, ids: list[str]) -> dict:
    return {"name": name, "rows": len(ids), "first_id": ids[0], "last_id": ids[-1], "files": [name]}


@pytest.fixture
def begin(tmp_path):
    """A run whose pool is a manifest only: shards of the images a to e, and f to h."""

    def begin(**changes) -> Run:
        shards = [entry("00000.parquet", IDS), entry("00001.parquet", ["f", "g", "h"])]
        files = [{"name": shard["name"], "rows": shard["rows"], "sha256": ""} for shard in shards]
        manifest = {"fingerprint": "0", "splits": {"pool": {"rows": 8, "files": files, "shards": shards}}}
        image = ImageSpec(16, 16, 1, (0.5,), (0.5,), 10**6)
        return Run(str(tmp_path), "ab" * 16, tiny.config(**changes), Pool(str(tmp_path), manifest), image, 10)

    return begin


def described(n: int, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Descriptors:
    torch.manual_seed(seed)
    return Descriptors(*(pfk.standardise(torch.randn(n, sum(lengths)), lengths) for _ in "zg"))


def columns(ids: list[str]) -> dict:
    labels = pa.array([3] * len(ids), pa.int64())
    return {"image_id": pa.array(ids, pa.string()), "predicted": labels, "estimated_label": labels}


def origin(run: Run) -> files.Origin:
    return files.stored_origin(run, files.full_origin(run, "0123456789abcdef"), None)


def write(
    run: Run, ids: list[str] = IDS, vectors: Descriptors | None = None, name: str = "00000.parquet", **other
) -> str:
    """A descriptor shard of round 1, of another origin where `other` says so; its path."""
    path, of = store.join(run.round(1).descriptors, name), replace(origin(run), **other)
    files.write(path, files.encode(columns(ids), vectors or described(len(ids), of.lengths), of), run.id, of)
    return path


def write_raw(run: Run, z: torch.Tensor) -> str:
    """A shard whose features are these numbers, whatever they are."""
    table = files.encode(columns(IDS), described(len(IDS)), origin(run))
    path = store.join(run.round(1).descriptors, "00000.parquet")
    files.write(path, table.set_column(1, "features", files.column(z)), run.id, origin(run))
    return path


def read(run: Run, path: str) -> Descriptors:
    return files.read_shard(run, path, run.pool.shards("pool")[0], origin(run))[1]


def write_validation(run: Run, n: int = 30) -> Descriptors:
    """validation.parquet of n images, every third a center; their descriptors."""
    full, vectors = files.full_origin(run, "0123456789abcdef"), described(n, seed=1)
    more = {
        "label": pa.array([4] * n),
        "missed": pa.array([True] * n),
        "center": pa.array([i % 3 == 0 for i in range(n)]),
    }
    table = files.encode({**columns([f"v{i:02d}" for i in range(n)]), **more}, vectors, full)
    files.write(run.round(1).validation, table, run.id, full)
    return vectors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", [[], ["c"], IDS], ids=len)
def test_what_is_written_is_read_back(begin, dtype, ids):
    """Every dtype and no, one or five rows: what dequantise makes of what quantise made; the schema's types."""
    run = begin(descriptors__dtype=dtype)
    vectors = described(len(ids))
    path = write(run, ids, vectors)
    for came, went in zip(read(run, path), vectors, strict=True):
        assert torch.equal(came, pfk.dequantise(pfk.quantise(went, LENGTHS, dtype), LENGTHS))
    assert run.read(path, descriptor_schema(80, dtype)).num_rows == len(ids)


def test_float32_lies_in_arrows_memory(begin):
    """No copy from the column to the tensor, for a slice either, and the memory outlives the table."""
    table = files.encode(columns(IDS), described(5), origin(begin()))
    for rows, first in ((table, 0), (table.slice(2), 2)):
        x = files.decode(rows, origin(begin())).z
        assert x.data_ptr() == table["features"].chunk(0).buffers()[1].address + first * 80 * 4
    kept = files.decode(table, origin(begin())).z
    del table, rows, x
    gc.collect()
    assert torch.equal(kept, described(5).z)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_column_of_several_chunks_is_one_tensor(begin, dtype):
    of = replace(origin(begin()), dtype=dtype)
    whole = files.encode(columns(IDS), described(5), of)
    parts = pa.concat_tables([whole.slice(0, 2), whole.slice(2, 0), whole.slice(2)])
    assert all(torch.equal(a, b) for a, b in zip(files.decode(whole, of), files.decode(parts, of), strict=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "resnet18"),
        ("weights", "fedcba9876543210"),
        ("taps", ("conv1", "fc1", "conv2")),
        ("lengths", (10, 20, 40)),
        ("lengths", (20, 10, 50)),
        ("dtype", "float16"),
        ("directions", "fedcba9876543210"),
    ],
)
def test_a_shard_of_another_origin_is_refused(begin, field, value):
    """Another model, weights, taps, L, dtype or directions than the centers': file, field, found and expected."""
    run = begin()
    path = write(run, **{field: value})
    with pytest.raises(UserError) as error:
        read(run, path)
    for part in (path, field, repr(value), repr(getattr(origin(run), field)), "done/extract.json"):
        assert part in str(error.value)


def test_validation_of_another_checkpoint_is_refused(begin):
    """What a resumed extraction finds must come from the checkpoint that it goes on with."""
    run = begin()
    write_validation(run)
    assert files.read_validation(run, 1)[2].weights == "0123456789abcdef"
    with pytest.raises(
        UserError, match=r"validation\.parquet: descriptors of weights '0123456789abcdef', expected 'f0'"
    ):
        files.read_validation(run, 1, "f0")


def test_a_file_without_an_origin_or_of_another_run_is_refused(begin):
    run = begin()
    path = write(run)
    table = store.read_table(path)
    run.write(path, table.replace_schema_metadata())
    with pytest.raises(UserError, match=r"00000\.parquet: no raypfk\.descriptors in its metadata"):
        read(run, path)
    write(run, format=2)
    with pytest.raises(UserError, match=r"00000\.parquet: raypfk\.descriptors has format 2, expected 1"):
        read(run, path)
    with pytest.raises(UserError, match=rf"00000\.parquet belongs to the run {run.id}, expected cdcd"):
        read(replace(run, id="cd" * 16), write(run))


def test_a_truncated_and_an_absent_shard_are_named(begin):
    run = begin()
    path = write(run)
    store.write_bytes(path, store.read_bytes(path)[:-100])
    with pytest.raises(UserError, match=r"00000\.parquet: expected a whole Parquet file"):
        read(run, path)
    store.delete(path)
    with pytest.raises(UserError, match=r"00000\.parquet: no such file"):
        read(run, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_nan_in_a_descriptor_is_named(begin, dtype, value):
    """File, image and part; int8 has no NaN, and writing one is refused (tests/pfk/test_compress.py)."""
    run = begin(descriptors__dtype=dtype)
    z = described(5).z.clone()
    z[3, 17] = value
    with pytest.raises(UserError, match=r"00000\.parquet: image 'd': features has NaN or infinity"):
        read(run, write_raw(run, z.to(DTYPES[dtype])))


def test_a_descriptor_that_is_not_standardised_is_named(begin):
    run = begin()
    z = described(5).z.clone()
    z[1, :10] *= 2
    with pytest.raises(UserError, match=r"00000\.parquet: image 'b': features has a scale longer than 1"):
        read(run, write_raw(run, z))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b", "b", "c"], "image 'b' is there twice"),
        (["a", "c", "b"], "image 'b' stands after 'c'"),
        (["a", "b", "f"], "image 'f' is not of this shard; expected 'a' to 'e'"),
        (["A", "b"], "image 'A' is not of this shard"),
        (["a", "aa", "b", "c", "d", "e"], "6 images, but the pool's shard has 5"),
    ],
)
def test_images_that_are_not_the_shards_are_named(begin, ids, message):
    """An id twice in a shard, out of order, or of another shard (where it would be twice): file and image."""
    run = begin()
    with pytest.raises(UserError, match=rf"00000\.parquet: {message}"):
        read(run, write(run, ids))


def test_nulls_and_other_widths_are_named(begin):
    run = begin()
    with pytest.raises(UserError, match=r"column 'features' is fixed_size_binary\[160\], expected .*\[320\]"):
        read(run, write_raw(run, described(5).z.half()))
    nulls = pa.array([None] * 5, pa.binary(320))
    table = files.encode(columns(IDS), described(5), origin(run)).set_column(1, "features", nulls)
    path = store.join(run.round(1).descriptors, "00000.parquet")
    text = store.read_table(write(run)).schema.metadata
    run.write(path, table.replace_schema_metadata(text))
    with pytest.raises(UserError, match=r"column 'features' has 5 nulls, expected none"):
        read(run, path)


def test_directions_are_written_once_and_read_back(begin):
    """The validation set's principal directions: the same from the file, of the lengths that are stored."""
    run = begin(descriptors__pca=12)
    assert files.fit_directions(begin(), 1, described(3)) is None and files.directions_of(begin(), 1) is None
    with pytest.raises(UserError, match=r"pca\.parquet: no such file"):
        files.directions_of(run, 1)
    made = files.fit_directions(run, 1, described(60))
    again = files.fit_directions(run, 1, described(60, seed=5))  # there already: not made of these
    assert made.fingerprint == again.fingerprint == files.directions_of(run, 1).fingerprint
    assert [tuple(b.shape) for b in again.g] == [(10, 10), (20, 12), (50, 12)] and run.stored_lengths == (10, 12, 12)
    table = run.read(run.round(1).directions)
    run.write(run.round(1).directions, table.slice(1))
    with pytest.raises(UserError, match=r"pca\.parquet: 67 directions, expected 68"):
        files.directions_of(run, 1)


@pytest.mark.parametrize("pca", [None, 12])
def test_centers_are_read_as_the_pool_is_stored(begin, pca):
    """The centers' descriptors, projected where the pool's are, and the origin that its shards must have."""
    run = begin(descriptors={"pca": pca, "dtype": "int8"})
    vectors = write_validation(run)
    directions = files.fit_directions(run, 1, vectors)
    table, centers, of = files.read_centers(run, 1)
    assert table["image_id"].to_pylist() == [f"v{i:02d}" for i in range(0, 30, 3)]
    full = vectors.rows(torch.arange(0, 30, 3))
    assert torch.equal(centers.z, directions.project(full).z if pca else full.z)
    assert (of.dtype, of.lengths) == ("int8", run.stored_lengths)
    assert of.directions == (directions.fingerprint if pca else None)
    assert run.stored_kernel().weights == run.kernel().weights == (9.0, 19.0, 49.0)
