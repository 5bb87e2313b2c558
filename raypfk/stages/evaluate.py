"""Evaluate: accuracy of the LAST epoch on the test set, per class, and the confusion matrix; metrics.json."""

import numpy as np
import torch

from raypfk import progress, store
from raypfk.run import Run
from raypfk.stages.quality import QUALITY, quality, rare_classes, share
from raypfk.stages.stream import Decoder, NetworkSpec, batches, network_of, through_actors

PASSES = ("forward", "backward", "after_dropout")


class Evaluator:
    """Actor: a shard's decoded images in, true and predicted classes out."""

    def __init__(self, network: NetworkSpec, batch_size: int):
        self.net, self.device = network.load()
        self.image, self.batch_size = network.image, batch_size

    def __call__(self, shard: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            predicted = [
                self.net(x)[:count].argmax(1).cpu().numpy()
                for count, x in batches(shard["image"], self.image, self.batch_size, self.device)
            ]
        return {"label": shard["label"], "predicted": np.concatenate([np.empty(0, np.int64), *predicted])}


def evaluate(run: Run, round: int) -> dict:
    """Count the test set's confusion matrix with round `round`'s checkpoint (rows: true class, columns: predicted)."""
    shards = run.pool.shards("test")
    decoder = Decoder(run.pool, run.image, ("image_id", "label"), rejects=run.round(round).rejects("test"))
    actor = {"network": network_of(run, round), "batch_size": run.config.model.batch_size}
    confusion = np.zeros((run.classes, run.classes), np.int64)
    with progress.current().bar("evaluate", sum(s.rows for s in shards), "images") as advance:
        for done in through_actors(shards, decoder, Evaluator, actor, run, "test"):
            np.add.at(confusion, (done["label"], done["predicted"]), 1)
            advance(len(done["label"]))
    tested = int(confusion.sum())
    facts = {"confusion": confusion.tolist(), "tested": tested, "forward": tested}
    facts["rejected"] = run.pool.rows("test") - tested
    return facts | quality(run, round)


def write_metrics(run: Run, round: int, markers: dict[str, dict]) -> None:
    """metrics.json of a round from what its stages left. Undefined accuracies (no test image of a class) are null."""
    confusion, rare = np.array(markers["evaluate"]["confusion"]), rare_classes(run)
    right, tested = np.diag(confusion), confusion.sum(1)
    store.write_json(
        run.round(round).metrics,
        {
            "round": round,
            "labelled": run.labelled(round + 1).num_rows,
            "test_accuracy": share(right.sum(), tested.sum()),
            "minority_accuracy": share(right[rare].sum(), tested[rare].sum()),
            "per_class_accuracy": [share(h, n) for h, n in zip(right, tested, strict=True)],
            **{name: markers["evaluate"].get(name) for name in QUALITY},
            "confusion": confusion.tolist(),
            "seconds": {stage: facts["seconds"] for stage, facts in markers.items()},
            **{p: sum(facts.get(p, 0) for facts in markers.values()) for p in PASSES},
            "monitor_forward": markers["train"].get("monitor_forward", 0),
            "train_loss": markers["train"]["loss"],
            "monitored": markers["train"].get("monitored"),
        },
    )
