"""Ray for one command: the cluster that the environment names, or a quiet local one."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from raypfk import progress
from raypfk.errors import RunError, UserError, WaitingForLabels

PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_NO_SIGN_REQUEST")
"""What a cluster's workers are told of the driver's environment. Never a secret: Ray shows it to all who look."""


@contextmanager
def ray_session(verbose: bool = False, cpus: int | None = None) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS (set inside a submitted job) or start a local Ray; end it at the exit.

    cpus: logical CPUs of a local Ray (default: the cores, and at least 4).

    Raises UserError where RAY_ADDRESS is the dashboard's http address, which a driver cannot use.
    """
    if ray.is_initialized():  # a caller's own session: use it, leave it
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith("http"):
        raise UserError(
            f"RAY_ADDRESS is {address!r}, a dashboard's address; expected host:port of the cluster "
            "(for `ray job submit` set RAY_API_SERVER_ADDRESS instead)"
        )
    _quiet(verbose)
    options = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    if address:
        options["address"] = address
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # a submitted job's workers have the job's environment
            options["runtime_env"] = {"env_vars": {name: os.environ[name] for name in PASSED_ON if name in os.environ}}
    else:
        # A local Ray talks to nobody else: without this it writes a token file that later clusters would ask for.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # More logical CPUs than cores on a small machine, or training workers would starve the tasks that feed them.
        # "local": otherwise it would meet a cluster that somebody runs on this machine.
        options |= {"address": "local", "num_cpus": cpus or max(4, cores()), "include_dashboard": False}
    with _without_stderr(not verbose), _own_sigterm():
        ray.init(**options)
    try:
        yield
    finally:
        with _own_sigterm():
            ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """ray.init lets SIGTERM end the program by sys.exit from then on, and ray.shutdown by its default: a program with
    an answer of its own keeps it. (While Ray's core shuts down, a SIGTERM still ends the program at once.)"""
    answer = signal.getsignal(signal.SIGTERM)
    ours = callable(answer) and threading.current_thread() is threading.main_thread()
    try:
        yield
    except SystemExit:  # it came meanwhile
        if ours:
            answer(signal.SIGTERM, None)
        raise
    finally:
        if ours:
            signal.signal(signal.SIGTERM, answer)


@contextmanager
def _without_stderr(hidden: bool) -> Iterator[None]:
    """Hides what compiled code prints: Ray's core announces on stderr that it was asked to be quiet."""
    if not hidden:
        yield
        return
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _quiet(verbose: bool) -> None:
    from ray.data import DataContext

    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        os.environ.setdefault("RAY_TQDM", "0")
        DataContext.get_current().enable_progress_bars = False
        for name in ("ray", "ray.data", "ray.train"):  # what they log of an error, the command says in one line
            logging.getLogger(name).setLevel(logging.CRITICAL)


def cores() -> int:
    """CPU cores that this process may use; a container's limit counts."""
    import joblib

    return joblib.cpu_count()


def result(ref: ray.ObjectRef) -> Any:
    """What a task returns, or what it raised; RunError where Ray lost it."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError | RunError | WaitingForLabels):
            raise error.cause from None
        raise RunError(f"a task failed: {type(error.cause).__name__}: {error.cause}") from error
    except ray.exceptions.RayError as error:
        raise RunError(f"a task was lost, again and again: {error}") from error


def require(what: str, **wanted: float) -> None:
    """Says so where the cluster has too little of a resource now; UserError on a local Ray, which will not grow.

    wanted: CPU=..., GPU=... in all.
    """
    there = ray.cluster_resources()
    for name, amount in wanted.items():
        if amount > there.get(name, 0):
            message = f"{what}: asks for {amount:g} {name}, there are {there.get(name, 0):g}"
            if not os.environ.get("RAY_ADDRESS"):
                raise UserError(f"{message}; see `resources` and `train` of the configuration")
            progress.current().say(f"{message}: waiting for the cluster to grow")


def share_with(others: int) -> None:
    """From now on this process leaves room for so many others of its kind, and takes its part of the cluster."""
    from ray.data import DataContext, ExecutionResources

    global _sharers
    _sharers = others + 1
    there = ray.cluster_resources()
    # A pipeline knows of no other: with all CPUs in the hands of several pipelines' actors, none could read any more.
    limits = ExecutionResources.for_limits(cpu=max(2, there.get("CPU", 1) / _sharers - 1), gpu=gpus())
    DataContext.get_current().execution_options.resource_limits = limits


_sharers = 1


def gpus() -> float:
    """GPUs of the cluster, or of this process's share of it."""
    return ray.cluster_resources().get("GPU", 0) / _sharers


def gpus_per_actor(wanted: float | None) -> float:
    """As configured; where nothing is, one if there are any, or what the share has of one."""
    return wanted if wanted is not None else min(1, gpus())


def cpus() -> int:
    """CPUs of the cluster, or this process's share; of a local Ray the cores that are there, not the logical ones."""
    logical = int(ray.cluster_resources().get("CPU", 1))
    nodes = [n for n in ray.nodes() if n["Alive"]]
    return max(1, (min(logical, cores()) if len(nodes) == 1 else logical) // _sharers)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it torch uses so many: where actors and workers are few, their work is done in the driver's process, which
    goes on with its own number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
