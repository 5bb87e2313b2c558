"""What a round's selection and estimated labels were worth, by labels that are known by then."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypfk.pool import Shard
from raypfk.run import Run
from raypfk.schema import LABELS, SELECTION
from raypfk.stages.best import each

QUALITY = ("minority_share", "selected_estimates", "pool_estimates", "minority_precision", "minority_recall")


def quality(run: Run, round: int) -> dict[str, float | None]:
    """Shares, 0..1, null where they are not known or of no meaning.

    minority_share: of the selection, images of the classes that data.imbalance made rare. selected_estimates,
    pool_estimates: of the selection, of the pool, images whose label was estimated rightly. minority_precision: of the
    pool's images estimated to be of a rare class, those that are; minority_recall: of those that are, those estimated
    to be. Of the pool's images all but what was labelled before; only in a pool with hidden labels.
    """
    rare, files = rare_classes(run), run.round(round)
    selection, labels = run.read(files.selection, SELECTION), run.read(files.labels, LABELS)
    label = _of(selection["image_id"], labels)
    found = dict.fromkeys(QUALITY)
    if rare:
        found["minority_share"] = share(np.isin(label, rare).sum(), len(label))
    if not run.estimates:
        return found
    estimated = selection["estimated_label"].to_numpy(zero_copy_only=False)
    found["selected_estimates"] = share((estimated == label).sum(), len(label))
    if run.pool.manifest["splits"]["pool"]["label_histogram"] is not None:
        found |= _of_pool(run, round, rare)
    return found


def rare_classes(run: Run) -> list[int]:
    """The classes that the pool's configuration made rare."""
    return (run.pool.manifest["imbalance"] or {}).get("classes", [])


def share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def _of_pool(run: Run, round: int, rare: list[int]) -> dict[str, float | None]:
    def count(shards: list[Shard]) -> np.ndarray:
        return sum(_counted(run, round, shard, rare) for shard in shards)

    images, right, is_rare, said_rare, both = sum(each(count, run.pool.shards("pool")))
    by_class = {"minority_precision": share(both, said_rare), "minority_recall": share(both, is_rare)}
    return {"pool_estimates": share(right, images)} | (by_class if rare else {})


def _counted(run: Run, round: int, shard: Shard, rare: list[int]) -> np.ndarray:
    """Of a shard's images (5,): all, rightly estimated, of a rare class, estimated to be, both."""
    path = run.round(round).described(shard.name)
    described = run.read(path, columns=["image_id", "estimated_label"])
    estimated = described["estimated_label"].to_numpy()
    label = _of(described["image_id"], run.pool.read_shard(shard, ["image_id", "label"]))
    is_rare, said_rare = np.isin(label, rare), np.isin(estimated, rare)
    return np.array([len(label), *(x.sum() for x in (estimated == label, is_rare, said_rare, is_rare & said_rare))])


def _of(ids: pa.ChunkedArray, labels: pa.Table) -> np.ndarray:
    """Labels of images, from a table of image_id and label."""
    return labels["label"].take(pc.index_in(ids, labels["image_id"].combine_chunks())).to_numpy()
