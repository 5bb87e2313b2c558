"""`raypfk pool build`: from words on the command line to a DataConfig, and what is said of the pool."""

from pathlib import Path

from pydantic import ValidationError

from raypfk import store
from raypfk.config import FILES, DataConfig
from raypfk.errors import UserError
from raypfk.stages import pool as pools

KINDS = ("mnist", "svhn", "cifar10", *FILES)


def data_config(
    source: str, validation, test, imbalance, rare, shard_rows: int, max_rejects, labels, by_reference, columns: dict
) -> DataConfig:
    """The pool's DataConfig. source: a folder, `digits`, or KIND:ROOT. columns: fields of ColumnsConfig, or None."""
    kind, _, root = source.partition(":")
    if kind in KINDS and root:
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
    if max_rejects is not None:
        fields["max_rejects"] = _number("max-rejects", max_rejects, "a number of images or a share below 1")
    if labels is not None:
        fields["labels"] = store.absolute(labels)
    fields["columns"] = {name: value for name, value in columns.items() if value is not None}
    try:
        return DataConfig(**fields, shard_rows=shard_rows, by_reference=by_reference)
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def build(data: DataConfig, dest: str, seed: int) -> None:
    """Of a pool that is there: what its source has got since is added."""
    pools.build(data, store.absolute(dest), seed, grow=True)


def _share_or_folder(name: str, value: str | None) -> dict:
    if value is None:
        return {}
    if (number := _parsed(value)) is not None:
        return {name: number}
    if not store.is_remote(value) and not Path(value).expanduser().exists():
        raise UserError(f"--{name} {value}: expected a number of images, a share below 1, or where images lie")
    return {f"{name}_root": store.absolute(value)}


def _number(name: str, value: str, expected: str) -> int | float:
    if (number := _parsed(value)) is None:
        raise UserError(f"--{name} {value}: expected {expected}")
    return number


def _parsed(text: str) -> int | float | None:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return None


def _indices(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--rare {text}: expected class indices, as in 5,6,7") from None
