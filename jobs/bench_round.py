"""Times the active-learning phase (extract + score + acquire) of one round on Ray against the same arithmetic in one
plain process without Ray, on the same pool, and checks that both select the same images.

    python jobs/bench_round.py --root ../shared/data/mnist

figure: seconds on Ray without its start-up. peer: seconds of the plain process. floor: seconds of the plain process in
the networks and kernels alone (no reading, decoding or writing).
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
from raypfk import descriptor_files, isolated, loop, pfk, session, store
from raypfk.run import Run
from raypfk.schema import RoundDir
from raypfk.stages import extract, score
from raypfk.stages.acquire import pick
from raypfk.stages.methods import Describe
from raypfk.stages.stream import Decoder, network_of

STAGES = ("extract", "score", "acquire")


@click.command()
@click.option("--config", default="configs/mnist.yaml", show_default=True)
@click.option("--root", help="data.root of the configuration.")
@click.option("--set", "assignments", multiple=True, help="Any field of the configuration.")
@click.option("--repeat", default=3, show_default=True, help="Pairs timed, in turn; the median counts.")
def main(config, root, assignments, repeat):
    sets = (*assignments, *([f"data.root={root}"] if root else []))
    scratch = tempfile.mkdtemp(prefix="raypfk-bench-")
    settings = configs.load(config, {"rounds": 1}, configs.assigned(sets)).model_copy(update={"pretrain": None})
    try:
        with session.ray_session():
            run = _begin(settings, scratch)
            rows = {s: run.pool.rows(s) for s in ("pool", "validation")}
            network = network_of(run, 0)
            network = replace(network, checkpoint=store.read_bytes(network.origin))
        pairs = [_pair(run, network, scratch) for _ in range(repeat)]
    finally:
        shutil.rmtree(scratch)
    # The pair of the median ratio: both halves met the machine in the same minute.
    ray, plain = sorted(pairs, key=lambda pair: pair[0]["work"] / pair[1]["seconds"])[repeat // 2]
    print("ratios:  " + ", ".join(f"{a['work'] / b['seconds']:.2f}" for a, b in pairs))
    print(f"{rows['pool']:,} pool and {rows['validation']:,} validation images, {torch.get_num_threads()} cores")
    print("on Ray:  " + ", ".join(f"{k} {v:.2f} s" for k, v in ray.items()))
    print("plain:   " + ", ".join(f"{k} {v:.2f} s" for k, v in plain.items()))
    result = {
        "name": "al-phase",
        "figure": round(ray["work"], 3),
        "unit": "s",
        "peer": round(plain["seconds"], 3),
        "floor": round(plain["arithmetic"], 3),
        "vs_peer": round(ray["work"] / plain["seconds"], 3),
        "of_floor": round(plain["arithmetic"] / ray["work"], 3),
        "startup": round(ray["startup"], 3),
    }
    print(json.dumps(result))


def _begin(settings, scratch: str) -> Run:
    out = store.join(scratch, "run")
    from raypfk.run import open_pool

    run = Run.create_or_open(settings, out, open_pool(settings, out))
    loop.do_round(run, 0)
    return run


def _pair(run: Run, network, scratch: str) -> tuple[dict, dict]:
    """The round on Ray, then in this process when no Ray is there."""
    with session.ray_session():
        ray = _on_ray(run)
    isolated.decode_small.cache_clear()  # of the pair before: Ray's processes are new
    plain = _plain(run, network, scratch)
    if plain.pop("selection") != run.read(run.round(1).selection)["image_id"].to_pylist():
        sys.exit("the plain process selected other images: the figures compare nothing")
    return ray, plain


def _on_ray(run: Run) -> dict[str, float]:
    shutil.rmtree(run.round(1).root, ignore_errors=True)
    start = time.perf_counter()
    for stage in STAGES:
        loop.do_stage(run, 1, stage)
    total = time.perf_counter() - start
    facts = {stage: run.done(1, stage) for stage in STAGES}
    startup = sum(f.get("startup_seconds", 0.0) for f in facts.values())
    return {"work": total - startup, "startup": startup, **{s: facts[s]["seconds"] for s in STAGES}}


def _plain(run: Run, network, scratch: str) -> dict:
    """The round's arithmetic in this process: the stages' own pieces, called one after the other."""
    files, timer = RoundDir(store.join(scratch, "plain"), 1), _Arithmetic()
    shutil.rmtree(files.root, ignore_errors=True)
    start = time.perf_counter()
    full, directions = descriptor_files.full_origin(run, network.weights), descriptor_files.directions_of(run, 1)
    origin = descriptor_files.stored_origin(run, full, directions)
    method = extract.describe(run, 1, full, "true")
    _describe(run, network, "validation", method, files.validation_parts, timer)
    parts = [store.read_table(store.join(files.validation_parts, s.name)) for s in run.pool.shards("validation")]
    validation = pa.concat_tables(parts).combine_chunks()
    missed = validation["predicted"].to_numpy() != validation["label"].to_numpy()
    with timer:
        described = descriptor_files.decode(validation, full)
        mask = extract.choose_centers(run, 1, described, missed if missed.any() else ~missed)
    reference = described.z.numpy(), validation["label"].to_numpy()
    method = extract.describe(run, 1, origin, "neighbour", reference, directions)
    _describe(run, network, "pool", method, files.descriptors, timer)
    centers = validation.filter(pa.array(mask))
    paths = [files.described(s.name) for s in run.pool.shards("pool")]
    held = described.rows(torch.from_numpy(mask))
    held = directions.project(held) if directions else held
    scorer = score.Scorer(run, run.stored_kernel(), origin, *(x.numpy() for x in held), torch.get_num_threads())
    top = pfk.TopK(centers.num_rows, run.config.top_k)
    for chunk in enumerate(paths):
        with timer:
            (scores, keys), _ = scorer.score([chunk], run.config.top_k)
        top.merge(pfk.TopK.of(torch.tensor(scores), torch.tensor(keys)))
    selection = pick(score.candidates_table(top, centers, paths), run.config.budget)["image_id"].to_pylist()
    return {"seconds": time.perf_counter() - start, "arithmetic": timer.seconds, "selection": selection}


def _describe(run: Run, network, split: str, method: Describe, out: str, timer: "_Arithmetic") -> None:
    columns = ("image_id", "label") if method.estimator == "true" else ("image_id",)
    decoder = Decoder(run.pool, run.image, columns)
    extractor = extract.Extractor([network], method, run.config.model.batch_size, out, run.id)
    extractor.loaded = _Timed(extractor.loaded, timer)
    for shard in run.pool.shards(split):
        extractor(decoder({"item": np.array([shard], object)}))


class _Arithmetic:
    """Sums the seconds spent inside."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *_):
        self.seconds += time.perf_counter() - self.start


class _Timed:
    """A method in an actor, whose seconds are counted."""

    def __init__(self, loaded, timer: _Arithmetic):
        self.loaded, self.timer, self.device = loaded, timer, loaded.device

    def __call__(self, *args):
        with self.timer:
            return self.loaded(*args)


if __name__ == "__main__":
    main()
