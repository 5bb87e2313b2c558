"""Resident memory of driver and workers while a large pool streams through extraction.

    python jobs/bench_memory.py --images 200000 --files DIR --plot docs/streaming-memory.png

A pool by reference names the images of DIR again and again; they are read, decoded and described by LeNet. Once a
second the resident memory of every process is noted, without what it shares with others (Ray's object store).

figure: growth in MiB of the driver from the first to the last quarter of the images, peak against peak. peer: likewise
of the largest worker. floor: none is needed, 0.
"""

import csv
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # python jobs/… puts jobs/ there, not the repository

import click
import psutil

from raypfk import config as configs
from raypfk import loop, session, store
from raypfk.config import DataConfig
from raypfk.run import Run
from raypfk.stages import pool as stage

HELD_OUT = 200


class Watch:
    """Once a second: images described, MiB of the driver, MiB of the largest worker and of all."""

    def __init__(self, folder: Path, rows: int):
        self.folder, self.rows, self.samples, self._over = folder, rows, [], threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        driver, began = psutil.Process(), time.monotonic()
        while not self._over.wait(1.0):
            done = sum(name.suffix == ".parquet" for name in self.folder.iterdir()) if self.folder.exists() else 0
            workers = [_private(p) for p in driver.children(recursive=True) if _is_worker(p)]
            sample = (
                time.monotonic() - began,
                done * self.rows,
                _private(driver),
                max(workers, default=0),
                sum(workers),
            )
            self.samples.append(sample)

    def growth(self, column: int) -> float:
        """From the first quarter of the images to the last, peak against peak."""
        last = max(sample[1] for sample in self.samples)
        first = [s[column] for s in self.samples if 0 < s[1] <= last / 4]
        final = [s[column] for s in self.samples if s[1] > 3 * last / 4]
        return max(final) - max(first)


def _private(process: psutil.Process) -> float:
    """MiB; 0 of a process that is gone."""
    try:
        memory = process.memory_info()
        return (memory.rss - memory.shared) / 2**20
    except psutil.Error:
        return 0.0


def _is_worker(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[:1] != [] and process.cmdline()[0].startswith("ray::")
    except psutil.Error:
        return False


def build(files: list[Path], count: int, rows: int, folder: Path):
    """A pool by reference of `count` images, and as validation and test set a few of them."""
    for name, number in (("pool", count), ("trusted", HELD_OUT)):
        with open(folder / f"{name}.csv", "w", newline="") as stream:
            lines = csv.writer(stream)
            lines.writerow(("image_id", "uri", "label"))
            lines.writerows((f"{i:08d}", files[i % len(files)], i % 2) for i in range(number))
    roots = {"validation_root": str(folder / "trusted.csv"), "test_root": str(folder / "trusted.csv")}
    data = DataConfig(source="manifest", root=str(folder / "pool.csv"), by_reference=True, shard_rows=rows, **roots)
    return stage.build(data, str(folder / "pool"), 0)


def run_of(pool, folder: Path) -> Run:
    tree = {
        "data": {"pool": pool.uri}, "image": {"size": 32, "resize": 32, "channels": 3},
        "model": {"name": "lenet", "taps": ["conv1", "conv2", "fc1"], "batch_size": 256},
        "train": {"epochs": 1, "batch_size": 8, "lr": 0.01}, "budget": 100, "rounds": 1, "label_estimator": "predicted",
    }  # fmt: skip
    run = Run.create_or_open(configs.validate(tree, "bench_memory"), str(folder / "run"), pool)
    loop.do_round(run, 0)
    return run


def plot(watch: Watch, path: Path, count: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    images = [sample[1] / 1000 for sample in watch.samples]
    for column, name in ((2, "driver"), (3, "largest worker"), (4, "all workers")):
        axes.plot(images, [sample[column] for sample in watch.samples], ".-", markersize=3, linewidth=1, label=name)
    axes.set(xlabel="thousand images described", ylabel="resident memory, not shared (MiB)", ylim=(0, None))
    axes.set_title(f"Memory while {count:,} images stream through extraction")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


@click.command()
@click.option("--images", "count", default=200_000, show_default=True)
@click.option("--files", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="Images.")
@click.option("--rows", default=1000, show_default=True, help="Images of a shard.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="PNG.")
def main(count, files, rows, picture):
    found = sorted(path for path in files.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    with tempfile.TemporaryDirectory(prefix="raypfk-bench-") as scratch, session.ray_session():
        folder = Path(scratch)
        run = run_of(build(found, count, rows, folder), folder)
        began = time.monotonic()
        with Watch(Path(run.round(1).descriptors), rows) as watch:
            loop.do_stage(run, 1, "extract")
        seconds = time.monotonic() - began
        described = sum(store.table_shape(path)[1] for path in store.paths(run.round(1).descriptors, ".parquet"))
    if described != count:
        raise SystemExit(f"{described:,} images are described, expected {count:,}")
    if picture:
        plot(watch, picture, count)
    peaks = [max(sample[column] for sample in watch.samples) for column in (2, 3, 4)]
    print(f"{count:,} images in {seconds:.0f} s ({count / seconds:.0f} images/s)")
    print("peak MiB: driver {:.0f}, largest worker {:.0f}, all workers {:.0f}".format(*peaks))
    print(json.dumps({
        "name": "bench_memory", "figure": round(watch.growth(2), 1), "unit": "MiB", "peer": round(watch.growth(3), 1),
        "floor": 0, "vs_peer": None, "of_floor": None, "driver_peak": round(peaks[0]), "worker_peak": round(peaks[1]),
        "images": count, "images_per_second": round(count / seconds, 1),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
