"""What a run's rounds came to, as a table with a row for each: accuracies, what was selected, passes, seconds.

Everything is read from the run directory, so that it can be asked at any time, of a run that goes on too. Accuracies
are of the last epoch; `best_epoch_accuracy` is the best of all epochs on the test set (`train.monitor`), which nobody
has who does not know the test labels: what published curves often show.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypfk import store
from raypfk.errors import UserError
from raypfk.run import Run
from raypfk.schema import LABELS, SELECTION
from raypfk.stages.evaluate import PASSES

ACQUIRING = ("extract", "score", "acquire")
"""The stages of Table 1's column AL; `train` is its other."""

RESULTS = pa.schema(
    [
        ("round", pa.int32()),
        ("bought", pa.int64()),  # labels, in all rounds so far
        ("validation_labels", pa.int64()),  # that were there before
        ("test_accuracy", pa.float64()),
        ("best_epoch_accuracy", pa.float64()),
        ("minority_accuracy", pa.float64()),  # over the test images of the classes that data.imbalance made rare
        ("per_class_accuracy", pa.list_(pa.float64())),
        ("minority_share", pa.float64()),  # of the round's selection
        ("selected_estimates", pa.float64()),  # share of the selection whose estimated label was right
        ("pool_estimates", pa.float64()),  # the same of the pool
        ("minority_precision", pa.float64()),  # of what was estimated to be of a rare class, the share that was
        ("minority_recall", pa.float64()),
        ("forward", pa.int64()),  # passes of the stages that acquire
        ("backward", pa.int64()),
        ("after_dropout", pa.int64()),
        ("train_forward", pa.int64()),
        ("train_backward", pa.int64()),
        ("acquire_seconds", pa.float64()),
        ("train_seconds", pa.float64()),
    ]
)
"""null: not known, or of no meaning for the strategy or the pool."""


def of(run: Run) -> pa.Table:
    """A row (`RESULTS`) for each round that is evaluated, in order."""
    rows, number = [], 1
    while run.done(number, "evaluate"):
        rows.append({"round": number, **_accuracies(run, number), **_selected(run, number), **_costs(run, number)})
        number += 1
    return pa.Table.from_pylist(rows, RESULTS)


def minority(run: Run) -> list[int]:
    """The classes that the pool's configuration made rare."""
    return (run.pool.manifest["imbalance"] or {}).get("classes", [])


def _accuracies(run: Run, number: int) -> dict:
    metrics = store.read_record(run.round(number).metrics, {"confusion": list, "per_class_accuracy": list})
    confusion, rare = np.array(metrics["confusion"]), minority(run)
    if confusion.shape != (run.classes, run.classes):
        raise UserError(f"{run.round(number).metrics}: confusion: expected {run.classes} rows of as many counts")
    tested, right = confusion.sum(1), np.diag(confusion)
    return {
        "bought": metrics["labelled"],
        "validation_labels": run.pool.rows("validation"),
        "test_accuracy": metrics["test_accuracy"],
        "best_epoch_accuracy": max(metrics.get("monitored") or [], default=None),
        "minority_accuracy": _share(right[rare].sum(), tested[rare].sum()),
        "per_class_accuracy": metrics["per_class_accuracy"],
    }


def _selected(run: Run, number: int) -> dict:
    """What the selection, and the estimated labels of the pool, were worth: by labels that are known by now."""
    files, rare = run.round(number), minority(run)
    selection, labels = run.read(files.selection, SELECTION), run.read(files.labels, LABELS)
    label = labels["label"].take(pc.index_in(selection["image_id"], labels["image_id"].combine_chunks())).to_numpy()
    facts = {"minority_share": float(np.isin(label, rare).mean()) if rare and len(label) else None}
    if run.strategy.kind == "kernel" or "classes" in run.strategy.given:
        facts["selected_estimates"] = float((selection["estimated_label"].to_numpy() == label).mean())
        facts |= _estimates(run, number, rare)
    return facts


def _estimates(run: Run, number: int, rare: list[int]) -> dict:
    """The pool's estimated labels against the hidden ones; nothing of a pool that has none."""
    if run.pool.manifest["splits"]["pool"]["label_histogram"] is None:
        return {}
    right = images = 0
    of_rare, found, hits = 0, 0, 0
    for shard in run.pool.shards("pool"):
        path = store.join(run.round(number).descriptors, shard.name)
        table, pool = run.read(path, columns=["image_id", "estimated_label"]), run.pool.read_shard(shard, _HIDDEN)
        hidden = pool["label"].take(pc.index_in(table["image_id"], pool["image_id"].combine_chunks())).to_numpy()
        estimated = table["estimated_label"].to_numpy()
        is_rare, said_rare = np.isin(hidden, rare), np.isin(estimated, rare)
        right, images = right + (estimated == hidden).sum(), images + len(hidden)
        of_rare, found, hits = of_rare + is_rare.sum(), found + said_rare.sum(), hits + (is_rare & said_rare).sum()
    return {
        "pool_estimates": _share(right, images),
        "minority_precision": _share(hits, found) if rare else None,
        "minority_recall": _share(hits, of_rare) if rare else None,
    }


_HIDDEN = ["image_id", "label"]


def _costs(run: Run, number: int) -> dict:
    markers = {stage: run.done(number, stage) or {} for stage in (*ACQUIRING, "train")}
    passes = {name: sum(markers[stage].get(name, 0) for stage in ACQUIRING) for name in PASSES}
    return passes | {
        "train_forward": markers["train"].get("forward"),
        "train_backward": markers["train"].get("backward"),
        "acquire_seconds": sum(markers[stage].get("seconds", 0.0) for stage in ACQUIRING),
        "train_seconds": markers["train"].get("seconds"),
    }


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None
