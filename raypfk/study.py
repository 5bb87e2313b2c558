"""What is compared: runs by cell and seed, of an experiment's directory, or a run alone; and their table of results.

    DIR/experiment.json                 what the experiment is: title, figure, seeds, cells
    DIR/pools/, DIR/starts/             pools and initial weights that cells share
    DIR/cells/CELL/seed-000/            run directories
    DIR/results.parquet, results.csv    `table`
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from raypfk import results, store
from raypfk.errors import UserError
from raypfk.run import Run

RECORD = "experiment.json"
TABLE = pa.schema([pa.field("cell", pa.string()), pa.field("seed", pa.int64()), *results.RESULTS])
"""A row for each round of each run that is evaluated."""


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seed alone. published: the name of its curve among the paper's, if it has one."""

    name: str
    published: str | None = None
    runs: dict[int, Run] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """uri: where it lies. figure: whose published curves are drawn beside, if any. missing: of the runs, (cell, seed)
    of those that are not begun."""

    uri: str
    title: str
    figure: str | None
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
        name = run.config.strategy + (f", S={run.config.label_estimator}" if run.strategy.kind == "kernel" else "")
        return Study(uri, uri.rpartition("/")[2], None, [Cell(name, None, {run.config.seed: run})])
    path = store.join(uri, RECORD)
    if not store.exists(path):
        raise UserError(f"{uri}: no run and no experiment here ({RECORD} and run.json are missing)")
    record = store.read_record(path, {"title": str, "seeds": list, "cells": dict})
    cells, missing = [], []
    for name, facts in record["cells"].items():
        cell = Cell(name, facts.get("published"))
        for seed in record["seeds"]:
            place = run_dir(uri, name, seed)
            if store.exists(store.join(place, "run.json")):
                cell.runs[seed] = Run.open(place)
            else:
                missing.append((name, seed))
        cells.append(cell)
    return Study(uri, record["title"], record.get("figure"), cells, missing)


def run_dir(uri: str, cell: str, seed: int) -> str:
    """Where an experiment has the run of a cell and a seed."""
    return store.join(uri, "cells", cell.replace(" ", "_"), f"seed-{seed:03d}")


def table(study: Study) -> pa.Table:
    """All runs' results (`TABLE`), in the order of the cells, seeds and rounds."""
    parts = [TABLE.empty_table()]
    for cell, seed, run in study.runs():
        rows = results.of(run)
        named = {"cell": pa.array([cell.name] * len(rows)), "seed": pa.array([seed] * len(rows), pa.int64())}
        parts.append(pa.table(named | {name: rows[name] for name in rows.column_names}).cast(TABLE))
    return pa.concat_tables(parts)
