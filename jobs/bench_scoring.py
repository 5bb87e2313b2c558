"""Times exact top-K scoring on one machine, without Ray: pairs of centers and pool images per second.

    python jobs/bench_scoring.py --pool 1000000 --centers 2000 --dim 768 --top 32
    python jobs/bench_scoring.py --curve 10000,30000,100000,300000,1000000 --plot cost.png
    python jobs/bench_scoring.py --centers 20000 --pool 65536 --classes 1000 --votes 3

figure: pairs per second of `TopK.add`, rounding of the pool included. peer: FAISS `IndexFlatIP` on as many numbers per
vector (2 x dim: features and Fisher scores side by side; the same arithmetic, an easier kernel), top-K too; with
--classes, the scan of all pairs, without a factor. floor: the bare matrix products in the precision that was used.
All three take turns, segment by segment, since a machine's speed wanders, and each figure is of all its turns together;
peers live in a process of their own, so that the peak memory printed is the scoring's. Compiling, or loading what was
compiled, counts. Without faiss (pip install faiss-cpu) the peer is null.
"""

import json
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # python jobs/… puts jobs/ there, not the repository

from raypfk.pfk import Descriptors, Kernel, TopK, Votes, scan, standardise

SEGMENT = 1 << 15
PEER_ROWS = 1 << 13  # of a segment, given to the peer and to the bare products


class Data(NamedTuple):
    """Made-up descriptors: `clusters` of images, whose features and Fisher scores correlate within a cluster."""

    lengths: tuple[int, ...]
    clusters: int
    within: float

    def make(self, n: int, seed: int) -> Descriptors:
        generator, part = torch.Generator().manual_seed(seed), torch.empty(2, n, sum(self.lengths))
        middle = torch.randn(self.clusters or 1, 2, sum(self.lengths), generator=torch.Generator().manual_seed(1))
        for start in range(0, n, 1 << 12):  # in pieces: the peak memory is the scoring's, not that of its data
            own = torch.randn(min(1 << 12, n - start), 2, sum(self.lengths), generator=generator)
            if self.clusters:
                index = torch.randint(self.clusters, (len(own),), generator=generator)
                own.mul_((1 - self.within) ** 0.5).add_(middle[index], alpha=self.within**0.5)
            for i in range(2):
                part[i, start : start + len(own)] = standardise(own[:, i], self.lengths)
        return Descriptors(*part)


@click.command()
@click.option("--pool", default=1_000_000, show_default=True, help="Images, N.")
@click.option("--centers", default=2000, show_default=True, help="M.")
@click.option("--dim", default=768, show_default=True, help="L, in two scales of 1/3 and 2/3 (ResNet-18's last two).")
@click.option("--top", default=32, show_default=True, help="K.")
@click.option("--kernel", default="pfk", show_default=True, type=click.Choice(["pfk", "pfk-sum", "pcc"]))
@click.option("--precision", default="auto", show_default=True, type=click.Choice(["auto", *scan.PRECISIONS]))
@click.option("--threads", default=1, show_default=True, help="Of each of the three.")
@click.option("--clusters", default=1000, show_default=True, help="Of the made-up data; 0: noise alone.")
@click.option("--within", default=0.5, show_default=True, help="Mean correlation within a cluster.")
@click.option("--curve", help="Pool sizes to measure one after the other, with commas.")
@click.option("--plot", help="PNG of seconds against pool size, with --curve.")
@click.option("--classes", default=0, help="Measure the gain of a confidence factor with so many classes, D.")
@click.option("--votes", default=3, show_default=True, help="Classes that an image has a vote for, with --classes.")
def main(pool, centers, dim, top, kernel, precision, threads, clusters, within, curve, plot, classes, votes):
    torch.set_num_threads(threads)
    lengths = (dim // 3, dim - dim // 3)
    setting = Setting(Kernel(kernel, lengths), Data(lengths, clusters, within), centers, top, precision, threads)
    if classes:
        result = gain(setting, pool, classes, votes)
    elif curve:
        result = line(setting, [int(n) for n in curve.split(",")], plot)
    else:
        result = speed(setting, pool)
    print(json.dumps(result))


class Setting(NamedTuple):
    kernel: Kernel
    data: Data
    centers: int
    top: int
    precision: str
    threads: int


def speed(setting: Setting, pool: int) -> dict:
    """Figure, peer and floor in turns over the segments of the pool."""
    peers = Peers(setting)
    _, counts, seconds, ratios = scored(setting, pool, peers)
    peers.close()
    pairs = setting.centers * pool
    peer, bare = ratios
    used = max(scan.PRECISIONS, key=lambda p: counts[p])
    print(f"{setting.centers:,} centers x {pool:,} images x {sum(setting.kernel.lengths)}, {setting.threads} threads")
    print(f"{seconds:.1f} s; of {pairs:,} pairs: " + ", ".join(f"{n:,} {name}" for name, n in sorted(counts.items())))
    print(f"peak memory {peak_mib():,.0f} MiB")
    figure = pairs / seconds
    return {
        "name": "scoring", "figure": round(figure), "unit": "pairs/s",
        "peer": peer and round(peer), "floor": round(bare),
        "vs_peer": peer and round(figure / peer, 3), "of_floor": round(figure / bare, 3), "precision": used,
        "seconds": round(seconds, 2), "peak_mib": round(peak_mib()),
    }  # fmt: skip


def scored(setting: Setting, pool: int, peers: "Peers | None" = None):
    """The top-K, its counts, the seconds in `TopK.add`, and the peers' pairs per second, (FAISS, bare products)."""
    centers = setting.data.make(setting.centers, 0)
    top = TopK(setting.centers, setting.top, precision=setting.precision)
    seconds, turns = 0.0, []
    for i, start in enumerate(range(0, pool, SEGMENT)):
        images = setting.data.make(min(SEGMENT, pool - start), 2 + start)
        began = time.perf_counter()
        top.add(setting.kernel, centers, images, torch.arange(start, start + len(images.z)))
        seconds += time.perf_counter() - began
        if peers and i % 2 == 0:
            turns.append(peers.turn(max(scan.PRECISIONS, key=lambda p: top.counts[p])))
    pairs = setting.centers * PEER_ROWS * len(turns)
    peer, bare = (pairs / sum(x) if x and x[0] else None for x in zip(*turns, strict=True)) if turns else (None, None)
    return top, top.counts, seconds, (peer, bare)


class Peers:
    """A process that times FAISS and bare products on request, and does nothing in between."""

    def __init__(self, setting: Setting):
        context = multiprocessing.get_context("spawn")
        self.here, there = context.Pipe()
        context.Process(target=_peers, args=(there, setting), daemon=True).start()

    def close(self) -> None:
        self.here.send(None)

    def turn(self, precision: str) -> tuple[float | None, float]:
        """Seconds of FAISS (None where it is not installed) and of the bare products in `precision`, for PEER_ROWS."""
        self.here.send(precision)
        return self.here.recv()


def _peers(pipe, setting: Setting) -> None:
    torch.set_num_threads(setting.threads)
    centers, images = setting.data.make(setting.centers, 0), setting.data.make(PEER_ROWS, 1)
    search = _faiss(setting, centers, images)
    for precision in iter(pipe.recv, None):
        products = _products(setting, precision, centers, images)
        pipe.send((timed(search) if search else None, timed(products)))


def timed(action) -> float:
    """Seconds, after a go that brings all into the caches."""
    action()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _faiss(setting: Setting, centers: Descriptors, images: Descriptors):
    # The OpenBLAS in faiss-cpu is old: processors younger than it get its slowest products, unless it is told.
    known = {"AVX512": "SKYLAKEX", "AVX2": "HASWELL"}.get(torch.backends.cpu.get_cpu_capability())
    if known:
        os.environ.setdefault("OPENBLAS_CORETYPE", known)
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(setting.threads)
    index = faiss.IndexFlatIP(2 * sum(setting.kernel.lengths))
    index.add(torch.cat(images, dim=1).numpy())
    queries = torch.cat(centers, dim=1).numpy()
    return lambda: index.search(queries, setting.top)


def _products(setting: Setting, precision: str, centers: Descriptors, images: Descriptors):
    """The products that the scan needs, in tiles as it has them, and nothing else."""
    centers = scan.round_to(setting.kernel, precision, centers)
    images = scan.round_to(setting.kernel, precision, images)
    dtype = torch.int32 if precision == "int8" else images.matrices[0].dtype
    multiply = torch._int_mm if precision == "int8" else torch.mm
    tiles = list(torch.arange(setting.centers).split(scan.TILE_CENTERS))
    outs = {len(tile): torch.empty(scan.TILE_POOL, len(tile), dtype=dtype) for tile in tiles}
    pairs = zip(images.matrices, centers.matrices, strict=True)
    work = [(x.split(scan.TILE_POOL), [y[tile] for tile in tiles]) for x, y in pairs]

    def go():
        for i in range(len(tiles)):
            for b in range(PEER_ROWS // scan.TILE_POOL):
                for x, y in work:
                    multiply(x[b], y[i].T, out=outs[len(y[i])])

    return go


def line(setting: Setting, sizes: list[int], plot: str | None) -> dict:
    """Seconds against pool size, and how far from a straight line they are; it starts with what a process does once."""
    seconds, peaks = [], []
    scored(setting, SEGMENT)  # what is compiled is kept: not the first size's business
    for n in sizes:
        seconds.append(scored(setting, n)[2])
        peaks.append(peak_mib())
        print(f"{n:>12,} images: {seconds[-1]:8.2f} s, {seconds[-1] / n * 1e6:7.2f} us per image, {peaks[-1]:,.0f} MiB")
    per_image, once = np.polyfit(sizes, seconds, 1)
    off = max(abs(s - once - n * per_image) for s, n in zip(seconds, sizes, strict=True)) / max(seconds)
    print(f"{once:.2f} s and {per_image * 1e6:.2f} us per image; off the line by {off:.1%} of the largest at most")
    if plot:
        draw(setting, sizes, seconds, (once, per_image), plot)
    return {
        "name": "scoring-cost", "figure": round(per_image * 1e6, 3), "unit": "us per image", "peer": None,
        "floor": None, "vs_peer": None, "of_floor": None, "sizes": sizes, "seconds": [round(s, 3) for s in seconds],
        "once": round(once, 3), "off_the_line": round(off, 4), "peak_mib": [round(p) for p in peaks],
    }  # fmt: skip


def draw(setting: Setting, sizes: list[int], seconds: list[float], fit: tuple[float, float], path: str) -> None:
    from matplotlib.figure import Figure

    figure, (once, per_image) = Figure(figsize=(6, 4), layout="constrained"), fit
    axes, ends = figure.subplots(), [0, max(sizes)]
    axes.plot(sizes, seconds, "o", label="measured")
    axes.plot(
        ends, [once + n * per_image for n in ends], "-", label=f"{once:.1f} s + {per_image * 1e6:.1f} µs per image"
    )
    axes.set(xlabel="pool images N", ylabel="seconds", title=f"exact top-{setting.top} of {setting.centers:,} centers")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    figure.savefig(path, dpi=120)


def gain(setting: Setting, pool: int, classes: int, width: int) -> dict:
    """A confidence factor grouped by class against the dense scores times the factor, which its result must equal."""
    generator = torch.Generator().manual_seed(3)
    centers, images = setting.data.make(setting.centers, 0), setting.data.make(pool, 2)
    keys, labels = torch.arange(pool), torch.randint(classes, (setting.centers,), generator=generator)
    voted = torch.rand(pool, classes, generator=generator).topk(width, dim=1).indices
    votes = Votes(voted, torch.rand(pool, width, generator=generator).softmax(1), labels, 1.0)

    def run(votes):
        top = TopK(setting.centers, setting.top, precision=setting.precision)
        start = time.perf_counter()
        top.add(setting.kernel, centers, images, keys, votes)
        return top, time.perf_counter() - start

    (top, grouped), (_, dense) = run(votes), run(None)
    print(f"D {classes}, {width} votes: grouped {grouped:.2f} s, without the factor {dense:.2f} s, {dict(top.counts)}")
    ideal = dense * width / classes
    return {
        "name": "scoring-votes", "figure": round(grouped, 3), "unit": "s",
        "peer": round(dense, 3), "floor": round(ideal, 4),
        "vs_peer": round(dense / grouped, 2), "of_floor": round(ideal / grouped, 3), "classes": classes, "votes": width,
    }  # fmt: skip


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
