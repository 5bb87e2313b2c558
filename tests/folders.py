"""Folders of small images, as sources of pools."""

import io
from pathlib import Path

from PIL import Image

from raypfk.config import DataConfig
from raypfk.pool import Pool


def png(value: int = 0, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (value % 256, value // 256, 7)).convert(mode).save(stream, "PNG")
    return stream.getvalue()


def tree(root: Path, count: int = 12) -> Path:
    """Two classes of `count` images each, all different."""
    for i in range(count):
        for label, name in enumerate(("cat", "dog")):
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / name / f"{i:03d}.png").write_bytes(png(2 * i + label))
    return root


def folder(root: Path, **fields) -> DataConfig:
    return DataConfig(**({"source": "folder", "root": str(root), "shard_rows": 5} | fields))


def ids_of(pool: Pool, split: str = "pool") -> list[str]:
    return [i for s in pool.shards(split) for i in pool.read_shard(s, ["image_id"])["image_id"].to_pylist()]
