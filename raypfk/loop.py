"""The whole chain. A round is its stages, in order; a stage that left its marker is not done again."""

import os
import time
from collections.abc import Callable

from raypfk import lease, progress, store, trust
from raypfk.config import Config
from raypfk.errors import UserError
from raypfk.pool import Pool
from raypfk.run import Run, open_pool
from raypfk.stages.acquire import acquire
from raypfk.stages.evaluate import evaluate, write_metrics
from raypfk.stages.extract import extract
from raypfk.stages.label import label
from raypfk.stages.score import score
from raypfk.stages.train import adopt, pretrain, train

STAGES: dict[str, Callable[[Run, int], dict]] = {
    "extract": extract,
    "score": score,
    "acquire": acquire,
    "label": label,
    "train": train,
    "evaluate": evaluate,
}


def run(
    config: Config, out: str, command: str | None = None, start: Run | None = None, pool: Pool | None = None
) -> Run:
    """Do a whole run, or what is left of it. Raises UserError if `out` holds another run.

    command: what asked for it, as the report says. start: if given, a run of the same pool, network, pretraining and
    seed, whose round 0 this one adopts. pool: if given, `data.pool` as it is to be, which may have grown since.
    """
    out = place(out)
    if store.exists(store.join(out, "run.json")):
        Run.open(out).refuse_other(config)  # before a pool is built that this run will not use
    with lease.held(out):
        this = Run.create_or_open(config, out, pool or open_pool(config, out), command)
        if not this.done(0, "train"):
            for text in trust.at_start(this):
                progress.current().say(f"warning: {text}")
        if start and not this.done(0, "train"):
            this.mark(0, "train", {"seconds": 0.0, **adopt(this, start)})
        for number in range(config.rounds + 1):
            if number and not images_left(this, number):
                progress.current().say(f"the pool is exhausted after round {number - 1}")
                break
            do_round(this, number)
    return this


def place(out: str) -> str:
    """Where `--out` is. UserError for a place that would be lost with a submitted job's copy of the folder."""
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") and not (store.is_remote(out) or os.path.isabs(out)):
        raise UserError(f"--out {out}: a submitted job runs in a copy of the folder: give an absolute path or a URI")
    return store.absolute(out)


def do_round(run: Run, number: int) -> None:
    """Round 0 makes the initial weights; the others select, label, train and evaluate."""
    if number == 0:
        do_stage(run, 0, "train")
        return
    for stage in STAGES:
        do_stage(run, number, stage)


def do_stage(run: Run, number: int, stage: str) -> bool:
    """Do one stage of one round, unless it is done; False if it was. UserError if an earlier stage is missing."""
    if run.done(number, stage):
        return False
    _require_earlier(run, number, stage)
    with lease.held(run.uri):
        return _do(run, number, stage)


def _do(run: Run, number: int, stage: str) -> bool:
    if run.done(number, stage):  # by the driver that was waited for
        return False
    start = time.perf_counter()
    facts = pretrain(run) if number == 0 else STAGES[stage](run, number)
    facts = {"seconds": round(time.perf_counter() - start, 3), **facts}
    if stage == "evaluate":
        markers = {name: run.done(number, name) or facts for name in STAGES}
        write_metrics(run, number, markers)
    run.mark(number, stage, facts)
    if stage == "train":  # what an interrupted training goes on from: only now of no use
        for member in range(run.members):
            store.delete(run.round(number).training_of(member))
    progress.current().say(_line(number, stage, facts))
    return True


def images_left(run: Run, number: int) -> bool:
    """Whether round `number` has anything to select: it did, or not all of the pool was labelled or rejected before."""
    rejected = (run.done(number - 1, "extract") or {}).get("rejected", 0) if number > 1 else 0
    return bool(run.done(number, "acquire")) or run.labelled(number).num_rows + rejected < run.pool.rows("pool")


def _require_earlier(run: Run, number: int, stage: str) -> None:
    if number == 0:
        if stage != "train":
            raise UserError(f"round 0 has the stage train only (the initial weights), not {stage}")
        return
    needed = [(number - 1, "train" if number == 1 else "evaluate")]
    needed += [(number, name) for name in list(STAGES)[: list(STAGES).index(stage)]]
    for earlier, name in needed:
        if not run.done(earlier, name):
            raise UserError(
                f"{run.uri}: {stage} of round {number} needs {name} of round {earlier} first: "
                f"raypfk {name} {run.uri} --round {earlier}"
            )


def _line(number: int, stage: str, facts: dict) -> str:
    shown = {k: v for k, v in facts.items() if k not in ("seconds", "confusion", "monitored") and v is not None}
    if stage == "evaluate":
        confusion = facts["confusion"]
        right = sum(row[i] for i, row in enumerate(confusion))
        shown = {"test_accuracy": f"{right / max(1, facts['tested']):.4f}"}
        shown |= {"rejected": facts["rejected"]} if facts["rejected"] else {}
    details = ", ".join(f"{k} {_short(v)}" for k, v in shown.items())
    return f"round {number}: {stage} in {facts['seconds']:.1f} s{': ' if details else ''}{details}"


def _short(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
