"""Extract: one forward and one partial backward pass per image; descriptor shards out (Algorithm 1, lines 3 to 8).

The validation set first: its misses become the centers, and its features the reference of the label estimator.
Then the pool, without the images that are labelled already.
"""

import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray
import torch

from raypfk import descriptor_files, lease, pfk, progress, store
from raypfk.descriptor_files import Directions, Origin
from raypfk.errors import RunError
from raypfk.pfk import Descriptors, Kernel, TapReader
from raypfk.rejects import TooMany
from raypfk.run import ImageSpec, Run
from raypfk.schema import descriptors as descriptor_schema
from raypfk.stages.stream import Decoder, Maybe, NetworkSpec, batches, network_of, rejects_of, through_actors, value


@dataclass(frozen=True)
class Recipe:
    """What makes an image a descriptor, beside the network.

    estimator: "true", "predicted" or "neighbour". fisher: False leaves the Fisher scores zero and costs no backward.
    reference: for "neighbour", the validation set's features (M, L) float32 and labels (M,) int64.
    directions: if given, descriptors are projected on them once the label is estimated.
    """

    taps: tuple[str, ...]
    estimator: str
    fisher: bool
    batch_size: int
    image: ImageSpec
    reference: tuple[Maybe, Maybe] | None = None
    directions: Directions | None = None


class Describer:
    """Actor: a shard's decoded images in, one descriptor shard of the same name written to `out` as `origin` says."""

    def __init__(self, network: NetworkSpec, recipe: Recipe, out: str, run_id: str, origin: Origin):
        net, self.device = network.load()
        self.reader = TapReader(net, recipe.taps)
        self.recipe, self.out, self.run_id, self.origin = recipe, out, run_id, origin
        if recipe.reference:
            self.reference = tuple(torch.from_numpy(value(held).copy()).to(self.device) for held in recipe.reference)

    def __call__(self, shard: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        began, rows = time.time(), len(shard["image"])
        if not rows:
            return {"rows": np.empty(0, np.int64), "began": np.empty(0)}
        parts, start = [], 0
        for count, x in batches(shard["image"], self.recipe.image, self.recipe.batch_size, self.device):
            labels = shard["label"][start : start + count] if "label" in shard else None
            parts.append(self._describe(x, count, labels))
            start += count
        z, g, predicted, estimated = (np.concatenate(column) for column in zip(*parts, strict=True))
        columns = {
            "image_id": pa.array(shard["image_id"], pa.string()),
            "predicted": predicted,
            "estimated_label": estimated,
        }
        if "label" in shard:
            columns["label"] = shard["label"]
        described = Descriptors(torch.from_numpy(z), torch.from_numpy(g))
        table = descriptor_files.encode(columns, described, self.origin)
        descriptor_files.write(store.join(self.out, shard["shard"][0]), table, self.run_id, self.origin)
        return {"rows": np.array([rows]), "began": np.array([began])}

    def _describe(self, x: torch.Tensor, count: int, labels: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """Features and Fisher scores (count, L or fewer), predicted and estimated (count,) of one padded batch."""
        recipe = self.recipe
        logits, taps = self.reader(x)
        lengths = pfk.lengths(taps)
        z = pfk.standardise(pfk.features(taps), lengths)
        predicted = pfk.predicted(logits)
        estimated = predicted
        if recipe.estimator == "true":
            estimated = torch.zeros_like(predicted)
            estimated[:count] = torch.from_numpy(labels.copy()).to(self.device)
        elif recipe.estimator == "neighbour":
            estimated, _ = pfk.neighbour(z, *self.reference, Kernel("pcc", lengths, "length"))
        if recipe.fisher:
            g = pfk.standardise(pfk.fisher_scores(logits, taps, estimated), lengths)
        else:
            g = torch.zeros_like(z)
        if recipe.directions:
            z, g = recipe.directions.project(Descriptors(z, g))
        return tuple(t[:count].detach().cpu().numpy() for t in (z, g, predicted, estimated))


def extract(run: Run, round: int) -> dict:
    """Write round `round`'s validation.parquet and descriptors/. Shards that are there already are not done again."""
    if run.config.strategy == "random":
        return {"skipped": "the strategy needs no descriptors", "forward": 0, "backward": 0}
    network = network_of(run, round - 1)
    facts = {"forward": 0, "backward": 0, "startup_seconds": 0.0}
    validation, described, full = _validation(run, round, network, facts)
    directions = descriptor_files.fit_directions(run, round, described)
    reference = None
    if run.config.label_estimator == "neighbour":
        reference = ray.put(described.z.numpy()), ray.put(validation["label"].to_numpy())
    labelled, rejects = run.labelled(round)["image_id"], run.round(round).rejects("pool")
    columns = ("image_id", "label") if run.config.label_estimator == "true" else ("image_id",)
    decoder = Decoder(run.pool, run.image, columns, drop=ray.put(labelled.combine_chunks()), rejects=rejects)
    recipe = recipe_for(run, run.config.label_estimator, reference, directions)
    origin = descriptor_files.stored_origin(run, full, directions)
    _describe_split(run, "pool", decoder, network, recipe, run.round(round).descriptors, origin, facts)
    rejected = _complete_empty(run, round, labelled.to_pylist(), origin)
    facts["forward"] = validation.num_rows + run.pool.rows("pool") - len(labelled) - rejected
    facts["backward"] = facts["forward"] if recipe.fisher else 0
    return facts | {"rejected": rejected}


def recipe_for(run: Run, estimator: str, reference=None, directions: Directions | None = None) -> Recipe:
    model, needs_fisher = run.config.model, run.config.strategy != "pcc"
    return Recipe(tuple(model.taps), estimator, needs_fisher, model.batch_size, run.image, reference, directions)


def _validation(run: Run, round: int, network: NetworkSpec, facts: dict) -> tuple[pa.Table, Descriptors, Origin]:
    """validation.parquet: descriptors of the whole validation set, its misses, and the centers among them."""
    files = run.round(round)
    if store.exists(files.validation):
        return descriptor_files.read_validation(run, round, network.weights)
    # Of a validation image the true label is known; weak supervision (`predicted`) assumes only right or wrong.
    estimator = "predicted" if run.config.label_estimator == "predicted" else "true"
    decoder = Decoder(run.pool, run.image, ("image_id", "label"), rejects=files.rejects("validation"))
    recipe, origin = recipe_for(run, estimator), descriptor_files.full_origin(run, network.weights)
    _describe_split(run, "validation", decoder, network, recipe, files.validation_parts, origin, facts)
    table = pa.concat_tables(run.read(path) for path in store.paths(files.validation_parts, ".parquet"))
    rejected = sum(store.read_table(p).num_rows for p in store.paths(files.rejects("validation"), ".parquet"))
    if table.num_rows + rejected != run.pool.rows("validation"):
        raise RunError(f"{files.validation_parts}: {table.num_rows} of {run.pool.rows('validation')} images are there")
    table = table.combine_chunks()
    missed = table["predicted"].to_numpy() != table["label"].to_numpy()
    if not missed.any():
        progress.current().say("the model misses no validation image: all of them stand in as centers")
    table = table.append_column("missed", pa.array(missed))
    centers = choose_centers(run, round, descriptor_files.decode(table, origin), missed)
    table = table.append_column("center", pa.array(centers))
    table = table.cast(descriptor_schema(sum(run.lengths), validation=True))
    lease.check(run.uri)  # another driver may be at work on the parts that are deleted here
    descriptor_files.write(files.validation, table, run.id, origin)
    store.delete(files.validation_parts)
    return descriptor_files.read_validation(run, round, network.weights)


def choose_centers(run: Run, round: int, validation: Descriptors, missed: np.ndarray) -> np.ndarray:
    """Mask (M,) of the centers: the misses (all, if there are none); greedy k-center where they exceed P (4.4)."""
    wanted = np.flatnonzero(missed) if missed.any() else np.arange(len(missed))
    misses = validation.rows(torch.from_numpy(wanted))
    chosen = pfk.greedy_k_center(run.kernel(), misses, run.config.budget, run.seed("k-center", round))
    mask = np.zeros(len(missed), bool)
    mask[wanted[chosen.numpy()]] = True
    return mask


def _describe_split(
    run, split: str, decoder: Decoder, network, recipe: Recipe, out: str, origin: Origin, facts: dict
) -> None:
    """Describe the shards of a split that `out` has not got yet."""
    _try_again(run, split, decoder.rejects, out)
    there = set(store.names(out, ".parquet"))
    todo = [shard for shard in run.pool.shards(split) if shard.name not in there]
    actor = {"network": network, "recipe": recipe, "out": out, "run_id": run.id, "origin": origin}
    start, began = time.time(), []
    with progress.current().bar(f"extract {split}", sum(s.rows for s in todo), "images") as advance:
        for done in through_actors(todo, decoder, Describer, actor, run, split):
            advance(int(done["rows"].sum()))
            began.extend(done["began"])
    facts["startup_seconds"] += round(float(min(began)) - start, 3) if began else 0.0


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


def _complete_empty(run: Run, round: int, labelled: list[str], origin: Origin) -> int:
    """The rejects of the pool, counted. A shard without any image left gets an empty descriptor shard: it is done.

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
        path = store.join(files.descriptors, shard.name)
        if left:
            raise RunError(f"{path}: absent, though {left} images were described; do all nodes share this place?")
        empty = descriptor_schema(sum(origin.lengths), origin.dtype).empty_table()
        descriptor_files.write(path, empty, run.id, origin)
    return sum(rejects.values())
