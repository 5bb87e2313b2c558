"""What a run's rounds came to, as a table with a row for each: accuracies, what was selected, passes, seconds.

Everything is read from the run directory, so that it can be asked at any time, of a run that goes on too.
"""

import pyarrow as pa

from raypfk import store
from raypfk.run import Run
from raypfk.stages.evaluate import PASSES

ACQUIRING = ("extract", "score", "acquire")
"""The stages of Table 1's column AL; `train` is its other."""

RESULTS = pa.schema(
    [
        ("round", pa.int32()),
        ("bought", pa.int64()),  # labels, in all rounds so far
        ("validation_labels", pa.int64()),  # that were there before
        ("test_accuracy", pa.float64()),  # of the last epoch
        ("best_epoch_accuracy", pa.float64()),  # of all epochs on the test set: what published curves often show
        ("minority_accuracy", pa.float64()),  # over the test images of the classes that data.imbalance made rare
        ("per_class_accuracy", pa.list_(pa.float64())),
        ("minority_share", pa.float64()),  # this and the next four: stages/quality.py
        ("selected_estimates", pa.float64()),
        ("pool_estimates", pa.float64()),
        ("minority_precision", pa.float64()),
        ("minority_recall", pa.float64()),
        ("forward", pa.int64()),  # passes of the stages that acquire
        ("backward", pa.int64()),
        ("after_dropout", pa.int64()),
        ("train_forward", pa.int64()),
        ("train_backward", pa.int64()),
        ("monitor_forward", pa.int64()),  # beside them, of test images: what best_epoch_accuracy costs
        ("acquire_seconds", pa.float64()),
        ("train_seconds", pa.float64()),
    ]
)
"""null: not known, or of no meaning for the strategy or the pool."""


def of(run: Run) -> pa.Table:
    """A row (`RESULTS`) for each round that is evaluated, in order."""
    rows, number = [], 1
    while run.done(number, "evaluate"):
        metrics = store.read_record(run.round(number).metrics, {"labelled": int, "test_accuracy": float})
        accuracies = {field.name: metrics.get(field.name) for field in RESULTS}
        best = {"best_epoch_accuracy": max(metrics.get("monitored") or [], default=None)}
        bought = {"bought": metrics["labelled"], "validation_labels": run.pool.rows("validation")}
        rows.append(accuracies | best | bought | {"round": number} | _costs(run, number))
        number += 1
    return pa.Table.from_pylist(rows, RESULTS)


def _costs(run: Run, number: int) -> dict:
    markers = {stage: run.done(number, stage) or {} for stage in (*ACQUIRING, "train")}
    passes = {name: sum(markers[stage].get(name, 0) for stage in ACQUIRING) for name in PASSES}
    return passes | {
        "train_forward": markers["train"].get("forward"),
        "train_backward": markers["train"].get("backward"),
        "monitor_forward": markers["train"].get("monitor_forward"),
        "acquire_seconds": sum(markers[stage].get("seconds", 0.0) for stage in ACQUIRING),
        "train_seconds": markers["train"].get("seconds"),
    }
