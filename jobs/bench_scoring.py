"""Times exact top-K scoring on one machine, without Ray: pairs of centers and pool images per second.

    python jobs/bench_scoring.py --pool 1000000 --centers 2000 --dim 768 --top 32
    python jobs/bench_scoring.py --curve 10000,30000,100000,300000,1000000 --plot cost.png
    python jobs/bench_scoring.py --centers 20000 --pool 65536 --classes 1000 --votes 3
    python jobs/bench_scoring.py --device cuda --centers 64000 --pool 1280000

figure: pairs per second of `TopK.add`, rounding of the pool included. peer: FAISS `IndexFlatIP` on as many numbers per
vector (2 x dim: features and Fisher scores side by side; the same arithmetic, an easier kernel), top-K too; with
--classes, the scan of all pairs, without a factor. floor: the bare matrix products in the precision that was used.
All three take turns, segment by segment, since a machine's speed wanders, and each figure is of all its turns together;
peers live in a process of their own, so that the peak memory printed is the scoring's. Compiling, or loading what was
compiled, counts. Without faiss (pip install faiss-cpu) the peer is null.

On a GPU all descriptors lie in its memory from the start, and what is compiled is compiled before; the peer is the same
in torch alone: bfloat16 products, multiplied, added and cut to the K best of each tile by torch.topk, not exact.
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
PEAK_BFLOAT16 = 989.4e12  # operations a second, dense, NVIDIA H100 SXM and H200
PEER_ROWS = 1 << 13  # of a segment, given to the peer and to the bare products


class Data(NamedTuple):
    """Made-up descriptors: `clusters` of images, whose features and Fisher scores correlate within a cluster."""

    lengths: tuple[int, ...]
    clusters: int
    within: float

    def make(self, n: int, seed: int, device: str = "cpu") -> Descriptors:
        generator, first = (torch.Generator(device).manual_seed(x) for x in (seed, 1))
        part = torch.empty(2, n, sum(self.lengths), device=device)
        middle = torch.randn(self.clusters or 1, 2, sum(self.lengths), generator=first, device=device)
        for start in range(0, n, 1 << 12):  # in pieces: the peak memory is the scoring's, not that of its data
            own = torch.randn(min(1 << 12, n - start), 2, sum(self.lengths), generator=generator, device=device)
            if self.clusters:
                index = torch.randint(self.clusters, (len(own),), generator=generator, device=device)
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
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
def main(pool, centers, dim, top, kernel, precision, threads, clusters, within, curve, plot, classes, votes, device):
    torch.set_num_threads(threads)
    lengths = (dim // 3, dim - dim // 3)
    setting = Setting(Kernel(kernel, lengths), Data(lengths, clusters, within), centers, top, precision, threads)
    if device == "cuda" and kernel != "pfk":
        raise click.UsageError(f"--device cuda: the peer is written for --kernel pfk, not {kernel}")
    if device == "cuda":
        result = speed_on_gpu(setting, pool)
    elif classes:
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


def timed(action, wait=lambda: None) -> float:
    """Seconds, after a go that brings all into the caches; `wait` returns when a device is done."""
    action()
    wait()
    start = time.perf_counter()
    action()
    wait()
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
    centers = scan.round_to(setting.kernel, precision, centers).codes_NP
    images = scan.round_to(setting.kernel, precision, images).codes_NP
    dtype = torch.int32 if precision == "int8" else images.dtype
    multiply = torch._int_mm if precision == "int8" else torch.mm
    tiles = list(torch.arange(setting.centers).split(scan.TILE_CENTERS))
    outs = {len(tile): torch.empty(scan.TILE_POOL, len(tile), dtype=dtype) for tile in tiles}
    groups = scan.layout(setting.kernel, on_gpu=False).groups
    work = [(images[:, g].split(scan.TILE_POOL), [centers[t, g].contiguous() for t in tiles]) for g in groups]

    def go():
        for i in range(len(tiles)):
            for b in range(PEER_ROWS // scan.TILE_POOL):
                for x, y in work:
                    multiply(x[b], y[i].T, out=outs[len(y[i])])

    return go


def speed_on_gpu(setting: Setting, pool: int, turns: int = 3) -> dict:
    """Medians of turns of the figure, of torch alone and of bare int8 and bfloat16 products."""
    centers, images = setting.data.make(setting.centers, 0, "cuda"), setting.data.make(pool, 2, "cuda")
    keys, few, counts = torch.arange(pool, device="cuda"), images.rows(slice(0, 1 << 17)), {}

    def add():
        top = TopK(setting.centers, setting.top, "cuda", precision=setting.precision)
        top.add(setting.kernel, centers, images, keys)
        counts.update(top.counts)

    actions = {
        "figure": (add, pool),
        "peer": (_unfused(setting, centers, few), len(few.z)),
        "int8": (_products_on_gpu(setting, "int8", centers, few), len(few.z)),
        "bfloat16": (_products_on_gpu(setting, "bfloat16", centers, few), len(few.z)),
    }
    seconds = {name: [] for name in actions}
    for _ in range(turns):
        for name, (action, n) in actions.items():
            seconds[name].append(timed(action, torch.cuda.synchronize) * pool / n)
    median = {name: sorted(x)[turns // 2] for name, x in seconds.items()}
    pairs, operations = setting.centers * pool, 4 * sum(setting.kernel.lengths)
    used = max(scan.PRECISIONS, key=lambda p: counts.get(p, 0))
    floor = median["int8" if used == "int8" else "bfloat16"]
    dim, name = sum(setting.kernel.lengths), torch.cuda.get_device_name()
    print(f"{name}: {setting.centers:,} centers x {pool:,} images x {dim}")
    print(f"of {pairs:,} pairs: " + ", ".join(f"{n:,} {name}" for name, n in sorted(counts.items())))
    for name, x in seconds.items():
        rate = pairs * operations / median[name] / 1e12
        print(f"{name:10s} {', '.join(f'{s:.3f}' for s in x)} s: {rate:,.0f} T operations/s")
    share = pairs * operations / median["figure"] / PEAK_BFLOAT16
    print(f"{share:.0%} of {PEAK_BFLOAT16 / 1e12:.0f} TFLOP/s, bfloat16 by the data sheet of an H100 or H200")
    return {
        "name": "scoring-gpu", "figure": round(pairs / median["figure"]), "unit": "pairs/s",
        "peer": round(pairs / median["peer"]), "floor": round(pairs / floor),
        "vs_peer": round(median["peer"] / median["figure"], 3), "of_floor": round(floor / median["figure"], 3),
        "precision": used, "seconds": round(median["figure"], 4), "share_of_bfloat16_peak": round(share, 3),
        "peak_mib": torch.cuda.max_memory_allocated() >> 20,
    }  # fmt: skip


def _unfused(setting: Setting, centers: Descriptors, images: Descriptors):
    """What one writes in torch: tiles of scores in memory, the K best of each, and of those the K best."""
    kernel, low = setting.kernel, [part.to(torch.bfloat16) for part in (centers, images)]
    weighted = [low[0].g[:, span] * w for span, w in zip(kernel.spans, kernel.weights, strict=True)]

    def go():
        best = []
        for start in range(0, len(low[1].z), 1 << 13):
            tile, scores = low[1].rows(slice(start, start + (1 << 13))), None
            for span, wg in zip(kernel.spans, weighted, strict=True):
                term = (low[0].z[:, span] @ tile.z[:, span].T).mul_(wg @ tile.g[:, span].T)
                scores = term if scores is None else scores.add_(term)
            values, index = scores.topk(setting.top, dim=1)
            best.append((values, index + start))
        values, index = (torch.cat(x, dim=1) for x in zip(*best, strict=True))
        values, place = values.topk(setting.top, dim=1)
        return values, index.gather(1, place)

    return go


def _products_on_gpu(setting: Setting, precision: str, centers: Descriptors, images: Descriptors):
    """All products, in tiles, by the vendor's library."""
    codes = [scan.round_to(setting.kernel, precision, part).codes_NP for part in (centers, images)]
    multiply = torch._int_mm if precision == "int8" else torch.mm

    def go():
        for start in range(0, len(codes[1]), 1 << 13):
            multiply(codes[0], codes[1][start : start + (1 << 13)].T)

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
