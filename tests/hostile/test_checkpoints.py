"""Checkpoints that run code, fill the memory, or are another network's."""

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from raypfk import models
from raypfk.models import LeNet
from tests.hostile import refusal

pytestmark = [pytest.mark.usefixtures("limits"), pytest.mark.filterwarnings("ignore:Detected pickle protocol")]
ORIGIN = "s3://bucket/model.pt"
GOOD = models.save(LeNet(), {"round": 1})


class Touch:
    """Leaves a mark where it is unpickled."""

    mark = "unset"

    def __reduce__(self):
        return (Path.touch, (Path(self.mark),))


def saved(value: object) -> bytes:
    sink = io.BytesIO()
    torch.save(value, sink)
    return sink.getvalue()


def weights(**changes: torch.Tensor) -> bytes:
    return saved({"weights": LeNet().state_dict() | {k.replace("__", "."): v for k, v in changes.items()}, "meta": {}})


def zipped(name: str, data: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO(GOOD)
    with zipfile.ZipFile(stream, "a", compression) as file:
        file.writestr(name, data)
    return stream.getvalue()


def damaged() -> bytes:
    """One byte of the pickled tree."""
    at = GOOD.index(b"weights")
    return GOOD[: at - 3] + b"\xff" + GOOD[at - 2 :]


NONE = r"expected a checkpoint of raypfk \(weights and plain values, no code\), found \d+ bytes that are not one "
OTHER = "weights of another network: "

BAD = {
    "empty": (lambda: b"", NONE),
    "text": (lambda: b"no checkpoint\n" * 99, NONE),
    "html": (lambda: b"<html>404</html>", NONE),
    "cut": (lambda: GOOD[:5000], NONE),
    "cut at its end": (lambda: GOOD[:-100], NONE),
    "damaged": (damaged, NONE),
    "zip of something else": (lambda: zip_of("a.txt", b"hello"), NONE),
    "pickle that runs code": (lambda: pickle.dumps(Touch()), NONE),
    "torch file that runs code": (lambda: saved({"weights": {}, "meta": Touch()}), NONE + r"\(UnpicklingError\)"),
    "torch file of old that runs code": (lambda: old({"weights": {}, "meta": Touch()}), NONE),
    "whole network": (lambda: saved(LeNet()), NONE),
    "zip bomb": (lambda: zipped("archive/bomb", bytes(1 << 26), zipfile.ZIP_DEFLATED), "they would unpack to 67"),
    "bare weights": (lambda: saved(LeNet().state_dict()), "expected .* with 'weights' and 'meta', found a dict of"),
    "a list": (lambda: saved([1, 2]), "expected .* with 'weights' and 'meta', found list"),
    "weights that are none": (lambda: saved({"weights": [], "meta": {}}), "'weights' or 'meta' that is not a dict"),
    "weights that are numbers": (lambda: saved({"weights": {"a": 1}, "meta": {}}), "weights that are not tensors"),
    "another network": (
        lambda: models.save(torch.nn.Linear(2, 2), {}), OTHER + "'conv1.0.weight' is none, expected 10 x 1 x 5 x 5 x",
    ),
    "other classes": (lambda: models.save(LeNet(classes=7), {}), OTHER + "'fc2.weight' is 7 x 50 .* expected 10 x"),
    "a weight too many": (lambda: weights(extra=torch.zeros(2)), OTHER + "'extra' is 2 x float32, expected none"),
    "other numbers": (
        lambda: weights(fc2__bias=torch.zeros(10, dtype=torch.int64)), OTHER + "'fc2.bias' is 10 x int64, .* float32",
    ),
    "sparse": (lambda: weights(fc2__bias=torch.zeros(10).to_sparse()), OTHER + "'fc2.bias' is 10 x torch.sparse_coo"),
    "one number spread over a terabyte": (
        lambda: weights(fc2__bias=torch.zeros(1).expand(1 << 38)), OTHER + "'fc2.bias' is 274877906944 x float32",
    ),
    "not a number": (lambda: weights(fc2__bias=torch.full((10,), torch.nan)), "found NaN or infinity in 'fc2.bias'"),
    "infinite": (lambda: weights(fc2__bias=torch.full((10,), torch.inf)), "found NaN or infinity in 'fc2.bias'"),
}  # fmt: skip


def zip_of(name: str, data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr(name, data)
    return stream.getvalue()


def old(value: object) -> bytes:
    sink = io.BytesIO()
    torch.save(value, sink, _use_new_zipfile_serialization=False)
    return sink.getvalue()


def restored(data: bytes) -> None:
    state, _ = models.load(data, ORIGIN)
    models.restore(LeNet(), state, ORIGIN)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_is_refused_and_runs_nothing(tmp_path, monkeypatch, name):
    """The file is named, the first weight that does not fit too; no mark is left by the code in it."""
    monkeypatch.setattr(Touch, "mark", str(tmp_path / "mark"))
    make, message = BAD[name]
    refusal(lambda: restored(make()), message, ORIGIN)
    assert not (tmp_path / "mark").exists()


def test_the_mark_is_left_where_code_is_run(tmp_path, monkeypatch):
    """The claim above can fail: plain pickle does run it."""
    monkeypatch.setattr(Touch, "mark", str(tmp_path / "mark"))
    pickle.loads(pickle.dumps(Touch()))
    assert (tmp_path / "mark").exists()


def test_an_interrupted_trainings_file_is_read_as_carefully(tmp_path, monkeypatch):
    """training.pt: the same loader, with its own names."""
    from raypfk.stages.train import KEPT

    monkeypatch.setattr(Touch, "mark", str(tmp_path / "mark"))
    refusal(lambda: models.unpack(saved(dict.fromkeys(KEPT, Touch())), ORIGIN, KEPT), NONE, ORIGIN)
    refusal(lambda: models.unpack(saved({"epochs": 3}), ORIGIN, KEPT), "with 'meta' and .*, found a dict of")
    assert not (tmp_path / "mark").exists()
