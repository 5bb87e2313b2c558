"""Experiments: cells by seeds, each a run, side by side on one cluster.

What cells have in common is made once: the pool of a data set and a seed, and the pretrained weights of a pool, a
network and a seed. So the runs of a seed are paired: they begin alike and differ in what the cell says.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import ray
from pydantic import AfterValidator, Field, field_validator, model_validator

from raypfk import config as configs
from raypfk import lease, loop, progress, session, store, study
from raypfk.config import Config, Positive, Section
from raypfk.errors import RunError, UserError, WaitingForLabels
from raypfk.pool import Pool
from raypfk.report import published
from raypfk.run import Run
from raypfk.schema import RoundDir
from raypfk.stages import pool as pools

CPUS = 4
"""Logical CPUs of one run: itself, an actor, and tasks that feed it."""
POLL_S = 5.0
"""Seconds between two looks at how far the runs are."""

Settings = dict[str, Any]
_NAME = re.compile(r"\w[\w .,=+-]{0,79}")


def _once(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"expected each seed once, found {seeds}")
    return seeds


Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_once)]


class CellConfig(Section):
    set: Settings = Field(default_factory=dict)
    """Fields of a run's configuration, by dotted name: what makes the cell."""
    published: str | None = None
    """The paper's curve that it is to be compared with, as `figure` names it."""
    seeds: Seeds | None = None
    """Of the experiment's seeds those that the cell is run on, if it is too dear for all of them."""


class ExperimentConfig(Section):
    """One experiment: a YAML file."""

    title: str
    base: str
    """A run's configuration, relative to this file."""
    figure: str | None = None
    """The paper's figure whose curves are drawn beside, as in 4b."""
    seeds: Seeds
    set: Settings = Field(default_factory=dict)
    """Fields of all cells."""
    cells: Annotated[dict[str, CellConfig], Field(min_length=1)]
    parallel: Positive | None = None
    """Runs at a time; null: one per GPU, or per core where there is none."""
    retries: Annotated[int, Field(ge=0)] = 1
    """How often a run that failed is tried again."""

    @field_validator("cells")
    @classmethod
    def _named(cls, cells: dict[str, CellConfig]) -> dict[str, CellConfig]:
        """They are folders' names, too."""
        folders: dict[str, str] = {}
        for name in cells:
            if not _NAME.fullmatch(name):
                raise ValueError(f"expected names of letters, digits, spaces and _.,=+- (80 at most), found {name!r}")
            if (other := folders.setdefault(study.folder(name), name)) != name:
                raise ValueError(f"{other!r} and {name!r} would have one folder, {study.folder(name)}")
        return cells

    @model_validator(mode="after")
    def _published(self):
        if self.figure is not None and self.figure not in published.figures():
            raise ValueError(f"figure: expected one of {', '.join(published.figures())}, found {self.figure!r}")
        known = published.methods(self.figure) if self.figure else []
        for name, cell in self.cells.items():
            if cell.published not in (None, *known):
                expected = f"a curve of `figure` {self.figure} ({', '.join(known) or 'it has none'})"
                raise ValueError(f"cells.{name}.published: expected {expected}, found {cell.published!r}")
        return self


@dataclass(frozen=True)
class Job:
    """One run of the experiment."""

    cell: str
    seed: int
    config: Config

    def __str__(self) -> str:
        return f"{self.cell}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """What is to be run. record: experiment.json. jobs: these now. cells: those that they are of. job: any of a cell
    and a seed."""

    record: dict[str, Any]
    jobs: list[Job]
    cells: list[str]
    job: Callable[[str, int], Job]
    parallel: int | None
    retries: int


def load(path: str, settings: dict[str, Any], only: tuple[str, ...] = (), seeds: str | None = None) -> Plan:
    """Read an experiment's YAML file, and validate the configuration of each run of it.

    settings: fields of all runs, over the file's. only, seeds: cells and seeds to run, the file's if empty.
    """
    experiment = configs.checked(ExperimentConfig, configs.read_tree(path), path)
    base = experiment.base if os.path.isabs(experiment.base) else os.path.join(os.path.dirname(path), experiment.base)
    cells, chosen = experiment.cells, _seeds(seeds) or experiment.seeds
    for name in only:
        if name not in cells:
            raise UserError(f"--cell {name}: expected one of {', '.join(map(repr, cells))} of {path}")
    asked = list(only or cells)
    seeds_of = {name: [s for s in chosen if cell.seeds is None or s in cell.seeds] for name, cell in cells.items()}

    def job(name: str, seed: int) -> Job:
        return Job(name, seed, configs.load(base, {"seed": seed}, experiment.set, cells[name].set, settings))

    # Seed by seed: what can be compared is complete early.
    jobs = [job(name, seed) for seed in chosen for name in asked if seed in seeds_of[name]]
    if not jobs:
        raise UserError(f"--seeds {seeds}: none is among the seeds of {', '.join(map(repr, asked))} in {path}")
    record = {
        "title": experiment.title,
        "figure": experiment.figure,
        "cells": {name: {"published": cell.published, "seeds": seeds_of[name]} for name, cell in cells.items()},
    }
    return Plan(record, jobs, asked, job, experiment.parallel, experiment.retries)


def run(plan: Plan, out: str, parallel: int | None, command: str) -> None:
    """Do the plan's jobs, or what is left of them.

    command: what asked for it, as the report says. Once all have ended, raises RunError that names those which failed,
    or else WaitingForLabels of those which a person must label for. UserError, before anything is written, where a run
    that is there is of another configuration: its results would stand beside the others'.
    """
    out = loop.place(out)
    with lease.held(out):
        begun = _begun(plan, out)
        _refuse_others(plan, begun, out)
        pools_there = _pools(plan, begun, out)
        record = plan.record | {"command": command, "pools": pools_there}
        store.write_json(store.join(out, study.RECORD), record)
        tasks = _tasks([_on_pool(job, out) for job in plan.jobs], pools_there, out, command)
        parallel = _parallel(parallel, len(plan.jobs))
        failed, waiting = _side_by_side(
            tasks, parallel, plan.retries, lambda: study.write_results(study.open_study(out))
        )
    if failed:
        reasons = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise RunError(f"{len(failed)} of {len(tasks)} tasks failed; the same command tries them again. {reasons}")
    if waiting:
        raise WaitingForLabels("\n".join(f"{name}: {needed}" for name, needed in waiting.items()))


def _begun(plan: Plan, out: str) -> list[tuple[Job, Run]]:
    """The runs of the plan's cells that are there, whichever seeds are asked for now."""
    return [
        (plan.job(name, seed), Run.open(study.run_dir(out, name, seed)))
        for name in plan.cells
        for seed in study.seeds_of(out, name)
    ]


def _refuse_others(plan: Plan, begun: list[tuple[Job, Run]], out: str) -> None:
    others = []
    for job, run in begun:
        config = _on_pool(job, out).config
        if job not in plan.jobs:  # its run may have more rounds than the others get now
            config = config.model_copy(update={"rounds": max(config.rounds, run.config.rounds)})
        try:
            run.refuse_other(config)
        except UserError as error:
            others.append(str(error))
    if others:
        raise UserError("\n".join([*others, "a cell that was changed needs another name, or another --out"]))


def _seeds(text: str | None) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in text.split(","))) if text else []
    except ValueError:
        raise UserError(f"--seeds {text}: expected whole numbers, as in 0,1,2") from None


def _parallel(wanted: int | None, jobs: int) -> int:
    """Runs at a time: as wanted, one per GPU, or per core; no more than there are CPUs for."""
    fit = max(1, int(ray.cluster_resources().get("CPU", 1)) // CPUS)
    count = min(wanted or int(session.gpus()) or session.cpus(), jobs)
    if count > fit:
        progress.current().say(f"{fit} runs at a time: {count} would need {CPUS * count} CPUs")
    return max(1, min(count, fit))


# ------------------------------------------------------------------------------------------------- what cells share


def _pools(plan: Plan, begun: list[tuple[Job, Run]], out: str) -> dict[str, str]:
    """Where the pools are, and their fingerprints: what they were when the experiment began, if they have grown.

    Of data that are no pool yet, one is built for all jobs that have them and their seed.
    """
    path = store.join(out, study.RECORD)
    known = store.read_record(path, {}).get("pools", {}) if store.exists(path) else {}
    known |= {run.pool.uri: run.pool.fingerprint for _, run in begun}
    there = {}
    for job in plan.jobs:
        uri, data = _on_pool(job, out).config.data.pool, job.config.data
        if uri not in there:
            there[uri] = Pool.open(uri) if data.pool else pools.build(data, uri, job.seed)
    return {uri: pool.fingerprint for uri, pool in there.items()} | known


def _on_pool(job: Job, out: str) -> Job:
    """The job with the place of its pool for its data."""
    data = job.config.data
    if data.pool:
        return job
    name = f"seed-{job.seed:03d}-{_fingerprint(configs.identity(job.config).data.model_dump())}"
    uri = store.join(out, "pools", name)
    return replace(job, config=job.config.model_copy(update={"data": data.of_pool(uri)}))


def _tasks(jobs: list[Job], pools_there: dict[str, str], out: str, command: str) -> list["Task"]:
    """A task for each job, and before the first that needs it one for the pretraining that jobs share."""
    tasks: dict[str, Task] = {}
    for job in jobs:
        uri, pool = study.run_dir(out, job.cell, job.seed), pools_there[job.config.data.pool]
        begun = store.exists(RoundDir(uri, 0).marker("train"))
        start = _start(job, pool, out) if job.config.pretrain and not begun else None
        if start:
            tasks.setdefault(start.name, start)
        given = (job.config, pool, uri, command, start.uri if start else None)
        tasks[str(job)] = Task(str(job), uri, job.config.rounds, _do_cell, given, start.name if start else None)
    return list(tasks.values())


def _start(job: Job, pool: str, out: str) -> "Task":
    """What makes the weights that all jobs of this pool, network, pretraining and seed begin with."""
    config = job.config
    # Workers may change while a training goes on, but are another training: what is shared is the same to the last bit.
    pretrain = configs.identity(config).pretrain.model_copy(update={"workers": config.pretrain.workers})
    alike = (config.data.pool, config.image, config.model.name, config.model.dropout, pretrain)
    name = f"seed-{job.seed:03d}-{_fingerprint([*map(_plain, alike)])}"
    uri = store.join(out, "starts", name)
    return Task(f"pretraining {name}", uri, 0, _do_start, (_start_config(config), pool, uri), None)


def _start_config(config: Config) -> Config:
    """Of a run that is made for its round 0 alone."""
    names = ("data", "image", "model", "pretrain", "oracle", "seed", "resources")
    same = {name: getattr(config, name) for name in names}
    return Config(**same, train=config.pretrain, strategy="random", budget=1, rounds=1)


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def _fingerprint(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=4).hexdigest()


# ------------------------------------------------------------------------------------------------------ side by side


class Task(NamedTuple):
    """uri: the run that it does, of so many rounds. do: the Ray task, of `given` and how many others run beside it.
    needs: the name of another that must be done before."""

    name: str
    uri: str
    rounds: int
    do: ray.remote_function.RemoteFunction
    given: tuple
    needs: str | None


def _side_by_side(
    tasks: list[Task], parallel: int, retries: int, after_each: Callable[[], None]
) -> tuple[dict[str, Exception], dict[str, WaitingForLabels]]:
    """Do tasks, so many at a time, in their order as far as needs allow. By name: the errors of those that failed, and
    what others wait for."""
    waiting, tries, done, failed, unlabelled = list(tasks), Counter(), set(), {}, {}
    running: dict[ray.ObjectRef, tuple[Task, _Rounds]] = {}
    with progress.current().bar("experiment", sum(task.rounds for task in tasks), "rounds") as advance:
        while waiting or running:
            while len(running) < parallel and (task := _ready(waiting, done)):
                waiting.remove(task)
                running[task.do.remote(*task.given, parallel - 1)] = (task, _Rounds(task.uri, task.rounds))
            ended, _ = ray.wait(list(running), timeout=POLL_S)
            advance(sum(rounds.new() for _, rounds in running.values()))
            for ref in ended:
                task, _ = running.pop(ref)
                error, tries[task.name] = _error_of(ref), tries[task.name] + 1
                again = isinstance(error, RunError) and tries[task.name] <= retries
                progress.current().say(f"{task.name}: {'done' if error is None else error}{', again' if again else ''}")
                if error is None:
                    done.add(task.name)
                elif isinstance(error, WaitingForLabels):
                    unlabelled[task.name] = error
                elif again:
                    waiting.append(task)
                else:
                    lost = [task, *(other for other in waiting if other.needs == task.name)]
                    failed |= dict.fromkeys((each.name for each in lost), error)
                    waiting = [other for other in waiting if other not in lost]
                after_each()
    return failed, unlabelled


def _ready(waiting: list[Task], done: set[str]) -> Task | None:
    return next((task for task in waiting if task.needs is None or task.needs in done), None)


def _error_of(ref: ray.ObjectRef) -> Exception | None:
    try:
        session.result(ref)
    except (UserError, RunError, WaitingForLabels) as error:
        return error
    return None


class _Rounds:
    """How far a run is, seen from its directory."""

    def __init__(self, uri: str, rounds: int):
        self._uri, self._rounds, self._seen = uri, rounds, 0

    def new(self) -> int:
        """Rounds that were evaluated since it was asked last."""
        before = self._seen
        while self._seen < self._rounds and store.exists(RoundDir(self._uri, self._seen + 1).marker("evaluate")):
            self._seen += 1
        return self._seen - before


# A run has a process of its own, and leaves nothing in it for the next.
_task = ray.remote(num_cpus=1, max_calls=1, max_retries=0, scheduling_strategy="SPREAD")


@_task
def _do_cell(config: Config, pool: str, uri: str, command: str, start: str | None, others: int) -> None:
    session.share_with(others)
    loop.run(config, uri, command, Run.open(start) if start else None, _pool(config, pool))


@_task
def _do_start(config: Config, pool: str, uri: str, others: int) -> None:
    session.share_with(others)
    if store.exists(store.join(uri, "run.json")):  # begun for another cell, whose taps or oracle change nothing here
        there = Run.open(uri).config
        now = {name: getattr(config, name) for name in ("train", "pretrain", "resources")}
        now["data"] = there.data.model_copy(update={"max_rejects": config.data.max_rejects})
        config = there.model_copy(update=now)
    with lease.held(uri):
        loop.do_round(Run.create_or_open(config, uri, _pool(config, pool)), 0)


def _pool(config: Config, fingerprint: str) -> Pool:
    return Pool.open(config.data.pool).as_of(fingerprint, "the experiment was begun on")
