"""A finished pool: what its manifest says, and its images and labels, shard by shard."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raypfk import manifests, sources, store
from raypfk.config import DataConfig
from raypfk.errors import UserError
from raypfk.schema import IMAGES, REFERENCES

FORMAT = 2
MANIFEST = "manifest.json"
EARLIER = "manifests"  # a pool that grew: the manifests before, each by its fingerprint
REJECTED = "rejects.parquet"
BUILDING = "building"  # there from a build's first write to its end


@dataclass(frozen=True)
class File:
    """A Parquet file of images, written once."""

    uri: str
    rows: int
    sha256: str

    @property
    def name(self) -> str:
        return self.uri.rpartition("/")[2]


@dataclass(frozen=True)
class Shard:
    """A range of a split's ids, first and last as strings compare; what is made of it bears its name.

    files: where its images are. One file, all of it; where the pool grew, also in a later one, and a file's images
    may belong to more than one shard.
    """

    name: str
    rows: int
    first_id: str
    last_id: str
    files: tuple[File, ...]

    @property
    def uri(self) -> str:
        return self.files[0].uri


@dataclass(frozen=True)
class Pool:
    """A finished pool. Small and picklable: hand it to tasks and actors."""

    uri: str
    manifest: dict[str, Any]

    @classmethod
    def open(cls, uri: str) -> "Pool":
        uri = store.absolute(uri)
        path = store.join(uri, MANIFEST)
        if not store.exists(path):
            half = " (its build was not finished)" if store.exists(store.join(uri, BUILDING)) else ""
            raise UserError(f"{uri}: no pool here: {MANIFEST} is missing{half}")
        return cls(uri, _manifest(path))

    def as_of(self, fingerprint: str, wanted_by: str) -> "Pool":
        """The pool when it had this fingerprint: it may have grown since. UserError if it never had it."""
        if fingerprint == self.fingerprint:
            return self
        path = earlier(self.uri, fingerprint)
        if not store.exists(path):
            here = f"but {self.uri} is the pool {self.fingerprint[:12]}"
            raise UserError(f"{wanted_by} the pool {fingerprint[:12]}, {here}")
        return Pool(self.uri, _manifest(path))

    @property
    def fingerprint(self) -> str:
        """sha256 over the ids, images and labels of all splits: the same for any shard size, and built in any steps."""
        return self.manifest["fingerprint"]

    @property
    def classes(self) -> list[str] | None:
        """Class names in the order of their indices; None for a pool without labels."""
        return self.manifest["classes"]

    @property
    def num_classes(self) -> int:
        return len(self.classes or [])

    @property
    def by_reference(self) -> bool:
        """Whether its shards hold where the images lie, and not the images."""
        return bool(self.manifest["data"].get("by_reference"))

    @property
    def schema(self) -> pa.Schema:
        """Of its files."""
        return REFERENCES if self.by_reference else IMAGES

    def rows(self, split: str) -> int:
        return self.manifest["splits"][split]["rows"]

    def files(self, split: str) -> list[File]:
        """All files of a split, in the order in which they came."""
        entry, folder = self.manifest["splits"][split], store.join(self.uri, split)
        return [File(store.join(folder, f["name"]), f["rows"], f["sha256"]) for f in entry["files"]]

    def shards(self, split: str) -> list[Shard]:
        """In the order of image_id: every id of a shard is less than every id of the next."""
        files = {file.name: file for file in self.files(split)}
        fields = ("name", "rows", "first_id", "last_id")
        shards = self.manifest["splits"][split]["shards"]
        return [Shard(*(s[f] for f in fields), tuple(files[name] for name in s["files"])) for s in shards]

    def read_shard(self, shard: Shard, columns: list[str] | None = None) -> pa.Table:
        """The columns (all, if None) of one shard. UserError if a file is absent, damaged or another one."""
        columns = columns or self.schema.names
        whole = len(shard.files) == 1 and shard.files[0].rows == shard.rows
        asked = columns if whole else list(dict.fromkeys([*columns, "image_id"]))
        table = pa.concat_tables(self._read_file(file, asked) for file in shard.files)
        if not whole:
            ids = table["image_id"]
            within = pc.and_(pc.greater_equal(ids, shard.first_id), pc.less_equal(ids, shard.last_id))
            table = table.filter(within).sort_by("image_id")
        if table.num_rows != shard.rows:
            raise UserError(f"{shard.uri}: {table.num_rows} images, but the manifest says {shard.rows}")
        if "image_id" in asked and (found := table["image_id"][0].as_py()) != shard.first_id:
            raise UserError(f"{shard.uri}: begins with {found}, but the manifest says {shard.first_id}")
        return table.select(columns)

    def _read_file(self, file: File, columns: list[str]) -> pa.Table:
        table = store.read_table(file.uri, columns, self.schema)
        if table.num_rows != file.rows:
            raise UserError(f"{file.uri}: {table.num_rows} images, but the manifest says {file.rows}")
        return table

    def images(self, table: pa.Table) -> Iterator[bytes | str]:
        """Encoded images of a shard's rows, in order; a str says why one cannot be read.

        table: has the column `image`, or of a pool by reference `uri`.
        """
        if self.by_reference:
            yield from sources.of(DataConfig(**self.manifest["data"])).read(table["uri"].to_pylist())
        else:
            yield from (image.as_py() for image in table["image"])

    def ids(self, split: str, threads: int = 8) -> pa.Array:
        """All ids of a split, in order, as large strings: of many images they are more than 2 GiB."""

        def of(shard: Shard) -> pa.Array:
            return self.read_shard(shard, ["image_id"])["image_id"].cast(pa.large_string()).combine_chunks()

        with ThreadPoolExecutor(threads) as pool:
            return pa.concat_arrays([pa.array([], pa.large_string()), *pool.map(of, self.shards(split))])

    def locate(self, ids: Iterable[str]) -> list[Shard]:
        """The shards of the split "pool" whose range holds any of `ids`, in order. UserError for an id in none."""
        return list(self.by_shard(ids))

    def labels_of(self, ids: Iterable[str]) -> dict[str, int]:
        """The hidden labels of pool images: the simulated oracle. UserError naming one that has none."""
        wanted = self.by_shard(ids)
        with ThreadPoolExecutor(8) as threads:
            tables = list(threads.map(lambda shard: self.read_shard(shard, ["image_id", "label"]), wanted))
        labels = {}
        for table, of_shard in zip(tables, wanted.values(), strict=True):
            known = dict(zip(table["image_id"].to_pylist(), table["label"].to_pylist(), strict=True))
            for image_id in of_shard:
                if image_id not in known:
                    raise UserError(f"{self.uri}: no image {image_id!r} in the pool")
                if known[image_id] is None:
                    raise UserError(f"{self.uri}: image {image_id!r} has no label")
                labels[image_id] = known[image_id]
        return labels

    def by_shard(self, ids: Iterable[str]) -> dict[Shard, list[str]]:
        """Ids of the split "pool" by the shard that holds them, in order. UserError for an id outside all of them."""
        shards = self.shards("pool")
        first_ids = [shard.first_id for shard in shards]
        found: dict[int, list[str]] = {}
        for image_id in ids:
            i = bisect_right(first_ids, image_id) - 1
            if i < 0 or image_id > shards[i].last_id:
                raise UserError(f"{self.uri}: no image {image_id!r} in the pool")
            found.setdefault(i, []).append(image_id)
        return {shards[i]: found[i] for i in sorted(found)}


def earlier(uri: str, fingerprint: str) -> str:
    """Where the manifest of a pool that has grown since is kept."""
    return store.join(uri, EARLIER, f"{fingerprint[:16]}.json")


def _manifest(path: str) -> dict[str, Any]:
    manifest = store.read_json(path)
    if not isinstance(manifest, dict) or "fingerprint" not in manifest or "format_version" not in manifest:
        raise UserError(f"{path}: not the manifest of a pool")
    if manifest["format_version"] != FORMAT:
        raise UserError(f"{path}: format_version {manifest['format_version']!r}, expected {FORMAT}")
    manifests.check(manifest, path)
    return manifest


# ----------------------------------------------------------------------------------------------------- fingerprints


def content(rows: Iterable[tuple[str, bytes | str, int | None]]) -> str:
    """What images are, in 64 hex digits: the sum of their hashes modulo 2^256, whatever their order.

    rows: (image_id, encoded image or where it lies, label).
    """
    total = 0
    for image_id, image, label in rows:
        data = hashlib.sha256(image.encode() if isinstance(image, str) else image).digest()
        total += int.from_bytes(hashlib.sha256(b"\0".join([image_id.encode(), data, str(label).encode()])).digest())
    return f"{total % (1 << 256):064x}"


def contents(parts: Iterable[str]) -> str:
    """The `content` of all images of which `parts` are."""
    return f"{sum(int(part, 16) for part in parts) % (1 << 256):064x}"


def fingerprint(splits: dict[str, str]) -> str:
    """Of a pool, by the `content` of each split."""
    return hashlib.sha256("\0".join(f"{name}\0{splits[name]}" for name in sorted(splits)).encode()).hexdigest()
