"""configs/svhn.yaml and configs/imagenet.yaml, made small: one whole round on generated files of the true formats."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from raypfk import config, images, loop, store
from raypfk.run import Run
from raypfk.schema import LABELS, SELECTION
from raypfk.stages import pool, pool_files
from tests import test_sources
from tests.test_ilsvrc import SYNSETS, colour, write_ilsvrc
from tests.test_sources import write_svhn

pytestmark = pytest.mark.usefixtures("ray_session")

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = (
    "rounds=1", "pretrain.epochs=1", "train.epochs=1", "pretrain.workers=0", "train.workers=0",
    "pretrain.gpus_per_worker=0", "train.gpus_per_worker=0", "resources.extract_actors=1", "resources.extract_gpus=0",
    "resources.score_actors=1", "resources.score_gpus=0", "resources.score_threads=1",
)  # fmt: skip


def run(name: str, folder: Path, *assignments: str) -> Run:
    """The shipped configuration with SMALL and `assignments`, run on the files in `folder`/in."""
    given = (f"data.root={folder / 'in'}", *SMALL, *assignments)
    return loop.run(config.load(str(CONFIGS / name), {}, config.assigned(given)), str(folder / "run"))


def assert_whole(done: Run, shown: Callable[[Tensor], int], sizes: dict[str, int], budget: int) -> None:
    """One round was done: budget, labels, test set and classes are as they must be.

    shown: the class that an image shows. sizes: images of each split.
    """
    labels = {}
    for split, size in sizes.items():
        tables = [done.pool.read_shard(shard) for shard in done.pool.shards(split)]
        pixels = [images.decode(data, None, 10**6) for table in tables for data in done.pool.images(table)]
        labels[split] = [label for table in tables for label in table["label"].to_pylist()]
        assert [shown(image) for image in pixels] == labels[split] and len(pixels) == size
    files = done.round(1)
    selection = done.read(files.selection, SELECTION)["image_id"].to_pylist()
    assert len(selection) == len(set(selection)) == budget
    bought = done.read(files.labels, LABELS).to_pydict()
    assert dict(zip(bought["image_id"], bought["label"], strict=True)) == done.pool.labels_of(selection)
    metrics = store.read_json(files.metrics)
    assert metrics["labelled"] == budget
    classes = len(done.pool.classes)
    assert np.sum(metrics["confusion"], axis=1).tolist() == np.bincount(labels["test"], minlength=classes).tolist()


def as_svhn(plan: pool_files.Plan) -> pool_files.Written:
    """Task: as the pool's own, in a process that takes the generated files for SVHN's."""
    with pytest.MonkeyPatch.context() as patch:
        for path in Path(plan.source.root).glob("*.mat"):
            test_sources.trust(patch, path.stem.removesuffix("_32x32"), path)
        return pool_files.write(plan)


def test_svhn(tmp_path, monkeypatch):
    """train and extra are the pool, digits 5 to 9 rare in it; the test set is counted whole."""
    write_svhn(tmp_path / "in", monkeypatch, train=200, extra=100, test=50)
    monkeypatch.setattr(pool, "write", as_svhn)
    done = run("svhn.yaml", tmp_path, "data.validation=100", "budget=10")
    assert done.pool.classes == list("0123456789")
    histogram = done.pool.manifest["splits"]["pool"]["label_histogram"]
    assert [histogram[digit] for digit in "01234"] == [20] * 5 and sum(histogram.values()) == 101
    sizes = {"pool": 101, "validation": 100, "test": 50}
    assert_whole(done, lambda image: int(image[0, 0, 0]) // 20 % 10, sizes, budget=10)


@pytest.mark.parametrize("by_reference", [False, True])
def test_imagenet(by_reference, tmp_path):
    """train is the pool, half of the synsets rare in it; val, flat as its tar is, is the test set, counted whole."""
    write_ilsvrc(tmp_path / "in", train=12, val=20)
    small = ("data.validation=20", "data.imbalance={ratio: 10, random_classes: 5}", "image.resize=36", "image.size=32")
    done = run("imagenet.yaml", tmp_path, *small, f"data.by_reference={by_reference}", "budget=8")
    assert done.pool.classes == SYNSETS and done.pool.by_reference == by_reference
    palette = np.array([colour(label) for label in range(len(SYNSETS))])

    def shown(image: Tensor) -> int:
        return int(np.abs(palette - image.numpy().mean((1, 2))).sum(1).argmin())

    assert_whole(done, shown, {"pool": 55, "validation": 20, "test": 20}, budget=8)
