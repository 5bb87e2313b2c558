"""Extract: what the strategy needs to know of each image; for a kernel one forward and one partial backward pass
(Algorithm 1, lines 3 to 8).

The validation set first: its misses become the centers, and its features the reference of the label estimator.
Then the pool, without the images that are labelled already.
"""

import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import ray
import torch

from raypfk import descriptor_files, lease, pfk, progress, store
from raypfk.descriptor_files import Directions, Origin
from raypfk.errors import RunError
from raypfk.pfk import Descriptors, LastLayer
from raypfk.pool import Shard
from raypfk.rejects import TooMany
from raypfk.run import Run
from raypfk.stages.methods import Describe, Differentiate, Discriminate, Method, Predict
from raypfk.stages.stream import (
    Decoder,
    Maybe,
    NetworkSpec,
    adversary_of,
    batches,
    network_of,
    networks_of,
    rejects_of,
    through_actors,
)


class Extractor:
    """Actor: a shard's decoded images in, one file of the same name written to `out` by the method."""

    def __init__(self, networks: list[NetworkSpec], method: Method, batch_size: int, out: str, run_id: str):
        self.loaded, self.image = method.load(networks), networks[0].image
        self.method, self.batch_size, self.out, self.run_id = method, batch_size, out, run_id

    def __call__(self, shard: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        began, rows = time.time(), len(shard["image"])
        if not rows:
            return {"rows": np.empty(0, np.int64), "began": np.empty(0)}
        parts, known = [], {name: shard[name] for name in ("image_id", "label") if name in shard}
        for count, x in batches(shard["image"], self.image, self.batch_size, self.loaded.device):
            start = len(parts) * self.batch_size
            parts.append(self.loaded(x, {name: values[start : start + count] for name, values in known.items()}))
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        table = self.method.table(pa.array(shard["image_id"], pa.string()), columns)
        self.method.write(store.join(self.out, shard["shard"][0]), table, self.run_id)
        return {"rows": np.array([rows]), "began": np.array([began])}


def extract(run: Run, round: int) -> dict:
    """Write round `round`'s descriptors/, and what goes with them. Shards that are there already are not done again."""
    if not run.describes(round):
        return {"skipped": _nothing_to_describe(run, round), "forward": 0, "backward": 0}
    facts = {"forward": 0, "backward": 0, "startup_seconds": 0.0}
    _EXTRACT[run.strategy.kind](run, round, facts)
    return facts


def _nothing_to_describe(run: Run, round: int) -> str:
    if run.strategy.kind == "chance":
        return "the strategy needs no descriptors"
    why = "no image is labelled yet, the first are drawn at random"
    progress.current().say(f"round {round}: {why}")
    return why


def _descriptors(run: Run, round: int, facts: dict) -> None:
    """Features and Fisher scores: validation.parquet, then the pool's."""
    networks, estimator = [network_of(run, round - 1)], run.config.label_estimator
    # Of a validation image the true label is known; weak supervision (`predicted`) assumes only right or wrong.
    known = "predicted" if estimator == "predicted" else "true"
    full = descriptor_files.full_origin(run, networks[0].weights)
    method = describe(run, round, full, known)
    validation, described = _validation(run, round, networks, method, facts)
    _count(facts, validation.num_rows, validation.num_rows * method.fisher)
    directions = descriptor_files.fit_directions(run, round, described)
    reference = None
    if run.estimation.refers:
        z_ML = descriptor_files.read_grid(run, round) if run.estimation.grid > 1 else described.z
        reference = tuple(ray.put(x.numpy()) for x in _reference(run, z_ML, validation))
    origin = descriptor_files.stored_origin(run, full, directions)
    method = describe(run, round, origin, estimator, reference, directions)
    images = _pool(run, round, networks, method, facts, ("label",) if estimator == "true" else ())
    samples = run.config.monte_carlo.samples if estimator.startswith("mc-") else 0
    _count(facts, images * (1 + samples), images * (method.fisher + samples * run.classes))


def _reference(run: Run, z_ML: torch.Tensor, validation: pa.Table) -> tuple[torch.Tensor, torch.Tensor]:
    """What the label estimator takes from the validation set: its features and labels, or what was learnt from them."""
    labels_M = torch.from_numpy(validation["label"].to_numpy().copy())
    if run.config.label_estimator == "discriminant":
        return pfk.fit_discriminant(z_ML, labels_M, run.classes, run.config.discriminant.shrinkage)
    return z_ML, labels_M


def describe(
    run: Run, round: int, origin: Origin, estimator: str, reference: tuple[Maybe, Maybe] | None = None,
    directions: Directions | None = None,
) -> Describe:  # fmt: skip
    """How the run's images become descriptors, by this label estimator."""
    config = run.config
    needs_fisher = run.strategy.kind == "kernel" and run.kernel().name != "pcc"
    told = (config.vote, config.monte_carlo, run.seed("monte carlo", round), run.estimation.grid)
    return Describe(origin, tuple(config.model.taps), estimator, needs_fisher, *told, reference, directions)


def _gradients(run: Run, round: int, facts: dict) -> None:
    """The last layer's gradients: of the validation set and of what is labelled, if they are asked for; of the pool."""
    networks, given = [network_of(run, round - 1)], run.strategy.given
    method = Differentiate(descriptor_files.full_origin(run, networks[0].weights))
    if "misses" in given:
        validation, _ = _validation(run, round, networks, method, facts)
        _count(facts, validation.num_rows)
    labelled, files = run.labelled(round)["image_id"], run.round(round)
    if "labelled" in given and len(labelled):
        shards, keep = run.pool.locate(labelled.to_pylist()), ray.put(labelled.combine_chunks())
        decoder = Decoder(run.pool, run.image, keep=keep, rejects=files.rejects("labelled"))
        rejected = _extract_missing(run, "pool", shards, decoder, networks, method, files.labelled, facts)
        _count(facts, len(labelled) - rejected)
    _count(facts, _pool(run, round, networks, method, facts))


def _predictions(run: Run, round: int, facts: dict) -> None:
    """A score for each image of the pool, by all members of the ensemble and all passes of dropout."""
    seeds = tuple(run.seed("dropout", round, member) for member in range(run.members))
    method = Predict(run.strategy, run.passes.each, seeds)
    images = _pool(run, round, networks_of(run, round - 1), method, facts) * run.members
    _count(facts, images * run.passes.full)
    facts["after_dropout"] = images * run.passes.partial


def _discriminations(run: Run, round: int, facts: dict) -> None:
    """A score for each image of the pool, by what tells the labelled images from it."""
    # Here: the import of Ray Train takes most of a second, which would be all actors'.
    from raypfk.stages.adversary import train_adversary

    networks = [network_of(run, round - 1)]  # refused, if at all, before a long training
    trained = train_adversary(run, round)
    _count(facts, trained.pop("forward"), trained.pop("backward"))
    facts |= trained
    checkpoint, _ = adversary_of(run, round)
    method = Discriminate(run.strategy, run.config.vaal, ray.put(checkpoint), run.round(round).adversary)
    _count(facts, 2 * _pool(run, round, networks, method, facts))  # by the adversary, and by the network


_EXTRACT: dict[str, Callable[[Run, int, dict], None]] = {
    "kernel": _descriptors,
    "chance": _descriptors,
    "gradients": _gradients,
    "predictions": _predictions,
    "adversary": _discriminations,
}


def _count(facts: dict, forward: int, backward: int = 0) -> None:
    facts["forward"] += forward
    facts["backward"] += backward


def _validation(
    run: Run, round: int, networks: list[NetworkSpec], method: Describe | Differentiate, facts: dict
) -> tuple[pa.Table, Descriptors | LastLayer]:
    """validation.parquet: the vectors of the whole validation set, its misses, and the centers among them."""
    files, origin = run.round(round), method.origin
    if not store.exists(files.validation):
        decoder = Decoder(run.pool, run.image, ("image_id", "label"), rejects=files.rejects("validation"))
        shards = run.pool.shards("validation")
        rejected = _extract_missing(run, "validation", shards, decoder, networks, method, files.validation_parts, facts)
        table = pa.concat_tables(run.read(path) for path in store.paths(files.validation_parts, ".parquet"))
        if table.num_rows + rejected != run.pool.rows("validation"):
            expected = f"{run.pool.rows('validation')} images are there"
            raise RunError(f"{files.validation_parts}: {table.num_rows} of {expected}")
        table = _with_centers(run, round, table.combine_chunks(), origin)
        lease.check(run.uri)  # another driver may be at work on the parts that are deleted here
        descriptor_files.write(files.validation, table, run.id, origin)
        store.delete(files.validation_parts)
    table, described, _ = descriptor_files.read_validation(run, round, networks[0].weights)
    facts["validation_rejected"] = run.pool.rows("validation") - table.num_rows
    return table, described


def _with_centers(run: Run, round: int, table: pa.Table, origin: Origin) -> pa.Table:
    """The columns missed and center: which misses the selection must cover."""
    missed = table["predicted"].to_numpy() != table["label"].to_numpy()
    if not missed.any():
        progress.current().say("the model misses no validation image: all of them stand in as centers")
    table = table.append_column("missed", pa.array(missed))
    wanted = missed if missed.any() else ~missed
    if run.strategy.kind == "kernel":
        wanted = choose_centers(run, round, descriptor_files.decode(table, origin), wanted)
    schema = origin.schema(validation=True)
    return table.append_column("center", pa.array(wanted)).select(schema.names).cast(schema)


def choose_centers(run: Run, round: int, validation: Descriptors, wanted: np.ndarray) -> np.ndarray:
    """Mask (M,) of the centers, from that of the images to choose from: greedy k-center where they exceed P (4.4)."""
    index = np.flatnonzero(wanted)
    misses = validation.rows(torch.from_numpy(index))
    most = run.config.budget - run.elsewhere_budget
    chosen = pfk.greedy_k_center(run.kernel(), misses, most, run.seed("k-center", round))
    mask = np.zeros(len(wanted), bool)
    mask[index[chosen.numpy()]] = True
    return mask


def _pool(
    run: Run, round: int, networks: list[NetworkSpec], method: Method, facts: dict, columns: tuple[str, ...] = ()
) -> int:
    """The pool's files, but for what is labelled; how many images they hold. Notes how many were rejected."""
    files, labelled = run.round(round), run.labelled(round)["image_id"]
    drop, rejects = ray.put(labelled.combine_chunks()), files.rejects("pool")
    decoder = Decoder(run.pool, run.image, ("image_id", *columns), drop=drop, rejects=rejects)
    _extract_missing(run, "pool", run.pool.shards("pool"), decoder, networks, method, files.descriptors, facts)
    facts["rejected"] = _complete_empty(run, round, labelled.to_pylist(), method)
    return run.pool.rows("pool") - len(labelled) - facts["rejected"]


def _extract_missing(
    run: Run, split: str, shards: list[Shard], decoder: Decoder, networks: list[NetworkSpec], method: Method, out: str,
    facts: dict,
) -> int:  # fmt: skip
    """Extract those shards of a split that `out` has not got yet; how many images of all were rejected."""
    _try_again(run, split, decoder.rejects, out)
    there = set(store.names(out, ".parquet"))
    todo = [shard for shard in shards if shard.name not in there]
    actor = {"networks": networks, "method": method, "batch_size": run.config.model.batch_size}
    actor |= {"out": out, "run_id": run.id}
    start, began = time.time(), []
    with progress.current().bar(f"extract {split}", sum(s.rows for s in todo), "images") as advance:
        for done in through_actors(todo, decoder, Extractor, actor, run, split):
            advance(int(done["rows"].sum()))
            began.extend(done["began"])
    facts["startup_seconds"] += round(float(min(began)) - start, 3) if began else 0.0
    rejects = rejects_of(run, split, decoder.rejects)
    rejects.look()
    return rejects.count


def _try_again(run: Run, split: str, rejects: str, out: str) -> None:
    """Where an earlier try was stopped by its rejects, their shards are described again: the reason may be mended, and
    if it is not, the limit holds as it did."""
    try:
        rejects_of(run, split, rejects).look()
    except TooMany:
        progress.current().say(f"{split}: too many images were rejected before, trying theirs again")
        lease.check(run.uri)
        for name in store.names(rejects, ".parquet"):
            store.delete(store.join(out, name))
            store.delete(store.join(rejects, name))


def _complete_empty(run: Run, round: int, labelled: list[str], method: Method) -> int:
    """The rejects of the pool, counted. A shard without any image left gets an empty file: it is done.

    RunError for a shard that is not there though it has images: a worker wrote it where the driver does not see it.
    """
    files = run.round(round)
    there, folder = set(store.names(files.descriptors, ".parquet")), files.rejects("pool")
    rejects = {n: store.read_table(store.join(folder, n)).num_rows for n in store.names(folder, ".parquet")}
    known = run.pool.by_shard(labelled)
    for shard in run.pool.shards("pool"):
        if shard.name in there:
            continue
        left = shard.rows - len(known.get(shard, [])) - rejects.get(shard.name, 0)
        path = files.described(shard.name)
        if left:
            raise RunError(f"{path}: absent, though {left} images were described; do all nodes share this place?")
        method.write(path, method.schema.empty_table(), run.id)
    return sum(rejects.values())
