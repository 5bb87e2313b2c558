"""`raypfk demo`: the main job on the bundled digits, pfk against random."""

import importlib.resources
import time

from rich.console import Console
from rich.table import Table

from raypfk import config as configs
from raypfk import loop, progress, status, store
from raypfk.report.curves import plot_curves
from raypfk.stages import pool as pools

STRATEGIES = ("pfk", "random")


def demo(out: str) -> None:
    """Run configs/digits.yaml with each strategy on one pool under `out`; print a table, write accuracy.png."""
    start = time.perf_counter()
    out = store.absolute(out)
    path = str(importlib.resources.files("raypfk.configs") / "digits.yaml")
    config = configs.load(path)
    pool = pools.build(config.data, store.join(out, "pool"), config.seed)
    data = config.data.of_pool(pool.uri)
    states = {}
    for strategy in STRATEGIES:
        progress.current().say(f"{strategy}:")
        run = store.join(out, strategy)
        loop.run(config.model_copy(update={"data": data, "strategy": strategy}), run)
        states[strategy] = status.read(run)
    _table(states)
    plot = store.join(out, "accuracy.png")
    plot_curves(list(states.values()), plot, "Handwritten digits, classes 5 to 9 ten times rarer in the pool")
    progress.current().say(f"plot: {plot}; {time.perf_counter() - start:.0f} s in all")


def _table(states: dict[str, dict]) -> None:
    table = Table("labelled", *states, box=None, pad_edge=False, title="test accuracy")
    rounds = [[row for row in state["done"] if row["round"]] for state in states.values()]
    for rows in zip(*rounds, strict=True):
        table.add_row(str(rows[0]["labelled"]), *(f"{100 * row['test_accuracy']:.1f} %" for row in rows))
    Console(highlight=False).print(table)
