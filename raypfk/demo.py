"""`raypfk demo`: the main job on the bundled digits, pfk against random."""

import importlib.resources
import time

from rich.console import Console
from rich.table import Table

from raypfk import config as configs
from raypfk import loop, progress, status, store, study
from raypfk.report import figures, gather
from raypfk.run import Run
from raypfk.stages import pool as pools
from raypfk.study import Study

STRATEGIES = ("pfk", "random")


def demo(out: str, command: str | None = None) -> None:
    """Run configs/digits.yaml with each strategy on one pool under `out`; print a table, write accuracy.png."""
    start = time.perf_counter()
    out = store.absolute(out)
    path = str(importlib.resources.files("raypfk.configs") / "digits.yaml")
    config = configs.load(path)
    pool = pools.build(config.data, store.join(out, "pool"), config.seed)
    data = config.data.of_pool(pool.uri)
    runs = {}
    for strategy in STRATEGIES:
        progress.current().say(f"{strategy}:")
        settings = config.model_copy(update={"data": data, "strategy": strategy})
        runs[strategy] = loop.run(settings, store.join(out, strategy), command)
    _table({strategy: status.read(run.uri) for strategy, run in runs.items()})
    plot = store.join(out, "accuracy.png")
    store.write_bytes(plot, _plot(out, list(runs.values())))
    progress.current().say(f"plot: {plot}; {time.perf_counter() - start:.0f} s in all")


def _plot(out: str, runs: list[Run]) -> bytes:
    compared = Study(out, "demo", None, None, [study.alone(run) for run in runs])
    curves = gather.curves(compared, study.table(compared))
    title = "Digits, classes 5 to 9 ten times rarer in the pool:\ntest accuracy (%)"
    look = figures.looks([cell.name for cell in curves])
    return figures.png(figures.curves(curves, ("test_accuracy", "last epoch"), None, title, look))


def _table(states: dict[str, dict]) -> None:
    table = Table("labelled", *states, box=None, pad_edge=False, title="test accuracy")
    rounds = [[row for row in state["done"] if row["round"]] for state in states.values()]
    for rows in zip(*rounds, strict=True):
        table.add_row(str(rows[0]["labelled"]), *(f"{100 * row['test_accuracy']:.1f} %" for row in rows))
    Console(highlight=False).print(table)
