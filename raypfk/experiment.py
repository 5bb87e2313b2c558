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
from pydantic import Field, field_validator

from raypfk import config as configs
from raypfk import lease, loop, progress, session, store, study
from raypfk.config import Config, Positive, Section
from raypfk.errors import RunError, UserError
from raypfk.pool import Pool
from raypfk.run import Run
from raypfk.schema import RoundDir
from raypfk.stages import pool as pools

CPUS = 4
"""Logical CPUs of one run: itself, an actor, and tasks that feed it."""
POLL_S = 5.0
"""Seconds between two looks at how far the runs are."""

Settings = dict[str, Any]
_NAME = re.compile(r"\w[\w .,=+-]{0,79}")


Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


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
        for name in cells:
            if not _NAME.fullmatch(name):
                raise ValueError(f"expected names of letters, digits, spaces and _.,=+- (80 at most), found {name!r}")
        return cells


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
    """What is to be run. record: experiment.json."""

    record: dict[str, Any]
    jobs: list[Job]
    parallel: int | None
    retries: int


def load(path: str, settings: dict[str, Any], only: tuple[str, ...] = (), seeds: str | None = None) -> Plan:
    """Read an experiment's YAML file, and validate the configuration of each run of it.

    settings: fields of all runs, over the file's. only, seeds: cells and seeds to run, all if empty.
    """
    experiment = configs.checked(ExperimentConfig, configs.read_tree(path), path)
    base = experiment.base if os.path.isabs(experiment.base) else os.path.join(os.path.dirname(path), experiment.base)
    cells, chosen = experiment.cells, _seeds(seeds) or experiment.seeds
    for name in only:
        if name not in cells:
            raise UserError(f"--cell {name}: expected one of {', '.join(map(repr, cells))} of {path}")
    jobs = [
        Job(name, seed, configs.load(base, {"seed": seed}, experiment.set | cells[name].set | settings))
        for seed in chosen  # seed by seed: what can be compared is complete early
        for name in (only or cells)
        if seed in (cells[name].seeds or chosen)
    ]
    if not jobs:
        raise UserError(f"--seeds {seeds}: none is among the seeds of {', '.join(map(repr, only or cells))} in {path}")
    record = {
        "title": experiment.title,
        "figure": experiment.figure,
        "seeds": sorted({*experiment.seeds, *chosen}),
        "cells": {name: cell.model_dump(include={"published", "seeds"}) for name, cell in cells.items()},
    }
    return Plan(record, jobs, experiment.parallel, experiment.retries)


def run(plan: Plan, out: str, parallel: int | None, command: str) -> None:
    """Do all runs of the plan, or what is left of them. RunError that names those which failed, once all have ended.

    command: what asked for it, as the report says.
    """
    out = loop.place(out)
    with lease.held(out):
        store.write_json(store.join(out, study.RECORD), plan.record | {"command": command})
        tasks = _tasks(_with_pools(plan.jobs, out), out)
        parallel = _parallel(parallel, len(plan.jobs))
        failed = _side_by_side(tasks, parallel, plan.retries, lambda: study.write_results(study.open_study(out)))
    if failed:
        reasons = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise RunError(f"{len(failed)} of {len(tasks)} tasks failed; the same command tries them again. {reasons}")


def _seeds(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
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


def _with_pools(jobs: list[Job], out: str) -> list[Job]:
    """The jobs on pools that are built, each once for all that have its data and seed."""
    built: dict[str, str] = {}
    found = []
    for job in jobs:
        data = job.config.data
        if data.pool is None:
            name = f"seed-{job.seed:03d}-{_fingerprint(data.model_dump())}"
            if name not in built:
                built[name] = pools.build(data, store.join(out, "pools", name), job.seed).uri
            data = data.of_pool(built[name])
        found.append(replace(job, config=job.config.model_copy(update={"data": data})))
    return found


def _tasks(jobs: list[Job], out: str) -> list["Task"]:
    """A task for each job, and before the first that needs it one for the pretraining that jobs share."""
    tasks: dict[str, Task] = {}
    for job in jobs:
        start = _start(job, out) if job.config.pretrain else None
        if start:
            tasks.setdefault(start.name, start)
        uri = study.run_dir(out, job.cell, job.seed)
        given = (job.config, uri, start.uri if start else None)
        tasks[str(job)] = Task(str(job), uri, job.config.rounds, _do_cell, given, start.name if start else None)
    return list(tasks.values())


def _start(job: Job, out: str) -> "Task":
    """What makes the weights that all jobs of this pool, network, pretraining and seed begin with."""
    config = job.config
    alike = (config.data.pool, config.image, config.model.name, config.model.dropout, config.pretrain)
    name = f"seed-{job.seed:03d}-{_fingerprint([*map(_plain, alike)])}"
    uri = store.join(out, "starts", name)
    return Task(f"pretraining {name}", uri, 0, _do_start, (_start_config(config), uri), None)


def _start_config(config: Config) -> Config:
    """Of a run that is made for its round 0 alone."""
    same = {name: getattr(config, name) for name in ("data", "image", "model", "pretrain", "seed", "resources")}
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
) -> dict[str, UserError | RunError]:
    """Do tasks, so many at a time, in their order as far as needs allow; by name, the errors of those that failed."""
    waiting, tries, done, failed = list(tasks), Counter(), set(), {}
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
                again = error is not None and tries[task.name] <= retries and not isinstance(error, UserError)
                progress.current().say(f"{task.name}: {'done' if error is None else error}{', again' if again else ''}")
                if error is None:
                    done.add(task.name)
                elif again:
                    waiting.append(task)
                else:
                    lost = [task, *(other for other in waiting if other.needs == task.name)]
                    failed |= dict.fromkeys((each.name for each in lost), error)
                    waiting = [other for other in waiting if other not in lost]
                after_each()
    return failed


def _ready(waiting: list[Task], done: set[str]) -> Task | None:
    return next((task for task in waiting if task.needs is None or task.needs in done), None)


def _error_of(ref: ray.ObjectRef) -> UserError | RunError | None:
    try:
        session.result(ref)
    except (UserError, RunError) as error:
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
def _do_cell(config: Config, uri: str, start: str | None, others: int) -> None:
    session.share_with(others)
    loop.run(config, uri, Run.open(start) if start else None)


@_task
def _do_start(config: Config, uri: str, others: int) -> None:
    session.share_with(others)
    there = store.exists(store.join(uri, "run.json"))  # begun for a cell with other taps, which change nothing here
    with lease.held(uri):
        loop.do_round(Run.open(uri) if there else Run.create_or_open(config, uri, Pool.open(config.data.pool)), 0)
