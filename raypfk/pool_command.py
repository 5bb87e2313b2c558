"""`raypfk pool build`: from words on the command line to a DataConfig, and what is said of the pool."""

from pathlib import Path

from pydantic import ValidationError

from raypfk import store
from raypfk.config import DataConfig
from raypfk.errors import UserError
from raypfk.stages import pool as pools

DATASETS = ("mnist", "svhn", "cifar10")


def data_config(source: str, validation, test, imbalance, rare, shard_rows: int) -> DataConfig:
    """The pool's DataConfig. source: a folder, `digits`, or DATASET:ROOT."""
    kind, _, root = source.partition(":")
    if kind in DATASETS and root and not store.is_remote(source):
        fields = {"source": kind, "root": store.absolute(root)}
    elif source == "digits" and not Path(source).exists():
        fields = {"source": "digits"}
    else:
        fields = {"source": "folder", "root": store.absolute(source)}
    for name, value in (("validation", validation), ("test", test)):
        fields |= _share_or_folder(name, value)
    if (imbalance is None) != (rare is None):
        raise UserError("--imbalance and --rare go together: --imbalance 100 --rare 5,6,7")
    if imbalance is not None:
        fields["imbalance"] = {"ratio": imbalance, "classes": _indices(rare)}
    try:
        return DataConfig(**fields, shard_rows=shard_rows)
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def build(data: DataConfig, dest: str, seed: int) -> None:
    pools.build(data, store.absolute(dest), seed)


def _share_or_folder(name: str, value: str | None) -> dict:
    if value is None:
        return {}
    for number in (int, float):
        try:
            return {name: number(value)}
        except ValueError:
            pass
    if not store.is_remote(value) and not Path(value).expanduser().is_dir():
        raise UserError(f"--{name} {value}: expected a number of images, a share below 1 or a folder")
    return {f"{name}_root": store.absolute(value)}


def _indices(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--rare {text}: expected class indices, as in 5,6,7") from None
