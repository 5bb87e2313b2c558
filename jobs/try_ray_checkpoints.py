"""Ray Data's own checkpoints while its driver is killed: what is lost, there twice, and done again.

    python jobs/try_ray_checkpoints.py --kills 3 --reader v1

40 Parquet files of 250 rows go through two slow actors to Parquet; the driver is killed (-9) each time that a fifth
more of the files is written, and started again. Why raypfk writes an output per shard instead is in docs/pools.md.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq

FILES, ROWS, SECONDS = 40, 250, 0.25


class Slow:
    def __call__(self, batch):
        time.sleep(SECONDS)
        return batch


def drive(folder: Path) -> None:
    """The driver that is killed."""
    import ray
    from ray.data.checkpoint import CheckpointConfig

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    checkpoint = CheckpointConfig("id", str(folder / "checkpoint"), delete_checkpoint_on_success=False)
    ray.data.DataContext.get_current().checkpoint_config = checkpoint
    rows = ray.data.read_parquet(str(folder / "in"), override_num_blocks=FILES)
    actors = ray.data.ActorPoolStrategy(size=2)
    rows.map_batches(Slow, batch_size=ROWS, compute=actors).write_parquet(str(folder / "out"))


def kill_when(process: subprocess.Popen, out: Path, files: int) -> None:
    while process.poll() is None and len(list(out.glob("*.parquet"))) < files:
        time.sleep(0.05)
    process.kill()
    process.wait()


@click.command()
@click.option("--kills", default=3, show_default=True)
@click.option("--reader", type=click.Choice(["v1", "v2"]), default="v2", show_default=True, help="Of Ray Data.")
def main(kills, reader):
    with tempfile.TemporaryDirectory(prefix="raypfk-try-") as scratch:
        folder = Path(scratch)
        (folder / "in").mkdir()
        for i in range(FILES):
            ids = [f"{i:03d}/{row:04d}" for row in range(ROWS)]
            pq.write_table(pa.table({"id": ids}), folder / "in" / f"{i:05d}.parquet")
        environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_DATA_USE_DATASOURCE_V2": str(int(reader == "v2"))}
        start = lambda: subprocess.Popen([sys.executable, __file__, str(folder)], env=environment)  # noqa: E731
        for kill in range(kills):
            kill_when(start(), folder / "out", FILES * (kill + 1) // 5)
        code, files = start().wait(), list((folder / "out").glob("*.parquet"))
        counts = Counter(i for path in files for i in pq.read_table(path)["id"].to_pylist())
    print(json.dumps({
        "name": "try_ray_checkpoints", "reader": reader, "kills": kills, "exit_code": code, "files": len(files),
        "lost": FILES * ROWS - len(counts), "twice": counts.total() - len(counts),
    }))  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 2 and Path(sys.argv[1]).is_dir():
        drive(Path(sys.argv[1]))
    else:
        main()
