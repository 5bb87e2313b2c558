"""`vaal` through the stages: what its adversary learns from, and that nothing but the run decides what is selected."""

import io

import numpy as np
import pyarrow as pa
import pytest
import torch

from raypfk import loop, models, store
from raypfk.errors import UserError
from raypfk.run import Run
from raypfk.salts import salts
from raypfk.schema import SCORES
from raypfk.stages import adversary
from raypfk.stages.stream import Decoder, adversary_of
from raypfk.verify import verify
from tests import tiny

STEPS, BATCH = 6, 8
VAAL = {"steps": STEPS, "batch_size": BATCH, "width": 2, "latent": 4, "beta": 1e-3}
SETTINGS = {"strategy": "vaal", "vaal": VAAL, "train__epochs": 1, "rounds": 2}


@pytest.fixture(scope="module")
def run(ray_session, tmp_path_factory) -> Run:
    """Two rounds; nobody changes it but who trains its adversary again."""
    return loop.run(tiny.config(**SETTINGS), str(tmp_path_factory.mktemp("vaal") / "run"))


def selection(run: Run, number: int) -> list[str]:
    return run.read(run.round(number).selection)["image_id"].to_pylist()


def weights(run: Run) -> dict[str, torch.Tensor]:
    return models.load(adversary_of(run, 2)[0], "adversary")[0]


def test_two_rounds_verify(run):
    """12 images a round, none twice; the first by chance, as nothing is labelled, and `verify` finds nothing wrong."""
    labels = run.labelled(3)
    assert labels.num_rows == 24 and len(set(labels["image_id"].to_pylist())) == 24
    assert verify(run.uri) == []
    first = run.done(1, "extract")
    assert first["forward"] == 0 and "no image is labelled yet" in first["skipped"]
    assert not store.exists(run.round(1).adversary) and not store.exists(run.round(2).adversary_training)


def test_what_looks_least_labelled_is_selected(run):
    """The largest scores, which are the falling logits of the weights that are kept."""
    tables = [run.read(path, SCORES) for path in store.paths(run.round(2).descriptors, ".parquet")]
    table = pa.concat_tables(tables).combine_chunks()
    best = table.take(pa.array(np.argsort(-table["score"].to_numpy(), kind="stable")[:12]))
    assert len(np.unique(table["score"])) > 600 and best["image_id"].to_pylist() == selection(run, 2)
    shard = run.pool.shards("pool")[0]
    own = run.read(store.join(run.round(2).descriptors, shard.name))
    drop = run.labelled(2)["image_id"].combine_chunks()
    images = Decoder(run.pool, run.image, drop=drop)({"item": np.array([shard], object)})
    net = adversary.adversary(run.config.vaal, run.image)
    net.load_state_dict(weights(run))
    with torch.inference_mode():
        logits = net.eval()(adversary.normalise(torch.from_numpy(images["image"]), run.image))
    assert images["image_id"].tolist() == own["image_id"].to_pylist()
    torch.testing.assert_close(-logits, torch.from_numpy(own["score"].to_numpy().copy()), rtol=1e-4, atol=1e-5)


def test_passes_are_counted(run):
    """Of the adversary, of each image of a step's batches; of the pool, two: the adversary's and the network's."""
    facts, left = run.done(2, "extract"), run.pool.rows("pool") - 12
    assert facts["forward"] == STEPS * 3 * 2 * BATCH + 2 * left
    assert facts["backward"] == STEPS * 2 * 2 * BATCH
    assert all(np.isfinite(facts[name]) for name in ("vae_loss", "discriminator_loss"))


def test_the_selection_does_not_depend_on_actors_or_shards(run, tmp_path):
    """Another size of shards, and one actor for two: the same images of round 2 in the same order."""
    again = loop.run(
        tiny.config(**SETTINGS, data__shard_rows=100, resources={"extract_actors": 1}), str(tmp_path / "run")
    )
    assert selection(again, 2) == selection(run, 2)


def test_an_interrupted_training_ends_with_the_same_weights(run, monkeypatch):
    """Broken off in its third leg of two steps, two legs are kept; gone on with, it ends with the same weights."""
    undisturbed, legs, leg = weights(run), [], adversary._leg

    def break_off(*args):
        losses = leg(*args)
        if args[4].start == 4:
            raise KeyboardInterrupt
        return losses

    monkeypatch.setattr(adversary, "LEG", 2)
    monkeypatch.setattr(adversary, "_leg", break_off)
    store.delete(run.round(2).adversary)
    with pytest.raises(KeyboardInterrupt):
        adversary.train_adversary(run, 2)
    kept = torch.load(io.BytesIO(store.read_bytes(run.round(2).adversary_training)), weights_only=True)
    assert kept["steps"] == 4
    monkeypatch.setattr(adversary, "_leg", lambda *args: legs.append(args[4]) or leg(*args))
    adversary.train_adversary(run, 2)
    assert legs == [range(4, 6)]
    assert all(torch.equal(value, undisturbed[name]) for name, value in weights(run).items())
    adversary.train_adversary(run, 2)
    assert len(legs) == 1, "what is trained is not trained again"


def test_anothers_adversary_is_refused(run):
    """One of another round or run in its place: the error names both; `verify` says it too."""
    path = run.round(2).adversary
    good, _ = adversary_of(run, 2)
    net = adversary.adversary(run.config.vaal, run.image)
    try:
        for meta, said in (({"run": run.id, "round": 1}, "round is 1, expected 2"), ({}, f"run is None, .*{run.id}")):
            store.write_bytes(path, models.save(net, meta))
            with pytest.raises(UserError, match=said):
                adversary_of(run, 2)
        assert len(verify(run.uri)) == 1
    finally:
        store.write_bytes(path, good)


def test_a_share_of_the_images(run):
    """About as many as were asked for, the same in whatever order, by their ids alone."""
    shards, seen = run.pool.shards("pool"), []
    decoder = Decoder(run.pool, run.image, share=0.25, seed=3)
    for shard in shards[::-1]:
        seen += decoder({"item": np.array([shard], object)})["image_id"].tolist()
    ids = run.pool.ids("pool").to_pylist()
    assert set(seen) == {i for i, own in zip(ids, salts(ids, 3), strict=True) if own < 2**62}
    assert abs(len(seen) / len(ids) - 0.25) < 0.05


@pytest.mark.slow
def test_two_workers_train_one_adversary(run, tmp_path):
    """Half of each batch each: the losses are those of the whole batch, but for what batch normalisation sees.

    pytest -m slow tests/test_vaal.py
    """
    _, alone = adversary_of(run, 2)
    two = loop.run(tiny.config(**SETTINGS, train__workers=2), str(tmp_path / "run"))
    _, both = adversary_of(two, 2)
    assert both["vae_loss"] == pytest.approx(alone["vae_loss"], rel=0.2)
