"""Whether to go on, and whether to believe what a run says: a row for each round, and warnings in words.

Everything is read from the run directory, and nothing of it is of the test set, but for how many of its images could
not be read: what a run is stopped or changed by must not have seen what it is measured by. docs/trust.md says what each
number means, and what it does not.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from raypfk import descriptor_files, pfk, store
from raypfk.descriptor_files import Origin
from raypfk.pool import Shard
from raypfk.run import Run
from raypfk.salts import salts
from raypfk.schema import LABELS, SELECTION

FEW = 30
"""Validation images of a class: with fewer, one standard error of its accuracy may be 9 points and more."""
APART = 2
"""Rounds between two networks that are compared: what one round changes is mostly noise."""
SAMPLE = 1000
"""Images of either side that the two-sample test looks at."""
SHIFTED = 0.01
"""A `shift_p` below it is worth a warning."""
_SHOWN = 5
_READERS = 8

TRUST = pa.schema(
    [
        ("round", pa.int32()),
        ("bought", pa.int64()),  # labels, before this round
        ("validation_accuracy", pa.float64()),  # of the network that the round started with
        ("plateau", pa.float64()),  # McNemar's p, against the network that the round but one before started with
        ("expected_gain", pa.float64()),  # in accuracy, 0..1, by the next P labels
        ("worth_buying", pa.int64()),  # labels, until P more would gain less than the validation set can show
        ("shift", pa.float64()),  # MMD^2 between the validation images and the round's selection
        ("shift_p", pa.float64()),
    ]
)
"""null: not known yet, or of no meaning for the strategy."""

Row = dict[str, Any]


def of(run: Run) -> pa.Table:
    """A row (`TRUST`) for each round that is extracted, in order: what was known by then."""
    networks = _networks(run)
    return pa.Table.from_pylist([_row(run, networks[: i + 1]) for i in range(len(networks))], TRUST)


def warnings(run: Run) -> list[str]:
    """What should be mended, or looked at, a sentence each."""
    return latest(run)[1]


def latest(run: Run) -> tuple[Row | None, list[str]]:
    """The last row of `of`, if there is any, and the `warnings`: together, as they are read from the same files."""
    networks = _networks(run)
    if not networks:
        return None, at_start(run)
    row = dict.fromkeys(TRUST.names) | _row(run, networks)
    number, here = row["round"], networks[-1]
    return row, [*at_start(run), *_by_labels(run, number), *_unread(run, number), *_no_miss(run, here), *_shifted(row)]


def at_start(run: Run) -> list[str]:
    """Those of the `warnings` that the pool alone gives rise to."""
    return [*too_few(run), *other_classes(run)]


# ---------------------------------------------------------------------------------------------------------------- rows


class _Network(NamedTuple):
    """What a round started with, the labels it had learnt from, and how it did on the validation images: `answers`,
    image_id string and missed bool, None where the strategy does not look at them."""

    round: int
    bought: int
    answers: pa.Table | None

    @property
    def misses(self) -> int:
        return pc.sum(self.answers["missed"], min_count=0).as_py()

    @property
    def images(self) -> int:
        return self.answers.num_rows


def _networks(run: Run) -> list[_Network]:
    """Those of all rounds that are extracted."""
    found, bought, number = [], 0, 1
    while run.done(number, "extract"):
        if number > 1:
            bought += run.read(run.round(number - 1).labels, LABELS).num_rows
        path = run.round(number).validation
        answers = run.read(path, columns=["image_id", "missed"]) if store.exists(path) else None
        found.append(_Network(number, bought, answers))
        number += 1
    return found


def _row(run: Run, networks: list[_Network]) -> Row:
    """Of the last of them, as known by then."""
    here = networks[-1]
    row = {"round": here.round, "bought": here.bought}
    if here.answers is None:
        return row
    row["validation_accuracy"] = (here.images - here.misses) / here.images
    if len(networks) > APART:
        row["plateau"] = _plateau(here, networks[-1 - APART])
    return row | _outlook(run, networks) | _shift(run, here.round)


def _plateau(here: _Network, before: _Network) -> float:
    """Over the images that both were shown: one may have been rejected in one round alone."""
    both = here.answers.join(before.answers, "image_id", join_type="inner", right_suffix="_before")
    return pfk.mcnemar(*(torch.from_numpy(both[name].to_numpy()) for name in ("missed", "missed_before")))


def _outlook(run: Run, networks: list[_Network]) -> Row:
    """What more labels would bring, by the law of all networks that have learnt from any."""
    here, budget = networks[-1], run.config.budget
    curve = [network for network in networks if network.bought]
    law = pfk.fit_power_law(*([getattr(n, name) for n in curve] for name in ("bought", "misses", "images")))
    if law is None:
        return {}
    visible = pfk.standard_error(here.misses, here.images)
    return {"expected_gain": law.gain(here.bought, budget), "worth_buying": law.worth(here.bought, budget, visible)}


def _shift(run: Run, number: int) -> Row:
    """The two-sample test of the round's selection; nothing if it is not chosen yet, or no features were written."""
    if run.strategy.kind == "gradients" or not run.done(number, "acquire"):
        return {}
    selected = run.read(run.round(number).selection, SELECTION)["image_id"]
    selected = selected.take(pa.array(_sample(run, number, selected)))
    table, described, origin = descriptor_files.read_validation(run, number)
    described = described.rows(torch.from_numpy(_sample(run, number, table["image_id"])))
    if min(len(described.z), len(selected)) < 2:
        return {}
    directions = descriptor_files.directions_of(run, number)
    trusted_NL = (directions.project(described) if directions else described).z
    origin = descriptor_files.stored_origin(run, origin, directions)
    test = pfk.kernel_two_sample(trusted_NL, _features(run, number, selected, origin), run.seed("shift", number))
    return {"shift": test.mmd2, "shift_p": test.p}


def _sample(run: Run, number: int, ids: pa.ChunkedArray) -> np.ndarray:
    """Rows of at most `SAMPLE` images, drawn by their own numbers, ascending."""
    return np.sort(np.argsort(salts(ids.to_pylist(), run.seed("shift", number)), kind="stable")[:SAMPLE])


def _features(run: Run, number: int, ids: pa.ChunkedArray, origin: Origin) -> Tensor:
    """Of these pool images (N, L), in the order of image_id; only the shards that hold them are read."""

    def read(shard: Shard, wanted: list[str]) -> Tensor:
        path = run.round(number).described(shard.name)
        table, described = descriptor_files.read_shard(run, path, shard, origin)
        return described.z[torch.from_numpy(np.flatnonzero(pc.is_in(table["image_id"], pa.array(wanted))))]

    shards = run.pool.by_shard(ids.to_pylist())
    with ThreadPoolExecutor(_READERS) as threads:
        return torch.cat(list(threads.map(read, shards, shards.values())))


# ------------------------------------------------------------------------------------------------------------ warnings


def too_few(run: Run) -> list[str]:
    """Of the validation set's size, in all and of each class."""
    images, budget, found = run.pool.rows("validation"), run.config.budget, []
    if images < budget:
        found.append(
            f"the validation set has {images:,} images, fewer than the {budget:,} bought a round: each of its misses "
            "asks for several images that are much alike; add trusted images, or buy fewer a round"
        )
    few = {name: rows for name, rows in _histogram(run, "validation").items() if 0 < rows < FEW}
    if few:
        fewest = min(few, key=few.get)
        error = 100 * pfk.standard_error(few[fewest] / 2, few[fewest])
        found.append(
            f"the validation set has fewer than {FEW} images of {_classes(few)}: one standard error of the accuracy of "
            f"class {fewest}, with {few[fewest]}, is up to {error:.0f} points; add trusted images, or do not go by it"
        )
    return found


def other_classes(run: Run) -> list[str]:
    """Of classes that one of pool and validation set has and the other has not, where the pool's labels are known."""
    pool, trusted = _histogram(run, "pool"), _histogram(run, "validation")
    if not pool or not trusted:
        return []
    lacking = [name for name, rows in trusted.items() if rows and not pool[name]]
    unseen = [name for name, rows in pool.items() if rows and not trusted[name]]
    return [*_lacking("no image of the pool is", lacking), *_unseen("the pool has", unseen)]


def _by_labels(run: Run, number: int) -> list[str]:
    """The same of a pool whose labels are not known, by those bought and those estimated."""
    trusted = _histogram(run, "validation")
    if _histogram(run, "pool") or not trusted:
        return []
    names = run.pool.classes
    bought = run.labelled(number + bool(run.done(number, "label")))["label"]
    known = {names[label] for label in pc.unique(bought).to_pylist()}
    missing = {names.index(name) for name, rows in trusted.items() if rows and name not in known}
    lacking = [names[label] for label in sorted(_never_estimated(run, number, missing))]
    unseen = [name for name in names if name in known and not trusted[name]]
    of_none = f"none of the {len(bought):,} labels bought, and no image of the pool by its estimated label, is"
    return [*_lacking(of_none, lacking), *_unseen("labels were bought of", unseen)]


def _never_estimated(run: Run, number: int, classes: set[int]) -> set[int]:
    """Those that no image of the pool is estimated to be of; none where the strategy estimates nothing."""
    if not run.estimates:
        return set()
    for shard in run.pool.shards("pool"):
        if not classes:  # mostly after the first shards
            break
        path = run.round(number).described(shard.name)
        classes = classes - set(pc.unique(run.read(path, columns=["estimated_label"])["estimated_label"]).to_pylist())
    return classes


def _unread(run: Run, number: int) -> list[str]:
    """Of validation and test images that are left out of what is asked and measured."""
    last = number if run.done(number, "evaluate") else number - 1
    counts = [
        ("validation", number, (run.done(number, "extract") or {}).get("validation_rejected")),
        ("test", last, (run.done(last, "evaluate") or {}).get("rejected")),
    ]
    return [
        f"{count:,} of {run.pool.rows(split):,} {split} images could not be read in round {at} and are left out: "
        f"why in {run.round(at).rejects(split)}"
        for split, at, count in counts
        if count
    ]


def _no_miss(run: Run, here: _Network) -> list[str]:
    if run.strategy.kind == "chance" or here.answers is None or here.misses:
        return []
    return [
        f"the network of round {here.round} gets all {here.images:,} validation images right: with no miss to aim at, "
        "all of them stand in; add trusted images that it gets wrong, or stop"
    ]


def _shifted(row: Row) -> list[str]:
    if row["shift_p"] is None or row["shift_p"] >= SHIFTED:
        return []
    return [
        f"what round {row['round']} selected differs from the validation set (MMD^2 {row['shift']:.3f}, p "
        f"{row['shift_p']:.2g}): meant to shrink over rounds; where it does not, look at what was selected"
    ]


def _lacking(of_none: str, classes: list[str]) -> list[str]:
    wanted = "which the validation set has: no label bought can mend its misses there; add such images to the pool"
    return [f"{of_none} of {_classes(classes)}, {wanted}"] if classes else []


def _unseen(who: str, classes: list[str]) -> list[str]:
    why = "of which the validation set has no image: nothing asks for them or shows how they do; add trusted ones"
    return [f"{who} {_classes(classes)}, {why}"] if classes else []


def _histogram(run: Run, split: str) -> dict[str, int]:
    """Images of each class; empty where the labels are not known."""
    return run.pool.manifest["splits"][split]["label_histogram"] or {}


def _classes(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _SHOWN
    shown = ", ".join(names[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
    return f"class {shown}" if len(names) == 1 else f"{len(names):,} classes ({shown})"
