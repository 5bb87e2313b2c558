"""What can become a pool: images in folders (also ILSVRC's), tars, tables, lists of places, or torchvision's data sets.

A source lists its images without reading their pixels; `read(keys)` then gives encoded images, in any process.
Image ids never change: of files the path below the root ("/" between, Unicode NFC), of a tar's members its path and
theirs, of a table's rows its path and their number, of a data set the index in it ("train/00042").
"""

from raypfk.config import DataConfig
from raypfk.sources.datasets import Arrays
from raypfk.sources.folder import Folder
from raypfk.sources.ilsvrc import Ilsvrc
from raypfk.sources.labels import joined
from raypfk.sources.listing import UNKNOWN, Entries, Listing, Source
from raypfk.sources.splits import split
from raypfk.sources.tables import Places, Tables
from raypfk.sources.tars import Tars

__all__ = [
    "UNKNOWN", "Arrays", "Entries", "Folder", "Ilsvrc", "Listing", "Places", "Source", "Tables", "Tars", "of", "split",
]  # fmt: skip


def of(data: DataConfig) -> Source:
    """The source that the configuration names."""
    roots = (data.root, data.validation_root, data.test_root)
    match data.source:
        case "folder":
            return Folder(*roots)
        case "ilsvrc":
            return Ilsvrc(data.root)
        case "webdataset":
            return Tars(*roots)
        case "parquet":
            return Tables(*roots, data.columns)
        case "manifest":
            return Places(*roots, data.columns)
    return Arrays(data.source, data.root)


def listing(data: DataConfig) -> Listing:
    """All that the configuration's source has, with the labels of `data.labels`."""
    found = of(data).list()
    return joined(found, data.labels) if data.labels else found
