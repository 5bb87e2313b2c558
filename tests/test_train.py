"""Training: schedules, seeded data order, and the ways it can be fed and distributed."""

import io

import pytest
import torch

from raypfk import augment, loop, models, store
from raypfk.config import TrainConfig
from raypfk.errors import RunError, UserError
from raypfk.stages import train
from tests import tiny


def test_step_decay():
    """The paper's 5.1: a tenth every 15 epochs, counted from the first."""
    config = TrainConfig(epochs=50, batch_size=25, lr=0.05, decay=0.1, decay_every=15)
    rates = [train.learning_rate(config, epoch) for epoch in (0, 14, 15, 29, 30, 45, 49)]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.0005, 0.00005, 0.00005])


def test_milestone_decay():
    """The paper's 5.3: a tenth at epochs 30, 50 and 57."""
    config = TrainConfig(epochs=60, batch_size=128, lr=0.1, decay=0.1, milestones=[30, 50, 57])
    rates = [train.learning_rate(config, epoch) for epoch in (0, 29, 30, 50, 57, 59)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.0001, 0.0001])


def test_rotations_are_quarter_turns():
    """Each image in 0, 90, 180 and 270 degrees, with the number of quarter turns as its class."""
    image = torch.arange(2 * 9).reshape(2, 1, 3, 3)
    turned, label = train.rotations(image)
    assert label.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for x, turns in zip(turned, label, strict=True):
        assert any(torch.equal(torch.rot90(x, -int(turns), (1, 2)), i) for i in image)


@pytest.mark.parametrize(("rows", "sizes"), [(0, []), (1, [1]), (25, [25]), (26, [26]), (27, [25, 2]), (51, [25, 26])])
def test_no_batch_of_one(rows, sizes):
    """Every row once; a single last row joins the batch before it."""
    batches = train._batches_of(torch.arange(rows), 25, 2)
    assert [len(b) for b in batches if len(b)] == sizes
    assert torch.cat([torch.empty(0, dtype=torch.int64), *batches]).tolist() == list(range(rows))


@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
def test_augmentation_is_seeded_and_keeps_shape(name):
    """The same generator state, the same pixels; uint8 and the shape stay."""
    image = torch.randint(0, 256, (16, 3, 24, 24), dtype=torch.uint8)
    one, two = (augment.AUGMENTATIONS[name](image, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == image.shape and one.dtype == torch.uint8
    assert torch.equal(one, image) == (name == "none")


def test_a_crop_of_a_flat_image_is_flat():
    """Random crops take pixels from inside the image only: no dark border."""
    image = torch.full((32, 3, 20, 20), 200, dtype=torch.uint8)
    assert (augment.crop_flip(image, torch.Generator().manual_seed(1)) == 200).all()


def _selected(tmp_path, **changes):
    """A run with round 1 labelled, ready to train."""
    run = tiny.begin(tiny.config(strategy="random", **changes), tmp_path / "run")
    for stage in ("extract", "score", "acquire", "label"):
        loop.do_stage(run, 1, stage)
    return run


def _weights(run, number=1):
    state, meta = models.load(store.read_bytes(run.round(number).checkpoint), "checkpoint")
    assert meta["round"] == number and meta["run"] == run.id
    return state


def test_an_interrupted_training_ends_with_the_same_weights(ray_session, tmp_path, monkeypatch):
    """Broken off after epoch 2 of 4 and begun again: weights equal to the bit to those of an undisturbed training."""
    run = _selected(tmp_path)
    train.train(run, 1)
    undisturbed = _weights(run)
    store.delete(run.round(1).training)
    keep = train._keep

    def break_off(job, net, optimizer, epochs, loss):
        keep(job, net, optimizer, epochs, loss)
        if epochs == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "_keep", break_off)
    with pytest.raises(KeyboardInterrupt):
        train.train(run, 1)
    monkeypatch.setattr(train, "_keep", keep)
    kept = torch.load(io.BytesIO(store.read_bytes(run.round(1).training)), weights_only=True)
    assert kept["epochs"] == 2
    epochs, epoch = [], train._epoch
    monkeypatch.setattr(train, "_epoch", lambda *args: epochs.append(args[4]) or epoch(*args))
    train.train(run, 1)
    assert epochs == [2, 3]
    assert all(torch.equal(value, undisturbed[name]) for name, value in _weights(run).items())


def test_streamed_training_sees_every_image(ray_session, tmp_path, monkeypatch):
    """More data than a worker holds: each epoch streams all labelled images from Ray Data, and learns."""
    monkeypatch.setattr(train, "HOLD_BYTES", 0)
    run = _selected(tmp_path, budget=60, train__epochs=15)
    seen, epoch = [], train._epoch

    def counted(job, model, optimizer, batches, *rest):
        parts = list(batches)
        seen.append(sum(len(image) for image, _ in parts))
        return epoch(job, model, optimizer, iter(parts), *rest)

    monkeypatch.setattr(train, "_epoch", counted)
    facts = train.train(run, 1)
    assert seen == [60] * 15 and facts["loss"] < 2.0


def test_two_workers_train(ray_session, tmp_path):
    """Two Ray Train processes (gloo), half of each batch each, end with the weights of one that has all of it."""
    changes = {"budget": 16, "train__epochs": 2}
    two = _selected(tmp_path / "two", train__workers=2, **changes)
    train.train(two, 1)
    one = _selected(tmp_path / "one", **changes)
    train.train(one, 1)
    start, end = _weights(two, 0), _weights(two)
    assert not any(torch.equal(value, start[name]) for name, value in end.items())
    assert all(torch.allclose(value, end[name], atol=1e-5) for name, value in _weights(one).items())


def test_a_diverged_training_is_an_error(ray_session, tmp_path):
    """A loss that is not finite stops the run and says so."""
    run = _selected(tmp_path, train__lr=1e30)
    with pytest.raises(RunError, match="training diverged in epoch"):
        train.train(run, 1)


def test_another_runs_weights_are_no_start(ray_session, tmp_path):
    """A checkpoint of another run in the place of the last round's is refused, naming both."""
    run, other = _selected(tmp_path / "one"), _selected(tmp_path / "other")
    store.write_bytes(run.round(0).checkpoint, store.read_bytes(other.round(0).checkpoint))
    with pytest.raises(UserError, match=f"{other.id}.*{run.id}"):
        train.train(run, 1)


def test_rotation_pretraining_keeps_all_layers_but_the_last(ray_session, tmp_path):
    """Round 0: the trunk differs from the random start, the last layer has as many outputs as classes."""
    settings = {"epochs": 2, "batch_size": 50, "lr": 0.05, "momentum": 0.5}
    plain = tiny.begin(tiny.config(), tmp_path / "plain")
    turned = tiny.begin(tiny.config(pretrain=settings), tmp_path / "turned")
    assert turned.done(0, "train")["forward"] == 2 * 4 * turned.pool.rows("pool")
    a, b = _weights(plain, 0), _weights(turned, 0)
    assert not torch.equal(a["conv1.0.weight"], b["conv1.0.weight"])
    assert b["fc2.weight"].shape == (10, 50)
