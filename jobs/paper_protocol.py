"""What the paper's curves owe to the test set: rounds of S=`neighbour`, or `pcc`, in one process, without Ray.

    python jobs/paper_protocol.py runs/choices/cells/S=neighbour/seed-00* --keep best --kernel pfk-sum

Each RUN is one of MNIST: it lends its pool, its pretrained weights (or, with `--weights CELL`, the run of its seed in
another cell's folder lends them), its taps and its budget. With `--keep best`, as in the authors' program, every epoch
is tried on the test set, the accuracy of the best one is reported, and the next round goes on from its weights.
`--keep last` goes on from the last epoch, as raypfk does. `best` and `last` in what is printed are the accuracies of
these two epochs, in percent, by round, averaged over the runs.
"""

import json
import sys
from copy import deepcopy
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # python jobs/… puts jobs/ there, not the repository

from raypfk import models, pfk
from raypfk.config import TrainConfig
from raypfk.pfk import Descriptors, Kernel, TapReader, TopK
from raypfk.run import Run
from raypfk.stages.stream import Decoder, checkpoint_of, normalise
from raypfk.stages.train import learning_rate

BATCH = 512


def split_of(run: Run, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images (N, C, S, S) float32 as the network sees them, and labels (N,)."""
    decoder = Decoder(run.pool, run.image, ("image_id", "label"))
    parts = [decoder({"item": np.array([shard], object)}) for shard in run.pool.shards(name)]
    image, label = (torch.from_numpy(np.concatenate([part[column] for part in parts])) for column in ("image", "label"))
    return normalise(image, run.image), label


def described(reader: TapReader, x: torch.Tensor, estimate) -> tuple[Descriptors, torch.Tensor]:
    """Descriptors, with Fisher scores of the labels `estimate(z)`, and predicted labels."""
    parts = []
    for batch in x.split(BATCH):
        logits, taps = reader(batch)
        scales = pfk.lengths(taps)
        z = pfk.standardise(pfk.features(taps), scales)
        g = pfk.standardise(pfk.fisher_scores(logits, taps, estimate(z)), scales)
        parts.append((z, g, pfk.predicted(logits.detach())))
    z, g, predicted = (torch.cat(column) for column in zip(*parts, strict=True))
    return Descriptors(z, g), predicted


def select(net, run: Run, kernel: str, x_N: torch.Tensor, validation, seed: int) -> torch.Tensor:
    """P rows of the pool's images (Algorithm 1, lines 3 to 10)."""
    reader, scales = TapReader(net, run.config.model.taps), run.lengths
    x_M, y_M = validation
    labels = iter(y_M.split(BATCH))
    v, predicted = described(reader, x_M, lambda z: next(labels))
    pcc = Kernel("pcc", scales)
    p, _ = described(reader, x_N, lambda z: pfk.neighbour(z, v.z, y_M, pcc)[0])
    reader.close()
    kernel = Kernel(kernel, scales, run.config.scale_weight)
    misses = (predicted != y_M).nonzero()[:, 0]
    centers = misses[pfk.greedy_k_center(kernel, v.rows(misses), run.config.budget, seed)]
    top = TopK(len(centers), 4 * run.config.top_k)
    top.add(kernel, v.rows(centers), p, torch.arange(len(x_N)))
    return pfk.rank_by_rank(*top.result(), run.config.budget).keys


def accuracy(net, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.inference_mode():
        return float(torch.cat([net.eval()(batch).argmax(1) for batch in x.split(BATCH)]).eq(y).float().mean())


def train(net, config: TrainConfig, x, y, test, keep: str, generator: torch.Generator) -> tuple[float, float]:
    """The accuracies of the best and the last epoch; `net` has the weights of the one that is kept."""
    optimizer = torch.optim.SGD(net.requires_grad_(True).parameters(), lr=config.lr, momentum=config.momentum)
    best, weights = accuracy(net, *test), deepcopy(net.state_dict())
    for epoch in range(config.epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, epoch)
        net.train()
        for rows in torch.randperm(len(y), generator=generator).split(config.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        last = accuracy(net, *test)
        if last > best:
            best, weights = last, deepcopy(net.state_dict())
    if keep == "best":
        net.load_state_dict(weights)
    return best, last


def rounds_of(run: Run, origin: Run, kernel: str, keep: str, rounds: int, draw: int) -> list[tuple[float, float]]:
    """(best, last) of each round. origin: whose initial weights it begins with. draw: another number, another last
    layer, other first centers, other batches."""
    (x, y), validation, test = (split_of(run, name) for name in ("pool", "validation", "test"))
    seed = 1000 * run.config.seed + 100 * draw
    net, generator = run.architecture.build(), torch.Generator().manual_seed(seed)
    models.restore(net, models.load(checkpoint_of(origin, 0), origin.uri)[0], origin.uri)
    models.replace_last_layer(net, run.classes, seed)
    bought, found = torch.zeros(len(x), dtype=torch.bool), []
    for number in range(1, rounds + 1):
        left = (~bought).nonzero()[:, 0]
        bought[left[select(net, run, kernel, x[left], validation, seed + number)]] = True
        found.append(train(net, run.config.train, x[bought], y[bought], test, keep, generator))
        print(f"{run.uri} round {number}: best {found[-1][0]:.4f} last {found[-1][1]:.4f}", flush=True)
    return found


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--kernel", type=click.Choice(["pfk", "pfk-sum", "pcc"]), default="pfk-sum", show_default=True)
@click.option("--keep", type=click.Choice(["best", "last"]), default="best", show_default=True, help="Epoch on test.")
@click.option("--rounds", default=4, show_default=True)
@click.option("--draw", default=0, show_default=True)
@click.option("--weights", metavar="CELL", help="Folder of a cell whose runs lend their initial weights.")
def main(runs, kernel, keep, rounds, draw, weights):
    torch.set_num_threads(1)
    opened = [Run.open(uri) for uri in runs]
    origins = [Run.open(f"{weights}/{Path(run.uri).name}") if weights else run for run in opened]
    each = [rounds_of(*pair, kernel, keep, rounds, draw) for pair in zip(opened, origins, strict=True)]
    found = np.array(each)  # run, round, best or last
    best, last = (100 * found.mean(0)).round(1).T.tolist()
    print(json.dumps({"name": "paper-protocol", "kernel": kernel, "keep": keep, "best": best, "last": last}))


if __name__ == "__main__":
    main()
