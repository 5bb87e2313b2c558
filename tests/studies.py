"""An experiment's files, written by hand through raypfk's own writers: no Ray, no training, milliseconds a round.

Every number is made up, and the same each time; the kernel's cells ask by misses, others draw at random.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from raypfk import config as configs
from raypfk import descriptor_files, lease, pfk, store, study
from raypfk import pool as pools
from raypfk.config import DataConfig
from raypfk.pool import Pool
from raypfk.run import Run
from raypfk.schema import IMAGES, LABELS, SELECTION
from raypfk.stages import evaluate
from tests.folders import png

CLASSES = ("cat", "<script>alert('dog')</script>", "$\\frac")
SIZES = {"pool": 24, "validation": 36, "test": 12}
RARE = [2]
BUDGET = 3


def pool(uri: str, classes: Sequence[str] = CLASSES) -> Pool:
    """Images of one colour each, in one shard a split; the last class is rare in the pool."""
    splits = {}
    for first, (split, size) in zip((0, 100, 200), SIZES.items(), strict=True):
        labels = [i % 3 if split != "pool" else (2 if i % 8 == 7 else i % 2) for i in range(size)]
        rows = [(f"{split}/{i:03d}.png", png(first + i), 6, 5, label) for i, label in enumerate(labels)]
        table = pa.table(
            [pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), IMAGES, strict=True)], schema=IMAGES
        )
        data = store.encode_table(table)
        store.write_bytes(store.join(uri, split, "00000.parquet"), data)
        content = pools.content((row[0], row[1], row[4]) for row in rows)
        file = {"name": "00000.parquet", "rows": size, "bytes": data.size, "sha256": store.sha256(data)}
        shard = {"name": "00000.parquet", "rows": size, "first_id": rows[0][0], "last_id": rows[-1][0]}
        splits[split] = {
            "rows": size,
            "bytes": data.size,
            "content": content,
            "label_histogram": {name: labels.count(i) for i, name in enumerate(classes)},
            "files": [file | {"content": content}],
            "shards": [shard | {"files": ["00000.parquet"]}],
        }
    manifest = {
        "format_version": pools.FORMAT,
        "fingerprint": pools.fingerprint({name: split["content"] for name, split in splits.items()}),
        "seed": 0,
        "classes": list(classes),
        "data": DataConfig(source="digits", imbalance={"ratio": 4, "classes": RARE}).model_dump(
            exclude={"max_rejects"}
        ),
        "image": {"channels": 3, "width": 6, "height": 5},
        "imbalance": {"classes": RARE, "rare_before": 12, "rare_kept": 3, "others": 21},
        "notes": [],
        "splits": splits,
        "rejects": 0,
    }
    store.write_json(store.join(uri, pools.MANIFEST), manifest)
    return Pool.open(uri)


def run(uri: str, of: Pool, strategy: str, seed: int, accuracies: Sequence[float], rounds: int = 2) -> Run:
    """A run that has done a round for each of these accuracies, of 12 test images, out of `rounds`."""
    settings = {
        "data": {"pool": of.uri},
        "image": {"size": 16, "channels": 3},
        "model": {"name": "lenet", "taps": ["fc1"]},
        "train": {"epochs": 2, "batch_size": 4, "lr": 0.1},
        "strategy": strategy,
        "seed": seed,
        "budget": BUDGET,
        "rounds": rounds,
    }
    made = Run.create_or_open(configs.validate(settings, "studies"), uri, of)
    with lease.held(made.uri):
        made.mark(0, "train", {"seconds": 0.0})
        for number, accuracy in enumerate(accuracies, 1):
            _round(made, number, accuracy)
    return made


def experiment(
    uri: str, of: Pool, accuracies: dict[str, dict[int, Sequence[float]]], seeds: list[int], **record
) -> str:
    """Cells named for their strategy, each with the runs of `accuracies`; seeds: those that were to be."""
    cells = {name: {"seeds": seeds} for name in accuracies}
    store.write_json(store.join(uri, study.RECORD), {"title": "A & B", "cells": cells} | record)
    for name, by_seed in accuracies.items():
        for seed, of_rounds in by_seed.items():
            run(study.run_dir(uri, name, seed), of, name, seed, of_rounds)
    return uri


def _round(made: Run, number: int, accuracy: float) -> None:
    by_kernel = made.strategy.kind == "kernel"
    ids, before = [f"pool/{i:03d}.png" for i in range(SIZES["pool"])], BUDGET * (number - 1)
    left, chosen = ids[before:], ids[before : before + BUDGET]
    if by_kernel:
        _describe(made, number, left)
    truth = made.pool.labels_of(chosen)
    why = {"score": 0.5, "center_id": "validation/002.png", "rank": 0, "estimated_label": 1} if by_kernel else {}
    selection = [{"position": i, "image_id": image_id, **why} for i, image_id in enumerate(chosen)]
    made.write(made.round(number).selection, pa.Table.from_pylist(selection, SELECTION))
    labels = [{"image_id": image_id, "label": label, "source": "simulated"} for image_id, label in truth.items()]
    made.write(made.round(number).labels, pa.Table.from_pylist(labels, LABELS))
    right = round(accuracy * SIZES["test"])
    label = np.arange(SIZES["test"]) % 3
    confusion = np.zeros((3, 3), np.int64)
    np.add.at(confusion, (label, np.where(np.arange(SIZES["test"]) < right, label, (label + 1) % 3)), 1)
    described = (SIZES["validation"] + len(left)) if by_kernel else 0
    markers = {
        "extract": {"seconds": 1.0, "forward": described, "backward": described},
        "score": {"seconds": 1.0},
        "acquire": {"seconds": 0.5, "selected": BUDGET},
        "label": {"seconds": 0.0},
        "train": {
            "seconds": 2.0,
            "loss": 1.0,
            "monitored": [accuracy, min(1, accuracy + 1 / 6)],
            "forward": 6,
            "backward": 6,
        },
        "evaluate": {"seconds": 0.1, "confusion": confusion.tolist(), "tested": SIZES["test"], **_quality(truth, why)},
    }
    evaluate.write_metrics(made, number, markers)
    for stage, facts in markers.items():
        made.mark(number, stage, facts)


def _quality(truth: dict[str, int], why: dict) -> dict[str, float]:
    """As stages/quality.py has it of the selection; of the pool made up."""
    labels = np.array(list(truth.values()))
    selected = {"minority_share": float(np.isin(labels, RARE).mean())}
    if not why:
        return selected
    pool = {"pool_estimates": 0.5, "minority_precision": 0.25, "minority_recall": 0.75}
    return selected | {"selected_estimates": float((labels == why["estimated_label"]).mean())} | pool


def _describe(made: Run, number: int, left: list[str]) -> None:
    """Random features; every validation image of the third class is a miss, taken for the first."""
    origin = descriptor_files.full_origin(made, "0" * 16)
    draws = torch.Generator().manual_seed(number)

    def described(count: int) -> pfk.Descriptors:
        x_NL = pfk.standardise(torch.randn(count, sum(made.lengths), generator=draws), made.lengths)
        return pfk.Descriptors(x_NL, x_NL)

    label = np.arange(SIZES["validation"]) % 3
    missed = label == 2
    columns = {"image_id": [f"validation/{i:03d}.png" for i in range(len(label))]}
    facts = {"predicted": np.where(missed, 0, label), "estimated_label": label, "label": label}
    table = descriptor_files.encode(
        columns | facts | {"missed": missed, "center": missed}, described(len(label)), origin
    )
    descriptor_files.write(made.round(number).validation, table, made.id, origin)
    facts = {"predicted": np.zeros(len(left), np.int64), "estimated_label": np.ones(len(left), np.int64)}
    table = descriptor_files.encode({"image_id": left} | facts, described(len(left)), origin)
    descriptor_files.write(made.round(number).described("00000.parquet"), table, made.id, origin)
