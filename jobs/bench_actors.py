"""What more scoring actors give on this machine: the score stage's actors, merge tree and descriptor files, timed.

    python jobs/bench_actors.py --pool 262144 --layouts 1x1,2x1,1x2

A layout is actors x threads of each. Made-up descriptors (those of bench_scoring.py) lie in real descriptor files. In
turns, `--repeat` times, every layout starts its actors, scores some shards to warm up (for another K: what actors know
of floors is forgotten), and then all of them. One actor of one thread reads ahead on another core, where there is one.

figure: pairs per second of the second layout. peer: of the first. floor: what the first would give if its speed grew
with actors times threads.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import ray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # python jobs/… puts jobs/ there, not the repository

from jobs.bench_scoring import Data
from raypfk import descriptor_files, session, store
from raypfk.config import Config
from raypfk.descriptor_files import Origin
from raypfk.pfk import Kernel
from raypfk.pool import Pool
from raypfk.run import Run
from raypfk.stages import score


@click.command()
@click.option("--pool", default=262144, show_default=True, help="Images, N.")
@click.option("--centers", default=2000, show_default=True, help="M.")
@click.option("--dim", default=768, show_default=True, help="L, in two scales of 1/3 and 2/3.")
@click.option("--top", default=32, show_default=True, help="K.")
@click.option("--dtype", default="float32", show_default=True, help="Of the stored descriptors.")
@click.option("--shard-rows", default=8192, show_default=True)
@click.option("--layouts", default="1x1,2x1,1x2", show_default=True, help="Actors x threads, with commas.")
@click.option("--repeat", default=3, show_default=True)
def main(pool, centers, dim, top, dtype, shard_rows, layouts, repeat):
    lengths = (dim // 3, dim - dim // 3)
    data, scratch = Data(lengths, 1000, 0.5), tempfile.mkdtemp(prefix="raypfk-bench-")
    layouts = [tuple(map(int, layout.split("x"))) for layout in layouts.split(",")]
    origin = Origin("made-up", "0" * 16, ("a", "b"), lengths, dtype, None)
    try:
        run = write(scratch, data, origin, pool, shard_rows)
        with session.ray_session(cpus=max(a * t for a, t in layouts)):
            z, g = (ray.put(x.numpy()) for x in data.make(centers, 0))
            seconds, results = {layout: [] for layout in layouts}, []
            for _ in range(repeat):
                for layout in layouts:
                    actors = start(run, origin, (z, g), layout)
                    timed(actors, run, centers, top + 1, 2 * len(actors) + 8)
                    took, result = timed(actors, run, centers, top)
                    seconds[layout].append(took)
                    results.append(result)
                    [ray.kill(actor) for actor in actors]
    finally:
        shutil.rmtree(scratch)
    assert all(np.array_equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))
    rates = [centers * pool / statistics.median(seconds[layout]) for layout in layouts]
    for (actors, threads), rate in zip(layouts, rates, strict=True):
        print(
            f"{actors} actor(s) x {threads} thread(s): {rate / 1e6:8.1f} M pairs/s, {rate / rates[0]:.2f} x the first"
        )
    (first, second), ideal = rates[:2], rates[0] * np.prod(layouts[1]) / np.prod(layouts[0])
    print(json.dumps({
        "name": "scoring-actors", "figure": round(second), "unit": "pairs/s", "peer": round(first),
        "floor": round(ideal), "vs_peer": round(second / first, 3), "of_floor": round(second / ideal, 3),
        "rates": {f"{a}x{t}": round(rate) for (a, t), rate in zip(layouts, rates, strict=True)},
    }))  # fmt: skip


def write(folder: str, data: Data, origin: Origin, pool: int, shard_rows: int) -> Run:
    """A run whose pool is nothing but descriptor files."""
    entries, run_id = [], "benchmark"
    for number, first in enumerate(range(0, pool, shard_rows)):
        ids = [f"{i:012d}" for i in range(first, min(first + shard_rows, pool))]
        table = descriptor_files.encode({"image_id": pa.array(ids)}, data.make(len(ids), 2 + first), origin)
        name = f"{number:05d}.parquet"
        descriptor_files.write(store.join(folder, "pool", name), table, run_id, origin)
        entries.append({"name": name, "rows": len(ids), "first_id": ids[0], "last_id": ids[-1], "files": [name]})
    files = [{"name": entry["name"], "rows": entry["rows"], "sha256": ""} for entry in entries]
    manifest = {"splits": {"pool": {"files": files, "shards": entries}}}
    return Run(folder, run_id, Config.model_construct(), Pool(folder, manifest), None, 1)


def start(run: Run, origin: Origin, centers: tuple, layout: tuple[int, int]) -> list:
    actors, threads = layout
    started = [score.start(run, Kernel("pfk", origin.lengths), origin, *centers, threads) for _ in range(actors)]
    ray.get([actor.ready.remote() for actor in started])
    return started


def timed(actors: list, run: Run, centers: int, top: int, num_shards: int | None = None) -> tuple[float, tuple]:
    shards = run.pool.shards("pool")[:num_shards]
    paths, sizes = [(i, shard.uri) for i, shard in enumerate(shards)], [shard.rows for shard in shards]
    tree, began = score.Tree(centers), time.perf_counter()
    for _ in score.through(actors, paths, sizes, top, range(centers), tree):
        pass
    whole = tree.whole()
    return time.perf_counter() - began, whole


if __name__ == "__main__":
    main()
