"""A run small enough for a test: bundled digits, LeNet on 16 x 16 pixels, seconds a round."""

from raypfk import config as configs
from raypfk import loop
from raypfk.config import Config
from raypfk.run import Run

TREE = {
    "data": {
        "source": "digits",
        "validation": 300,
        "test": 200,
        "imbalance": {"ratio": 5, "classes": [5, 6, 7, 8, 9]},
        "shard_rows": 128,
    },
    "image": {"size": 16, "resize": 16},
    "model": {"name": "lenet", "taps": ["conv1", "conv2", "fc1"], "batch_size": 64},
    "train": {"epochs": 4, "batch_size": 8, "lr": 0.05, "momentum": 0.5, "checkpoint_every": 1},
    "budget": 12,
    "rounds": 1,
    "top_k": 4,
    "seed": 1,
    "resources": {"extract_actors": 2},
}


def config(**changes) -> Config:
    """TREE with changes: `data__shard_rows=64` is data.shard_rows, `rounds=2` is rounds."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in TREE.items()}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            tree[section] = {**tree.get(section, {}), key: value}
        else:
            tree[section] = value
    return configs.validate(tree, "tiny")


def select(out, **changes) -> list[str]:
    """The images that round 1 of a run at `out` selects, in order; trains nothing."""
    settings = config(**changes)
    run = begin(settings, out)
    for stage in ("extract", "score", "acquire"):
        loop.do_stage(run, 1, stage)
    return run.read(run.round(1).selection)["image_id"].to_pylist()


def begin(settings: Config, out) -> Run:
    """An open run with its initial weights."""
    from raypfk.run import open_pool

    run = Run.create_or_open(settings, str(out), open_pool(settings, str(out)))
    loop.do_round(run, 0)
    return run


def labelled(folder, **changes) -> Run:
    """An open run at `folder`/run with round 1 labelled at random, ready to train."""
    run = begin(config(strategy="random", **changes), folder / "run")
    for stage in ("extract", "score", "acquire", "label"):
        loop.do_stage(run, 1, stage)
    return run
