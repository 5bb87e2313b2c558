"""What narrow and projected descriptors cost and do: bytes, seconds, and the selection beside float64's.

    python jobs/bench_storage.py --root ../shared/data/mnist

A network that `--rounds` rounds have trained a little describes the pool; the centers are the misses, P of them. Every
selection is exact, so its overlap with that of float64 descriptors is the storage's effect alone.

figure: MB/s at which float32 shards are read and checked. peer: the same numbers written as lists of floats and read by
pyarrow into tensors, unchecked. floor: the numbers' bytes read whole from the same disk. All MB are of the float32
numbers, so that a column of the table compares seconds.
"""

import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # python jobs/… puts jobs/ there, not the repository

from raypfk import config as configs
from raypfk import descriptor_files, loop, pfk, session, store
from raypfk.descriptor_files import Directions
from raypfk.pfk import Descriptors, Kernel, TopK
from raypfk.pfk.descriptors import CONSTANT
from raypfk.run import Run
from raypfk.stages.stream import Decoder, NetworkSpec, batches, network_of

STORAGES = [(dtype, None) for dtype in ("float32", "float16", "bfloat16", "int8")]
STORAGES += [("float32", pca) for pca in (8, 16, 32, 64)] + [("int8", 16), ("int8", 32)]
BUDGETS = (125, 1000)


@click.command()
@click.option("--config", default="configs/mnist.yaml", show_default=True)
@click.option("--root", help="data.root of the configuration.")
@click.option("--set", "assignments", multiple=True, help="Any field of the configuration.")
@click.option("--rounds", default=2, show_default=True, help="Rounds that train the network first.")
@click.option("--out", help="Run directory, kept and gone on with; default: a temporary one.")
@click.option("--repeat", default=5, show_default=True, help="Timings of which the fastest counts.")
def main(config, root, assignments, rounds, out, repeat):
    sets = ("pretrain.epochs=2", "pretrain.milestones=[1]", *assignments, *([f"data.root={root}"] if root else []))
    settings = configs.load(config, {"rounds": rounds}, configs.assigned(sets))
    scratch = tempfile.mkdtemp(prefix="raypfk-bench-")
    try:
        with session.ray_session():
            run = loop.run(settings, out or store.join(scratch, "run"))
            network = network_of(run, rounds)
            network = replace(network, checkpoint=store.read_bytes(network.origin), gpu=False)
        pool, centers, validation = _describe(run, network)
        torch.set_num_threads(run.config.resources.score_threads)  # as a scoring actor reads
        places = Places(run, network.weights, scratch, pool.to(torch.float32), repeat)
        print(f"{len(pool.z):,} pool images, L = {sum(run.lengths)}, {torch.get_num_threads()} thread(s)")
        best = {p: _select(run.kernel(), centers[p], pool, p) for p in BUDGETS}
        rows = [_row(run, places, dtype, pca, validation, centers, best) for dtype, pca in STORAGES]
        floor, peer = places.floor(), places.peer()
    finally:
        shutil.rmtree(scratch)
    _print(rows)
    figure = next(row["read"] for row in rows if row["storage"] == "float32")
    print(f"lists of floats: read {peer:.0f} MB/s; bytes alone: {floor:.0f} MB/s")
    result = {"name": "storage-read", "figure": round(figure, 1), "unit": "MB/s", "peer": round(peer, 1)}
    result |= {"floor": round(floor, 1), "vs_peer": round(figure / peer, 3), "of_floor": round(figure / floor, 3)}
    print(json.dumps(result))


# ------------------------------------------------------------------------------------------------- the selection


def _describe(run: Run, network: NetworkSpec) -> tuple[Descriptors, dict[int, Descriptors], Descriptors]:
    """Descriptors of the pool, float64; of each budget's centers, float64; of the validation set, float32."""
    net, device = network.load()
    reader = pfk.TapReader(net, run.config.model.taps)
    parts = [_shard(run, reader, shard, "true", device) for shard in run.pool.shards("validation")]
    full, labels, predicted = _joined(parts)
    validation = full.to(torch.float32)
    reference = validation.z, labels, Kernel("pcc", run.lengths, "length")
    misses = full.rows(predicted != labels)
    print(f"{len(misses.z):,} of {len(full.z):,} validation images are misses")
    centers = {}
    for p in BUDGETS:
        rows = pfk.greedy_k_center(run.kernel(), misses.to(torch.float32), p, run.seed("k-center", 1))
        centers[p] = misses.rows(rows)
    parts = [_shard(run, reader, shard, reference, device) for shard in run.pool.shards("pool")]
    return _joined(parts)[0], centers, validation


def _shard(run: Run, reader: pfk.TapReader, shard, reference, device) -> tuple[Descriptors, torch.Tensor, torch.Tensor]:
    """Descriptors in float64, labels (estimated with a reference) and predictions of one shard."""
    read = Decoder(run.pool, run.image, ("image_id", "label"))({"item": np.array([shard], object)})
    true, found = torch.from_numpy(read["label"].copy()), []
    for count, x in batches(read["image"], run.image, run.config.model.batch_size, device):
        logits, taps = reader(x)
        z = pfk.features(taps)
        labels = torch.zeros(len(x), dtype=torch.int64)
        if reference == "true":
            labels[:count] = true[sum(len(part[2]) for part in found) :][:count]
        else:
            labels, _ = pfk.neighbour(pfk.standardise(z, run.lengths), *reference)
        z, g = (_standardise64(x, run.lengths) for x in (z, pfk.fisher_scores(logits, taps, labels)))
        found.append((Descriptors(z[:count], g[:count]), labels[:count], pfk.predicted(logits)[:count]))
    return _joined(found)


def _joined(parts: list[tuple]) -> tuple[Descriptors, torch.Tensor, torch.Tensor]:
    described, labels, predicted = zip(*parts, strict=True)
    return Descriptors(*(torch.cat(x) for x in zip(*described, strict=True))), torch.cat(labels), torch.cat(predicted)


def _standardise64(x_NL: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """`pfk.standardise` without its rounding to float32 at the end."""
    out = []
    for x in x_NL.double().split(list(lengths), dim=1):
        low, high = x.aminmax(dim=1, keepdim=True)
        dead = high - low <= CONSTANT * torch.maximum(-low, high)
        x = x - x.mean(1, keepdim=True)
        out.append((x / x.norm(dim=1, keepdim=True)).where(~dead, 0.0))
    return torch.cat(out, dim=1)


def _select(kernel: Kernel, centers: Descriptors, pool: Descriptors, p: int, k: int = 32) -> set[int]:
    """The p rows that `rank_by_rank` takes, from exact scores."""
    k = max(k, 2 * -(-p // len(centers.z)))
    if pool.z.dtype == torch.float64:
        # Scores rounded to float32 and ties by row, as TopK does; stable sorting keeps the rows' order.
        scores, keys = kernel.block(centers, pool).float().sort(dim=1, descending=True, stable=True)
        scores, keys = scores[:, :k], keys[:, :k]
    else:
        top = TopK(len(centers.z), k)
        for start in range(0, len(pool.z), 4096):
            rows = slice(start, start + 4096)
            top.add(kernel, centers, pool.rows(rows), torch.arange(len(pool.z))[rows])
        scores, keys = top.result()
    return set(pfk.rank_by_rank(scores, keys, p).keys.tolist())


# --------------------------------------------------------------------------------------------------- the storage


class Places:
    """Descriptor shards in a scratch folder: written and read, and how fast."""

    def __init__(self, run: Run, weights: str, scratch: str, pool: Descriptors, repeat: int):
        self.run, self.weights, self.folder, self.repeat = run, weights, store.join(scratch, "shards"), repeat
        self.pool, self.megabytes, self.shards = pool, 2 * pool.z.nbytes / 1e6, run.pool.shards("pool")
        self.ids = [run.pool.read_shard(shard, ["image_id"])["image_id"].combine_chunks() for shard in self.shards]
        self.starts = np.cumsum([0, *map(len, self.ids)])

    def parts(self, pool: Descriptors) -> list[Descriptors]:
        return [pool.rows(slice(a, b)) for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)]

    def store(self, run: Run, directions: Directions | None) -> tuple[Descriptors, dict[str, float]]:
        """The pool as read back, and bytes per image, and MB/s of float32 written and read (checked and decoded)."""
        full = descriptor_files.full_origin(run, self.weights)
        origin = descriptor_files.stored_origin(run, full, directions)
        paths = [store.join(self.folder, shard.name) for shard in self.shards]

        def write():
            for path, ids, part in zip(paths, self.ids, self.parts(self.pool), strict=True):
                columns = self._columns(ids)
                part = directions.project(part) if directions else part
                descriptor_files.write(path, descriptor_files.encode(columns, part, origin), run.id, origin)

        def read():
            pairs = zip(paths, self.shards, strict=True)
            return [descriptor_files.read_shard(run, path, shard, origin)[1] for path, shard in pairs]

        written, read_back = self._fastest(write), self._fastest(read)
        size = sum(Path(path).stat().st_size for path in paths)
        return Descriptors(*(torch.cat(x) for x in zip(*read(), strict=True))), {
            "bytes": 2 * sum(origin.lengths) * {"int8": 1, "float32": 4}.get(origin.dtype, 2),
            "file": size / len(self.pool.z),
            "write": self.megabytes / written,
            "read": self.megabytes / read_back,
        }

    def peer(self) -> float:
        """MB/s of lists of floats, as raypfk and most programs store embeddings, read into tensors."""
        paths = []
        for shard, ids, part in zip(self.shards, self.ids, self.parts(self.pool), strict=True):
            lists = [pa.FixedSizeListArray.from_arrays(pa.array(x.numpy().reshape(-1)), x.shape[1]) for x in part]
            paths.append(store.join(self.folder, "lists", shard.name))
            columns = {**self._columns(ids), "features": lists[0], "fisher": lists[1]}
            store.write_table(paths[-1], pa.table(columns), "none")

        def read():
            for path in paths:
                table = store.read_table(path, ["image_id", "features", "fisher"])
                for name in ("features", "fisher"):
                    flat = table[name].combine_chunks().flatten()
                    torch.from_dlpack(flat).view(-1, table[name].type.list_size)

        return self.megabytes / self._fastest(read)

    def floor(self) -> float:
        """MB/s of reading a file of the float32 numbers' bytes."""
        path = store.join(self.folder, "bytes")
        store.write_bytes(path, b"".join(x.numpy().tobytes() for x in self.pool))
        return self.megabytes / self._fastest(lambda: store.read_bytes(path))

    def _columns(self, ids: pa.Array) -> dict[str, pa.Array]:
        labels = pa.array(np.arange(len(ids)) % 10)
        return {"image_id": ids, "predicted": labels, "estimated_label": labels}

    def _fastest(self, work) -> float:
        seconds = []
        for _ in range(self.repeat):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return min(seconds)


def _row(run: Run, places: Places, dtype: str, pca: int | None, validation, centers, best) -> dict:
    section = run.config.descriptors.model_copy(update={"dtype": dtype, "pca": pca})
    run = replace(run, config=run.config.model_copy(update={"descriptors": section}))
    directions = None
    if pca:
        directions = Directions(*(pfk.principal_directions(x, run.lengths, pca) for x in validation))
    pool, row = places.store(run, directions)
    row["storage"] = dtype + (f", pca {pca}" if pca else "")
    row["lengths"] = "+".join(map(str, run.stored_lengths))
    for p in BUDGETS:
        held = centers[p].to(torch.float32)
        held = directions.project(held) if directions else held
        row[p] = len(_select(run.stored_kernel(), held, pool, p) & best[p])
    return row


def _print(rows: list[dict]) -> None:
    heads = [f"same of P = {p:,}" for p in BUDGETS]
    heads = ["storage", "numbers", "bytes of numbers", "bytes in the file", "write MB/s", "read MB/s", *heads]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        cells = [row["storage"], row["lengths"], row["bytes"], f"{row['file']:.0f}", f"{row['write']:.0f}"]
        cells += [f"{row['read']:.0f}", *(f"{row[p]} ({row[p] / p:.1%})" for p in BUDGETS)]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
