"""Images chosen one after another: actors hold the pool's gradients, each proposes its best, the driver takes the best.

What was chosen goes to all holders with the next question, so that a choice costs one call of each. A holder that was
lost begins anew, and is told all choices so far.
"""

import math
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import ray
import torch

from raypfk import descriptor_files, progress, session, store
from raypfk.descriptor_files import Origin
from raypfk.pfk import LastLayer
from raypfk.pfk.greedy import Proposal, best
from raypfk.run import Run
from raypfk.salts import salts
from raypfk.schema import SELECTION
from raypfk.stages.keys import ids_of, keys_of
from raypfk.stages.stream import network_of, value

LOWEST = float(np.finfo(np.float32).min)


class Answer(NamedTuple):
    """Of a holder that knows so many choices: its next proposal, or None where all its images are taken."""

    known: int
    proposal: Proposal | None


class Holder:
    """Actor: the last layer's gradients of some shards, as a part of the strategy's."""

    def __init__(self, run: Run, round: int, origin: Origin, numbers: list[int], given: dict[str, ray.ObjectRef]):
        shards, files = run.pool.shards("pool"), run.round(round)
        vectors, keys, own, seed = [], [], [], run.seed("greedy", round)
        for number in numbers:
            path = files.described(shards[number].name)
            table, part = descriptor_files.read_shard(run, path, shards[number], origin)
            vectors.append(part)
            keys.append(keys_of(number, table.num_rows))
            own.append(torch.from_numpy(salts(table["image_id"].to_pylist(), seed).view(np.int64)))
        taken_in = {name: LastLayer(*(torch.from_numpy(x.copy()) for x in value(held))) for name, held in given.items()}
        self.part = run.strategy(_joined(vectors), torch.cat(keys), torch.cat(own), **taken_in)
        self.known = 0

    def propose(self, first: int, chosen: list[Proposal]) -> Answer:
        """What it would choose next, after choices `first`, `first` + 1, ...; those it knows already change nothing.

        Nothing, where it does not know those before: a holder that began anew.
        """
        if first > self.known:
            return Answer(self.known, None)
        for proposal in chosen[self.known - first :]:
            self.part.take(proposal.key)
            self.part.absorb(proposal.vector)
            self.known += 1
        return Answer(self.known, self.part.propose())


def one_by_one(run: Run, round: int, count: int) -> tuple[pa.Table, dict]:
    """(image_id, score) of at most `count` images, in order of choice; and facts for the marker."""
    numbers = list(range(len(run.pool.shards("pool"))))
    wanted = min(run.config.resources.score_actors or session.cpus(), len(numbers))
    session.require("choosing", CPU=wanted)
    origin = descriptor_files.full_origin(run, network_of(run, round - 1).weights)
    given = {name: ray.put([x.numpy() for x in vectors]) for name, vectors in _given(run, round, origin).items()}
    actor = ray.remote(Holder).options(num_cpus=1, max_restarts=4, max_task_retries=4)
    shares = [numbers[i::wanted] for i in range(wanted)]
    holders = [actor.remote(run, round, origin, share, given) for share in shares]
    try:
        chosen = _choose(holders, count)
    finally:
        for holder in holders:
            ray.kill(holder)
    files = run.round(round)
    keys = np.array([proposal.key for proposal in chosen], np.int64)
    ids = ids_of(keys, [files.described(shard.name) for shard in run.pool.shards("pool")])
    score = pa.array([_narrow(proposal.value) for proposal in chosen], SELECTION.field("score").type)
    return pa.table({"image_id": ids, "score": score}), {"holders": wanted}


def _narrow(value: float) -> float:
    """For float32: what it has no number for is its lowest, for -inf says that the vector is not finite."""
    return value if value == -math.inf else max(value, LOWEST)


def _choose(holders: list, count: int) -> list[Proposal]:
    """At most `count` choices: always the best that any holder proposes."""
    chosen, known = [], [0] * len(holders)
    with progress.current().bar("acquire", count, "images") as advance:
        while len(chosen) < count:
            proposal = best(_proposals(holders, known, chosen))
            if proposal is None:
                break
            chosen.append(proposal)
            advance(1)
    return chosen


def _proposals(holders: list, known: list[int], chosen: list[Proposal]) -> list[Proposal | None]:
    """Of all holders, who are told what they do not know yet."""
    asked = [holder.propose.remote(n, chosen[n:]) for holder, n in zip(holders, known, strict=True)]
    found: list[Proposal | None] = []
    for i, ref in enumerate(asked):
        answer = session.result(ref)
        while answer.known < len(chosen):  # it was restarted
            answer = session.result(holders[i].propose.remote(answer.known, chosen[answer.known :]))
        known[i] = len(chosen)
        found.append(answer.proposal)
    return found


def _given(run: Run, round: int, origin: Origin) -> dict[str, LastLayer]:
    """What the strategy's parts take in: vectors of the labelled images, of the misses with their true labels."""
    files, given = run.round(round), {}
    if "labelled" in run.strategy.given:
        read = (descriptor_files.read(run, p, origin, run.uri, ["image_id"]) for p in store.paths(files.labelled))
        given["labelled"] = _joined([LastLayer(*(torch.empty(0, n) for n in origin.lengths)), *(v for _, v in read)])
    if "misses" in run.strategy.given:
        table, vectors, _ = descriptor_files.read_validation(run, round, origin.weights)
        given["misses"] = vectors.rows(torch.from_numpy(table["center"].to_numpy().copy()))
    return given


def _joined(parts: list[LastLayer]) -> LastLayer:
    return LastLayer(*map(torch.cat, zip(*parts, strict=True)))
