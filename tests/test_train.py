"""Training: schedules, seeded data order, and the ways it can be fed and distributed."""

import io
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ray.train import WorkerGroupError

from raypfk import augment, models, store
from raypfk.config import TrainConfig
from raypfk.errors import RunError, UserError
from raypfk.run import Run, open_pool
from raypfk.stages import fitting, train
from raypfk.stages.evaluate import evaluate
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


def _weights(run, number=1):
    state, meta = models.load(store.read_bytes(run.round(number).checkpoint), "checkpoint")
    assert meta["round"] == number and meta["run"] == run.id
    return state


def test_an_interrupted_training_ends_with_the_same_weights(ray_session, tmp_path, monkeypatch):
    """Broken off in epoch 3 of 4, epoch 2 is kept; gone on with, it ends with the undisturbed weights, to the bit.

    With dropout, whose masks are an epoch's own; and with the test accuracy after all epochs, of which the last is what
    evaluation finds.
    """
    changes = {"train__checkpoint_every": 10, "train__monitor": True, "model__dropout": 0.5}
    run = tiny.labelled(tmp_path, **changes)
    facts = train.train(run, 1)
    monitored = facts["monitored"]
    assert facts["monitor_forward"] == 4 * 200 and facts["forward"] == facts["backward"] == 4 * 12
    undisturbed = _weights(run)
    confusion = np.array(evaluate(run, 1)["confusion"])
    assert len(monitored) == 4 and monitored[-1] == np.diag(confusion).sum() / 200
    store.delete(run.round(1).training)
    epochs, epoch = [], train._epoch

    def break_off(*args):
        loss = epoch(*args)
        if args[4] == 2:
            raise KeyboardInterrupt
        return loss

    monkeypatch.setattr(train, "_epoch", break_off)
    with pytest.raises(KeyboardInterrupt):
        train.train(run, 1)
    kept = torch.load(io.BytesIO(store.read_bytes(run.round(1).training)), weights_only=True)
    assert kept["epochs"] == 2
    monkeypatch.setattr(train, "_epoch", lambda *args: epochs.append(args[4]) or epoch(*args))
    torch.rand(1)  # whatever else is drawn
    assert train.train(run, 1)["monitored"] == monitored
    assert epochs == [2, 3]
    assert all(torch.equal(value, undisturbed[name]) for name, value in _weights(run).items())


@pytest.mark.parametrize("balanced", [False, True])
def test_streamed_training_sees_every_image(ray_session, tmp_path, monkeypatch, balanced):
    """More data than a worker holds: each epoch streams all labelled images from Ray Data, and learns; balanced, it
    shows as many, of every class alike."""
    monkeypatch.setattr(train, "HOLD_BYTES", 0)
    run = tiny.labelled(tmp_path, budget=60, train__epochs=15, train__balanced=balanced)
    seen, rare, epoch = [], [], train._epoch

    def counted(job, model, optimizer, batches, *rest):
        parts = list(batches)
        seen.append(sum(len(image) for image, _ in parts))
        rare.extend(bool(label >= 5) for _, labels in parts for label in labels)
        return epoch(job, model, optimizer, iter(parts), *rest)

    monkeypatch.setattr(train, "_epoch", counted)
    facts = train.train(run, 1)
    assert seen == [60] * 15 and facts["loss"] < 2.0
    bought = np.bincount(run.labelled(2)["label"], minlength=10)
    share = (bought[5:] > 0).sum() / (bought > 0).sum() if balanced else bought[5:].sum() / 60
    assert abs(np.mean(rare) - share) < (0.06 if balanced else 1e-9)


def test_balanced_drawing_gives_every_class_the_same_chance():
    """Of 900, 90 and 10 images a third each, with repetition; unbalanced every image once."""
    label = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([train._shuffled(label, True, generator) for _ in range(10)])
    assert len(drawn) == 10_000
    assert (label[drawn].bincount() / 10_000 - 1 / 3).abs().max() < 0.02
    assert train._shuffled(label, False, generator).sort().values.tolist() == list(range(1000))


def test_samples_around_an_image():
    """`jitter`: turned by up to 5 degrees either way and noise of the deviation asked for, an image's own samples."""
    generator = torch.Generator().manual_seed(0)
    image, salts = torch.rand(6, 1, 28, 28, generator=generator), torch.arange(6)
    sample = augment.jitter(image, salts, 3, 5.0, 0.1)
    assert torch.equal(sample[2:4], augment.jitter(image[2:4], salts[2:4], 3, 5.0, 0.1))
    assert not torch.equal(sample, augment.jitter(image, salts, 4, 5.0, 0.1))
    noise = augment.jitter(torch.zeros(50, 3, 32, 32), torch.arange(50), 0, 5.0, 0.1)
    assert abs(noise.mean()) < 1e-3 and abs(noise.std() - 0.1) < 1e-3
    bar = torch.zeros(400, 1, 101, 101)
    bar[:, :, 50, :] = 1.0  # where the bar meets the right edge, x = 50, tells its angle
    turned = augment.jitter(bar, torch.arange(400), 0, 5.0, 0.0)[:, 0, :, 90]
    rise = (turned * torch.arange(101.0)).sum(1) / turned.sum(1) - 50
    angle = (rise / 40).atan().rad2deg()
    assert 4.5 < angle.max() < 5.1 and -5.1 < angle.min() < -4.5 and abs(angle.mean()) < 0.5
    assert torch.allclose(augment.jitter(image, salts, 0, 0.0, 0.0), image, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "second"),
    [(2, 0), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(0, 2, marks=pytest.mark.slow)],
)
def test_a_training_goes_on_with_other_workers(ray_session, tmp_path, capsys, first, second):
    """Two Ray Train processes (gloo), half of each batch each, or one that has all of it, or the driver: epochs 3 and 4
    by others than 1 and 2 end with the weights of an undisturbed training. (pytest -m slow -k other_workers: the rest.)
    """
    begun = tiny.labelled(tmp_path / "two", budget=16, train__epochs=2, train__workers=first)
    train.train(begun, 1)
    one = tiny.labelled(tmp_path / "one", budget=16)
    assert train.train(one, 1)["epochs"] == 4
    going_on = begun.config.train.model_copy(update={"epochs": 4, "workers": second})
    train.train(replace(begun, config=begun.config.model_copy(update={"train": going_on})), 1)
    assert "training goes on after epoch 2 of 4" in capsys.readouterr().err
    start, end = _weights(begun, 0), _weights(begun)
    assert not any(torch.equal(value, start[name]) for name, value in end.items())
    assert all(torch.allclose(value, end[name], atol=1e-5) for name, value in _weights(one).items())


def test_a_diverged_training_is_an_error(ray_session, tmp_path):
    """A loss that is not finite stops the run and says so."""
    run = tiny.labelled(tmp_path, train__lr=1e30)
    with pytest.raises(RunError, match="training diverged in epoch"):
        train.train(run, 1)


@pytest.mark.parametrize("epochs", [0, 1])
def test_workers_may_be_lost_as_long_as_epochs_are_kept(epochs):
    """20 fits fail, each with an epoch kept: the training goes on; the first without one is an error."""
    kept = 0

    def fit():
        nonlocal kept
        if kept == 20:
            return SimpleNamespace(return_value="done")
        kept += epochs
        raise WorkerGroupError("lost", {0: RuntimeError("lost")})

    with nullcontext() if epochs else pytest.raises(WorkerGroupError):
        assert fitting._fit_while_it_goes_on(SimpleNamespace(fit=fit), lambda: f"epoch {kept} of 20") == "done"


def test_another_runs_weights_are_no_start(ray_session, tmp_path):
    """A checkpoint of another run in the place of the last round's is refused, naming both."""
    run, other = tiny.labelled(tmp_path / "one"), tiny.labelled(tmp_path / "other")
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


def test_pretraining_that_was_broken_off_at_its_very_end_goes_on(ray_session, tmp_path):
    """All was written but the marker: the same weights again, and no epoch more."""
    settings = {"epochs": 1, "batch_size": 50, "lr": 0.05}
    config = tiny.config(pretrain=settings)
    run = Run.create_or_open(config, str(tmp_path / "run"), open_pool(config, str(tmp_path / "run")))
    train.pretrain(run)
    first = _weights(run, 0)
    assert store.exists(run.round(0).training)
    train.pretrain(run)
    again = _weights(run, 0)
    assert all(torch.equal(first[name], again[name]) for name in first)
