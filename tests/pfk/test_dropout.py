import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import models as zoo
from torchvision.ops import StochasticDepth

from raypfk.pfk import McDropout, dropout

from .strategies import quick, seeds

PASSES = 3
shares = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])


def output(salt: int, number: int) -> int:
    """Output `number`, from 0, of the SplitMix64 that starts at `salt`, as published: 64-bit words without a sign."""
    x = (salt + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def mask(salt: int, number: int, layer: int, size: int, p: float) -> list[float]:
    """What one image's numbers are multiplied with, in one pass and layer."""
    own = output(output(salt, number), layer)
    draws = [((output(own, place) >> 12) + 0.5) / 2**52 for place in range(size)]
    return [1 / (1 - p) if u >= p else 0.0 for u in draws]


def linear(layer: nn.Linear, x: list[float]) -> list[float]:
    rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    return [math.fsum(w * v for w, v in zip(row, x, strict=True)) + bias for row, bias in rows]


def times(x: list[float], factors: list[float]) -> list[float]:
    return [v * factor for v, factor in zip(x, factors, strict=True)]


def random_salts(n: int, seed: int = 0) -> Tensor:
    salts = torch.randint(-(2**63), 2**63 - 1, (n,), generator=torch.Generator().manual_seed(seed))
    return torch.cat([salts, torch.tensor([0, -1, 2**63 - 1])])[-n:] if n else salts


def images(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))


def seeded(make, *args, **options) -> nn.Module:
    """A network whose running statistics are not those of a new one."""
    torch.manual_seed(1)
    net = make(*args, **options)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 2)
    return net


class Gate(nn.Module):
    """What it does depends on the data, so that no network with it can be traced; its dropout is never called."""

    def __init__(self, p: float):
        super().__init__()
        self.unused = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() < math.inf else -x


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class InPlace(nn.Module):
    """Values cross from the trunk to the tail that are worked on in place, split, or no tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.drop = nn.Linear(6, 6), nn.Linear(6, 3), nn.Dropout(0.5, inplace=True)
        self.tied = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        n, shape, parts = x.shape[0], x.shape, x.chunk(2, dim=1)
        x = self.first(x) @ self.tied
        y = x.relu()
        self.drop(x)
        y += x
        x.relu_()
        return self.last((y @ self.tied).view(shape) + x.view(n, -1) + parts[1].repeat(1, 2))


class Functional(nn.Module):
    def __init__(self, p: float):
        super().__init__()
        self.p, self.conv, self.last = p, nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout2d(F.relu(self.conv(x)), self.p, self.training)
        return self.last(F.dropout(x.mean((2, 3)), p=self.p, training=self.training))


def convolutional(p: float = 0.5) -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout2d(p)),
        nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True), StochasticDepth(0.5, "row")),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(p, inplace=True), nn.Linear(6, 3)),
    )


def tiny_densenet() -> nn.Module:
    return zoo.DenseNet(4, (2, 2), 8, drop_rate=0.3, num_classes=3)  # by the function F.dropout


NETWORKS = {
    "convolutional": (convolutional, (1, 8, 8)),
    "functional": (lambda: Functional(0.5), (1, 8, 8)),
    "in place": (InPlace, (6,)),
    "densenet": (tiny_densenet, (3, 32, 32)),
}
TORCHVISION = {
    "mobilenet": (lambda: zoo.mobilenet_v3_small(num_classes=3), (3, 32, 32)),
    "squeezenet": (lambda: zoo.squeezenet1_1(num_classes=3), (3, 32, 32)),
}


def parametrize(networks: dict):
    return pytest.mark.parametrize(("make", "shape"), networks.values(), ids=networks)


@quick
@given(st.integers(0, 5), st.integers(1, 4), shares, shares, st.integers(0, 40), seeds)
def test_every_pass_is_that_of_its_own_masks(n, passes, p, q, chunk, seed):
    """Each image and pass alone, in float64 loops with the masks applied by hand, whatever is run at once."""
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(p), nn.Linear(6, 5), nn.Dropout(q), nn.Linear(5, 2)))
    net, x, salts = net.double(), images(n, 4).double(), random_salts(n, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dropout.CHUNK, "cpu", chunk)
        logits = McDropout(net, passes)(x, salts)
    expected = []
    for number in range(passes):
        for image, salt in zip(x.tolist(), salts.tolist(), strict=True):
            hidden = linear(net[0], image)
            hidden = times(hidden, mask(salt, number, 0, 6, p)) if p else hidden
            hidden = linear(net[2], hidden)
            hidden = times(hidden, mask(salt, number, 1 if p else 0, 5, q)) if q else hidden
            expected.append(linear(net[4], hidden))
    expected = torch.tensor(expected, dtype=torch.float64).view(passes, n, 2)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "channels", "shape"),
    [(nn.Dropout1d, 5, (4,)), (nn.Dropout2d, 5, (2, 2)), (nn.Dropout3d, 5, (2, 1, 2)), (nn.Dropout, 20, ())],
)
def test_channels_are_dropped_whole(layer, channels, shape):
    """By Dropout1d to 3d all numbers of a channel together; by Dropout each by itself, wherever it stands."""
    salts = random_salts(4)
    logits = McDropout(nn.Sequential(layer(0.3), nn.Flatten()), PASSES)(torch.ones(4, 5, *(shape or (2, 2))), salts)
    for number in range(PASSES):
        for row, salt in zip(logits[number].tolist(), salts.tolist(), strict=True):
            kept = mask(salt, number, 0, channels, 0.3)
            assert row == pytest.approx([factor for factor in kept for _ in range(20 // channels)])


@parametrize(NETWORKS | TORCHVISION)
def test_passes_share_a_trunk_with_the_results_of_whole_passes(make, shape):
    """As if the whole network were run K times, which is what happens to one that cannot be traced."""
    net, x, salts = seeded(make), images(4, *shape), random_salts(4)
    mc, whole = McDropout(net, PASSES), McDropout(nn.Sequential(Gate(0.5), net), PASSES)
    assert (mc.active, mc.full, mc.partial) == (True, 1, PASSES)
    assert (whole.active, whole.full, whole.partial) == (True, PASSES, 0)
    logits, expected = mc(x, salts), whole(x, salts)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    assert len(logits.unique(dim=0)) == PASSES


def test_whole_passes_all_begin_with_the_image():
    """Also where a network works in place on what it is given."""
    net = nn.Sequential(Gate(0.5), Function(lambda x: x.mul_(2)), nn.Dropout(0.5))
    x = torch.ones(4, 5)
    assert set(McDropout(net, 7)(x, random_salts(4)).unique().tolist()) == {0.0, 4.0}
    assert (x == 1).all()


def count(net: nn.Module, *names: str) -> dict[str, int]:
    """How often each layer is called from now on."""
    calls = dict.fromkeys(names, 0)

    def hook(name: str):
        def called(*_):
            calls[name] += 1

        return called

    for name in names:
        net.get_submodule(name).register_forward_hook(hook(name))
    return calls


def test_the_trunk_is_run_once(monkeypatch):
    """What comes before the first dropout once for all passes, what comes after it once for each."""
    monkeypatch.setitem(dropout.CHUNK, "cpu", 1)
    net = seeded(convolutional)
    calls = count(net, "0.0", "0.2", "0.3", "1.0", "2.3")
    McDropout(net, 5)(images(2, 1, 8, 8), random_salts(2))
    assert calls == {"0.0": 1, "0.2": 1, "0.3": 5, "1.0": 5, "2.3": 5}


def test_passes_are_run_together(monkeypatch):
    """As many as their number of values allows, as memory must not grow with K: here 7 passes by threes."""
    monkeypatch.setitem(dropout.CHUNK, "cpu", 3 * 2 * 8)
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    calls = count(net, "0", "2")
    McDropout(net, 7)(images(2, 4), random_salts(2))
    assert calls == {"0": 1, "2": 3}


@parametrize(NETWORKS)
def test_logits_do_not_depend_on_batch_mates(make, shape):
    """To the last bit among other images; at another place in the batch only the libraries' rounding may differ."""
    mc, x, salts = McDropout(seeded(make), PASSES), images(6, *shape), random_salts(6)
    logits, order = mc(x, salts), torch.tensor([4, 2, 0, 5, 1, 3])
    assert torch.equal(mc(torch.cat([x[:2], -x[2:]]), torch.cat([salts[:2], ~salts[2:]]))[:, :2], logits[:, :2])
    torch.testing.assert_close(mc(x[order], salts[order]), logits[:, order], rtol=1e-5, atol=1e-5)


def test_logits_do_not_depend_on_the_number_of_passes():
    """More passes go on where fewer end."""
    net, x, salts = seeded(convolutional), images(4, 1, 8, 8), random_salts(4)
    few, many = McDropout(net, 2)(x, salts), McDropout(net, 20)(x, salts)
    torch.testing.assert_close(many[:2], few)


def test_masks_are_independent():
    """Between images, passes, layers and places each other mask is another, and one half is kept."""
    net = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Dropout(0.5))
    masks = McDropout(net, 20)(torch.ones(30, 40), torch.arange(30)).flatten(0, 1)
    first = McDropout(net[:2], 20)(torch.ones(30, 40), torch.arange(30)).flatten(0, 1)
    assert set(masks.unique().tolist()) == {0.0, 4.0} and set(first.unique().tolist()) == {0.0, 2.0}
    assert abs(float(masks.mean()) - 1) < 0.05 and abs(float(first.mean()) - 1) < 0.02
    correlations = torch.corrcoef(first).fill_diagonal_(0)
    assert correlations.abs().max() < 0.9 and abs(float(correlations.mean())) < 0.01
    assert torch.corrcoef(first.T).fill_diagonal_(0).abs().max() < 0.25


def test_the_mean_over_many_masks_is_the_plain_output():
    """Of a network that is linear after its dropout: what is kept is scaled for just that."""
    net, x = seeded(lambda: nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 3))), images(2, 4)
    logits = McDropout(net, 20_000)(x, random_salts(2))
    error = (logits.mean(0) - net(x)).abs() / (logits.std(0) / 20_000**0.5)
    assert error.max() < 4


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: nn.Sequential(Gate(0.0), net)], ids=["traced", "whole"])
def test_without_dropout_all_passes_are_one(wrap):
    """p = 0, stochastic depth and batch norm draw nothing: one pass that stands for K."""
    net, x = wrap(seeded(lambda: convolutional(p=0.0))).train(), images(4, 1, 8, 8)
    mc, calls = McDropout(net, 7), count(net, "1")
    logits = mc(x, random_salts(4))
    assert (mc.active, mc.full, mc.partial, calls["1"]) == (False, 1, 0, 1)
    assert not net.training
    assert torch.equal(logits, net(x).expand(7, 4, 3))


@pytest.mark.parametrize("make", [convolutional, tiny_densenet, lambda: convolutional(p=0.0)])
def test_no_images_have_no_logits(make):
    """Of the shape that many have."""
    net = make()
    assert McDropout(net, 2)(images(0, next(net.parameters()).shape[1], 32, 32), random_salts(0)).shape == (2, 0, 3)


def test_nothing_else_is_touched():
    """Not the images, torch's random state or gradients; also where autograd is off for good."""
    net, x, salts = seeded(InPlace), images(4, 6), random_salts(4)
    before, state = x.clone(), torch.get_rng_state()
    mc = McDropout(net, PASSES)
    logits = mc(x.requires_grad_() * 1, salts)
    assert torch.equal(x, before) and torch.equal(state, torch.get_rng_state())
    assert not logits.requires_grad
    with torch.inference_mode():
        assert torch.equal(mc(before, salts), logits)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.AlphaDropout(0.1), "AlphaDropout"),
        (nn.FeatureAlphaDropout(0.1), "FeatureAlphaDropout"),
        (nn.MultiheadAttention(4, 2, dropout=0.1), "MultiheadAttention"),
        (nn.LSTM(4, 4, 2, dropout=0.1), "LSTM"),
    ],
)
def test_other_kinds_of_dropout_are_refused(layer, name):
    """By their place and name; where they drop nothing they may stay."""
    with pytest.raises(ValueError, match=f"that of 1.0, {name}"):
        McDropout(nn.Sequential(nn.Linear(4, 4), nn.Sequential(layer)), 2)
    for part in layer.modules():
        part.p = part.dropout = 0.0
    McDropout(nn.Sequential(nn.Linear(4, 4), nn.Sequential(layer)), 2)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: F.alpha_dropout(x, 0.1), "expected dropout of numbers or channels, got alpha_dropout"),
        (lambda x: F.dropout(x.T, 0.1).T, r"expected dropout of an input \(2, \.\.\.\), got \(4, 2\)"),
        (lambda x: F.dropout(x)[..., None], r"expected logits \(2, D\), got \(2, 4, 1\)"),
        (lambda x: F.dropout(x).sum(0, keepdim=True), r"expected logits \(2, D\), got \(1, 4\)"),
        (lambda x: (F.dropout(x), x), r"expected logits \(2, D\), got tuple"),
        (lambda x: x[..., None], r"expected logits \(2, D\), got \(2, 4, 1\)"),
    ],
)
def test_a_network_of_another_kind_is_refused(function, message):
    """Masks that would not be the image's own, and what are no logits."""
    mc = McDropout(Function(function), 2)
    with pytest.raises(ValueError, match=message):
        mc(images(2, 4), random_salts(2))


def test_wrong_arguments_are_refused():
    """Salts that are not one int64 an image; no passes."""
    mc = McDropout(nn.Sequential(nn.Dropout(), nn.Linear(4, 3)), 2)
    for salts in (random_salts(3), random_salts(2).double(), random_salts(2)[:, None]):
        with pytest.raises(ValueError, match=r"expected salts \(2,\) int64, got"):
            mc(images(2, 4), salts)
    with pytest.raises(ValueError, match="expected 1 or more passes, got 0"):
        McDropout(nn.Linear(4, 3), 0)
