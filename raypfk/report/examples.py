"""What was selected and why: the image, the validation failure that asked for it, the score and the rank."""

import base64
import io
from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from raypfk import images
from raypfk.errors import UserError
from raypfk.pool import Pool
from raypfk.report.gather import class_names
from raypfk.run import Run
from raypfk.schema import LABELS, SELECTION

SIDE = 112
"""Pixels of a thumbnail's longer side."""
PIXEL_ART = 48
"""An image of at most so many pixels a side is shown as the squares that it is."""


class Thumbnail(NamedTuple):
    """uri: the image as data:, or None, and then `problem` says why there is none."""

    uri: str | None
    problem: str = ""
    pixel_art: bool = False


class Asked(NamedTuple):
    """The validation image that asked for a choice, and what the network took it for."""

    image_id: str
    thumbnail: Thumbnail
    label: str
    predicted: str
    missed: bool


class Example(NamedTuple):
    """A choice. bought: its label. None is what the strategy does not say."""

    position: int
    image_id: str
    thumbnail: Thumbnail
    bought: str
    estimated: str | None
    score: float | None
    rank: int | None
    asked: Asked | None


def examples(run: Run, round: int, count: int) -> list[Example]:
    """The first `count` choices of a round, in their order."""
    files, names = run.round(round), class_names(run)
    rows = run.read(files.selection, SELECTION).sort_by("position")[:count].to_pylist()
    labels = _by_id(run.read(files.labels, LABELS).to_pylist())
    selected = thumbnails(run.pool, "pool", [row["image_id"] for row in rows])
    asking = _asking(run, round, {row["center_id"] for row in rows if row["center_id"] is not None})
    return [
        Example(
            row["position"],
            row["image_id"],
            selected[row["image_id"]],
            names[labels[row["image_id"]]["label"]],
            None if row["estimated_label"] is None else names[row["estimated_label"]],
            row["score"],
            row["rank"],
            asking.get(row["center_id"]),
        )
        for row in rows
    ]


def _asking(run: Run, round: int, ids: set[str]) -> dict[str, Asked]:
    if not ids:
        return {}
    names, columns = class_names(run), ["image_id", "label", "predicted", "missed"]
    centers = _by_id(run.read(run.round(round).validation, columns=columns).to_pylist())
    shown = thumbnails(run.pool, "validation", sorted(ids))
    return {
        i: Asked(i, shown[i], names[centers[i]["label"]], names[centers[i]["predicted"]], centers[i]["missed"])
        for i in ids
    }


def _by_id(rows: list[dict]) -> dict[str, dict]:
    return {row["image_id"]: row for row in rows}


def thumbnails(pool: Pool, split: str, ids: Iterable[str]) -> dict[str, Thumbnail]:
    """Of each of these images of a split."""
    wanted = set(ids)
    found = dict.fromkeys(wanted, Thumbnail(None, "the pool does not hold it any more"))
    for shard in pool.shards(split):
        within = [image_id for image_id in wanted if shard.first_id <= image_id <= shard.last_id]
        if within:
            table = pool.read_shard(shard, ["image_id", "uri" if pool.by_reference else "image"])
            table = table.filter(pc.is_in(table["image_id"], pa.array(within)))
            found |= dict(zip(table["image_id"].to_pylist(), _shown(pool, table), strict=True))
    return found


def _shown(pool: Pool, table: pa.Table) -> list[Thumbnail]:
    try:
        encoded = list(pool.images(table))
    except (UserError, OSError) as error:  # the place that a reference names may be gone, or closed to who reports
        return [Thumbnail(None, f"cannot be fetched: {error}")] * table.num_rows
    return [_thumbnail(data, pool.manifest["data"]["max_pixels"]) for data in encoded]


def _thumbnail(data: bytes | str, max_pixels: int) -> Thumbnail:
    if isinstance(data, str):
        return Thumbnail(None, f"cannot be read: {data}")
    try:
        pixels_CHW = images.decode(data, None, max_pixels)
    except images.BadImage as error:
        return Thumbnail(None, f"cannot be read: {error}")
    image = Image.fromarray(pixels_CHW.permute(1, 2, 0).squeeze(2).numpy())  # a grey one as (H,W)
    small = max(image.size) <= PIXEL_ART
    image.thumbnail((SIDE, SIDE))
    stream, kind = io.BytesIO(), "PNG" if small else "JPEG"
    image.save(stream, kind)
    return Thumbnail(data_uri(stream.getvalue(), f"image/{kind.lower()}"), pixel_art=small)


def data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
