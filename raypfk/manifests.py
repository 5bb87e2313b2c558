"""What a pool's manifest must say: every stage believes its paths and counts."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from raypfk import config as configs
from raypfk.config import DataConfig, Positive

Count = Annotated[int, Field(ge=0, le=2**53)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)  # what a later version adds is no mistake


def _file_name(name: str) -> str:
    if not name.endswith(".parquet") or any(mark in name for mark in "/\\\0"):
        raise ValueError(f"expected the name of a .parquet file in the split's folder, found {name[:100]!r}")
    return name


Name = Annotated[str, AfterValidator(_file_name)]


class _File(_Part):
    name: Name
    rows: Positive
    bytes: Count
    sha256: str
    content: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Shard(_Part):
    name: Name
    rows: Positive
    first_id: str
    last_id: str
    files: Annotated[list[Name], Field(min_length=1)]


class _Split(_Part):
    rows: Count
    bytes: Count
    content: str
    label_histogram: dict[str, Count] | None
    files: list[_File]
    shards: list[_Shard]

    @model_validator(mode="after")
    def _sums_up(self):
        for what in ("files", "shards"):
            if (rows := sum(part.rows for part in getattr(self, what))) != self.rows:
                raise ValueError(f"{self.rows} rows, but its {what} have {rows}")
        return self

    @model_validator(mode="after")
    def _of_its_files(self):
        known = {file.name for file in self.files}
        for shard in self.shards:
            if strange := [name for name in shard.files if name not in known]:
                raise ValueError(f"the shard {shard.name} is of the file {strange[0]}, which is not listed")
        return self


class _Splits(_Part):
    pool: _Split
    validation: _Split
    test: _Split


class _Image(_Part):
    channels: int | None
    width: int | None
    height: int | None


class _Manifest(_Part):
    fingerprint: str
    seed: int
    classes: list[str] | None
    data: DataConfig
    image: _Image
    imbalance: dict | None
    notes: list[str]
    splits: _Splits
    rejects: Count


def check(manifest: dict[str, Any], origin: str) -> None:
    """UserError that names the file and each field that is not as it must be."""
    configs.checked(_Manifest, manifest, origin)
