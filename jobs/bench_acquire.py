"""Times the two steps that choose: centers among the misses, and images among the candidates of the centers.

    python jobs/bench_acquire.py k-center
    python jobs/bench_acquire.py rank-by-rank

k-center. figure: seconds of `greedy_k_center`. peer: seconds of the plain greedy in float32, which compares every miss
with each new center; a sample of its steps is timed and taken times the number of steps. floor: seconds of reading the
descriptors from memory once a center, at the bandwidth measured here; a figure below it means that the descriptors
are not read once a center.

rank-by-rank. figure: seconds of `rank_by_rank`. peer: seconds of the published program's way, which appends one
candidate at a time and takes `unique` of all so far; it is quadratic, and timed with fewer centers and a smaller
budget, at which vs_peer compares both. floor: seconds of one sort of all candidates' keys.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # python jobs/… puts jobs/ there, not the repository

from raypfk.pfk import Descriptors, Kernel, greedy_k_center, rank_by_rank, standardise


@click.group()
@click.option("--threads", default=1, show_default=True)
def main(threads):
    torch.set_num_threads(threads)


@main.command()
@click.option("--misses", default=100_000, show_default=True)
@click.option("--centers", default=10_000, show_default=True)
@click.option("--lengths", default="256,512", show_default=True, help="Of the scales.")
@click.option("--kernel", default="pfk", show_default=True)
@click.option("--clusters", default=200, show_default=True, help="That the misses are drawn from.")
@click.option("--steps", default=20, show_default=True, help="Of the plain greedy that are timed.")
def k_center(misses, centers, lengths, kernel, clusters, steps):
    kernel = Kernel(kernel, tuple(int(n) for n in lengths.split(",")))
    data = clustered(misses, kernel.lengths, clusters)
    used = data[:1] if kernel.name == "pcc" else data
    numbers = sum(x.numel() for x in used)
    read = best_of(20, lambda: [x.mv(x[0]) for x in used])
    figure, chosen = timed(lambda: greedy_k_center(kernel, data, centers, seed=0))
    steps = min(steps, centers)
    step_seconds, plain = plain_greedy(kernel, data, int(chosen[0]), steps)
    read = min(read, best_of(20, lambda: [x.mv(x[0]) for x in used]))  # again: a busy machine only lowers a bandwidth
    agree = sum(a == b for a, b in zip(plain, chosen[1:].tolist(), strict=False))
    print(f"{centers:,} of {misses:,} misses, {kernel.name}, lengths {lengths}, {torch.get_num_threads()} threads")
    print(f"memory: {4 * numbers / 1e6:,.0f} MB of descriptors read in {read:.4f} s, {4e-9 * numbers / read:.1f} GB/s")
    print(f"plain greedy: {steps} steps of {step_seconds:.4f} s (median), times {centers:,}; {agree} choices the same")
    report("k-center", figure, centers * step_seconds, centers * read)


@main.command("rank-by-rank")
@click.option("--centers", default=64_000, show_default=True)
@click.option("--k", default=32, show_default=True, help="Candidates of a center.")
@click.option("--budget", default=64_000, show_default=True)
@click.option("--images", default=64_500, show_default=True, help="That are named at all; few: more ranks are needed.")
@click.option("--peer-budget", default=4_000, show_default=True, help="Budget, and centers, of the published way.")
def rank(centers, k, budget, images, peer_budget):
    scores, keys = candidates(centers, k, images)
    figure, picks = median_of(5, lambda: rank_by_rank(scores, keys, budget))
    floor = best_of(5, lambda: keys.flatten().sort())
    few_scores, few_keys = candidates(peer_budget, k, max(1, images * peer_budget // centers))
    few, few_picks = median_of(5, lambda: rank_by_rank(few_scores, few_keys, peer_budget))
    peer, few_chosen = timed(lambda: append_and_unique(few_scores, few_keys, peer_budget))
    if few_chosen != set(few_picks.keys.tolist()):
        sys.exit("the published way chose other images: the figures compare nothing")
    ranks = int(picks.ranks.max()) + 1 if len(picks.ranks) else 0
    print(f"{len(picks.keys):,} of {budget:,} chosen from {centers:,} centers x {k} candidates, in {ranks} ranks")
    print(f"published way: {peer_budget:,} of {peer_budget:,} x {k} in {peer:.3f} s, rank_by_rank in {few:.4f} s")
    report("rank-by-rank", figure, peer, floor, vs_peer=few / peer, peer_budget=peer_budget, figure_there=few)


def report(name: str, figure: float, peer: float, floor: float, **more: float) -> None:
    result = {"name": name, "figure": figure, "unit": "s", "peer": peer, "floor": floor}
    result |= {"vs_peer": figure / peer, "of_floor": floor / figure} | more
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}))


def clustered(n: int, lengths: tuple[int, ...], clusters: int) -> Descriptors:
    """Standardised descriptors of n misses around random means, which are as far apart as the misses from them."""
    generator = torch.Generator().manual_seed(0)
    which, parts = torch.randint(clusters, (n,), generator=generator), []
    for _ in range(2):
        means = torch.randn(clusters, sum(lengths), generator=generator)
        parts.append(torch.empty(n, sum(lengths)))
        for rows in torch.arange(n).split(4096):
            x = means[which[rows]] + torch.randn(len(rows), sum(lengths), generator=generator)
            parts[-1][rows] = standardise(x, lengths)
    return Descriptors(*parts)


def candidates(centers: int, k: int, images: int) -> tuple[Tensor, Tensor]:
    """Scores and keys (C, K) as of `TopK.result`; some images are named far more often than others."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(centers, k, generator=generator).sort(dim=1, descending=True).values
    return scores, (torch.rand(centers, k, generator=generator).square() * images).long()


def plain_greedy(kernel: Kernel, misses: Descriptors, first: int, steps: int) -> tuple[float, list[int]]:
    """The median seconds of the first steps of one product of matrix and vector each, and their choices."""
    closest_M, seconds, chosen = torch.full((len(misses.z),), -torch.inf), [], [first]
    for _ in range(steps):
        start = time.perf_counter()
        closest_M = torch.maximum(closest_M, kernel.block(misses.rows(slice(chosen[-1], chosen[-1] + 1)), misses)[0])
        closest_M[chosen[-1]] = torch.inf
        chosen.append(int(closest_M.argmin()))
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[steps // 2], chosen[1:]


def append_and_unique(scores_CK: Tensor, keys_CK: Tensor, p: int) -> set[int]:
    """The images chosen by appending a candidate and counting the `unique` ones, until they are p."""
    order = [keys_CK[scores_CK[:, r].argsort(descending=True, stable=True), r] for r in range(keys_CK.shape[1])]
    offers, taken = torch.cat(order), keys_CK.new_empty(0)
    for key in offers.split(1):
        if len(taken) == p:
            break
        taken = torch.cat([taken, key]).unique()
    return set(taken.tolist())


def timed(function: Callable):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def best_of(times: int, function: Callable) -> float:
    return min(timed(function)[0] for _ in range(times))


def median_of(times: int, function: Callable):
    return sorted((timed(function) for _ in range(times)), key=lambda run: run[0])[times // 2]


if __name__ == "__main__":
    main()
