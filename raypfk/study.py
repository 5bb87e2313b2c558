"""What is compared: runs by cell and seed, of an experiment's directory, or a run alone; and their table of results.

An experiment's directory holds experiment.json (title, figure, and of each cell the seeds that were asked for last),
pools/ and starts/ (pools and initial weights that cells share), cells/CELL/seed-000/ (run directories), and
results.parquet and results.csv (`table`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.csv
from rich.console import Console
from rich.table import Table

from raypfk import results, store
from raypfk.errors import UserError
from raypfk.run import Run

RECORD = "experiment.json"
TABLE = pa.schema([pa.field("cell", pa.string()), pa.field("seed", pa.int64()), *results.RESULTS])
"""A row for each round of each run that is evaluated."""


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seed alone. seeds: those that it has, or was asked for. published: the name of its
    curve among the paper's, if it has one."""

    name: str
    seeds: list[int]
    published: str | None = None
    runs: dict[int, Run] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """uri: where it lies. figure: whose published curves are drawn beside, if any. command: what its runs were asked
    for by, if that is known. missing: of the runs, (cell, seed) of those that are not begun."""

    uri: str
    title: str
    figure: str | None
    command: str | None
    cells: list[Cell]
    missing: list[tuple[str, int]] = field(default_factory=list)

    def runs(self) -> Iterator[tuple[Cell, int, Run]]:
        for cell in self.cells:
            for seed, run in cell.runs.items():
                yield cell, seed, run


def open_study(uri: str) -> Study:
    """An experiment's directory, or a run's: a study of one cell. UserError where neither is."""
    uri = store.absolute(uri)
    if store.exists(store.join(uri, "run.json")):
        run = Run.open(uri)
        return Study(uri, uri.rpartition("/")[2], None, run.command, [alone(run)])
    path = store.join(uri, RECORD)
    if not store.exists(path):
        raise UserError(f"{uri}: no run and no experiment here ({RECORD} and run.json are missing)")
    record = store.read_record(path, {"title": str, "cells": dict})
    cells, missing = [], []
    for name, facts in record["cells"].items():
        store.require(path, facts, {"seeds": list})
        begun = seeds_of(uri, name)
        runs = {seed: Run.open(run_dir(uri, name, seed)) for seed in begun}
        cells.append(Cell(name, sorted({*facts["seeds"], *begun}), facts.get("published"), runs))
        missing += [(name, seed) for seed in facts["seeds"] if seed not in runs]
    return Study(uri, record["title"], record.get("figure"), record.get("command"), cells, missing)


def alone(run: Run) -> Cell:
    """A run as a cell, named for its strategy."""
    name = run.config.strategy + (f", S={run.config.label_estimator}" if run.strategy.kind == "kernel" else "")
    return Cell(name, [run.config.seed], None, {run.config.seed: run})


def run_dir(uri: str, cell: str, seed: int) -> str:
    """Where an experiment has the run of a cell and a seed."""
    return store.join(_cell_dir(uri, cell), f"seed-{seed:03d}")


def seeds_of(uri: str, cell: str) -> list[int]:
    """Those that runs of an experiment's cell are begun on, in order."""
    named = (re.fullmatch(r"seed-(\d+)", entry.path) for entry in store.entries(_cell_dir(uri, cell)))
    seeds = sorted(int(found[1]) for found in named if found)
    return [seed for seed in seeds if store.exists(store.join(run_dir(uri, cell, seed), "run.json"))]


def _cell_dir(uri: str, cell: str) -> str:
    return store.join(uri, "cells", folder(cell))


def folder(cell: str) -> str:
    """Of a cell's runs."""
    return cell.replace(" ", "_")


def table(study: Study) -> pa.Table:
    """All runs' results (`TABLE`), in the order of the cells, seeds and rounds."""
    parts = [TABLE.empty_table()]
    for cell, seed, run in study.runs():
        rows = results.of(run)
        named = {"cell": pa.array([cell.name] * len(rows)), "seed": pa.array([seed] * len(rows), pa.int64())}
        parts.append(pa.table(named | {name: rows[name] for name in rows.column_names}).cast(TABLE))
    return pa.concat_tables(parts)


def write_results(study: Study) -> None:
    """results.parquet, and results.csv with a column for each class."""
    rows = table(study)
    store.write_table(store.join(study.uri, "results.parquet"), rows)
    classes = max((len(of or []) for of in rows["per_class_accuracy"].to_pylist()), default=0)
    flat = rows.drop_columns("per_class_accuracy")
    for c in range(classes):
        of_class = [of[c] if of else None for of in rows["per_class_accuracy"].to_pylist()]
        flat = flat.append_column(f"accuracy_{c}", pa.array(of_class, pa.float64()))
    buffer = pa.BufferOutputStream()
    pyarrow.csv.write_csv(flat, buffer)
    store.write_bytes(store.join(study.uri, "results.csv"), buffer.getvalue())


def show(study: Study) -> None:
    """A line for each cell: test accuracy after the last round that all its seeds have."""
    shown = Table("cell", "seeds", "labels", "test accuracy", "best epoch", "minority", box=None, pad_edge=False)
    rows = table(study).to_pandas()
    for cell in study.cells:
        of = rows[rows["cell"] == cell.name]
        last = of.groupby("seed")["round"].max().min()
        at = of[of["round"] == last]
        labels = f"{int(at['bought'].max()):,}" if len(at) else ""
        columns = ("test_accuracy", "best_epoch_accuracy", "minority_accuracy")
        shown.add_row(cell.name, str(len(at)), labels, *(_mean(at[column]) for column in columns))
    console = Console(highlight=False)
    console.print(f"{study.uri}: {study.title}", soft_wrap=True, markup=False)
    console.print(shown)


def _mean(values) -> str:
    """Mean and standard deviation over seeds, in percent."""
    known = 100 * np.array([v for v in values if v is not None and v == v])
    if not len(known):
        return ""
    return f"{known.mean():.2f} %" + (f" +- {known.std(ddof=1):.2f}" if len(known) > 1 else "")
