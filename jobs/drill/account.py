"""What a finished run holds, counted from its files."""

import hashlib
import io
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import torch

from jobs.drill.place import ROOT, Trial


@dataclass(frozen=True)
class Account:
    """selections: ids in order, by round. weights: of the trained networks, by round, as hashes. images: of the
    source, in a pool or rejected."""

    selections: tuple[tuple[str, ...], ...]
    weights: tuple[str, ...]
    images: frozenset[str]
    lost: int
    duplicated: int
    clean: bool


def account(trial: Trial, rounds: int, images: frozenset[str] | None = None) -> Account:
    """images: all that must be accounted for; None: what the pool holds."""
    splits = {split: trial.ids(f"pool/{split}") for split in ("pool", "validation", "test")}
    everywhere = [*splits["pool"], *splits["validation"], *splits["test"], *trial.ids("pool/rejects.parquet")]
    images = frozenset(everywhere) if images is None else images
    counts, selections, weights, labelled = [_differences(everywhere, images)], [], [], []
    for number in range(1, rounds + 1):
        folder = f"rounds/{number:03d}"
        selected = trial.ids(f"{folder}/selection.parquet")
        described = [*trial.ids(f"{folder}/descriptors"), *trial.ids(f"{folder}/rejects/pool"), *labelled]
        checked = [*trial.ids(f"{folder}/validation.parquet"), *trial.ids(f"{folder}/rejects/validation")]
        bought = trial.ids(f"{folder}/labels.parquet")
        counts += [
            _differences(described, splits["pool"]),
            _differences(checked, splits["validation"]),
            _differences(bought, selected),
        ]
        selections.append(tuple(selected))
        weights.append(_weights(trial.read(f"{folder}/checkpoint/model.pt")))
        labelled += bought
    counts.append(_differences(labelled, set(labelled)))
    lost, duplicated = (sum(column) for column in zip(*counts, strict=True))
    return Account(tuple(selections), tuple(weights), images, lost, duplicated, _verified(trial))


def _differences(found: list[str], expected) -> tuple[int, int]:
    """How many are lost, and how many more there are than expected."""
    there, wanted = Counter(found), Counter(expected)
    return (wanted - there).total(), (there - wanted).total()


def _weights(checkpoint: bytes) -> str:
    tensors = torch.load(io.BytesIO(checkpoint), weights_only=True)["weights"]
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


def _verified(trial: Trial) -> bool:
    command = [sys.executable, "-m", "raypfk.cli", "verify", trial.out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        trial.note(f"verify: {done.stdout}{done.stderr}")
    return done.returncode == 0
