import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from raypfk.pfk import (
    TapReader,
    features,
    fisher_scores,
    grid_features,
    lengths,
    reference,
    spatial_mean,
    standardise,
)
from raypfk.pfk.descriptors import class_scores, logit_slope

from .strategies import lengths as some_lengths
from .strategies import quick, seeds


class Residual(nn.Module):
    """Two parallel branches that join; the sum and the ReLU after it work in place."""

    def __init__(self, channels: int):
        super().__init__()
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        last = nn.Conv2d(channels, channels, 1)
        self.left = nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True), last)
        self.right = nn.Conv2d(channels, channels, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.left(x)
        y += self.right(x)
        y += x
        return self.relu(y)


def plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), 
        nn.Flatten(), nn.Linear(24, 8), nn.ReLU(inplace=True), nn.Linear(8, 5),
    )  # fmt: skip


def branched() -> nn.Sequential:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), Residual(4), *head)


NETS = [
    (plain, ["2", "4", "8"]),
    (plain, ["0", "1", "3", "9"]),
    (plain, ["8", "2"]),
    (branched, ["1", "2.left.0", "2.right", "2"]),
    (branched, ["2.left", "2.relu"]),
    (branched, ["2.left.2", "2.left"]),
]


def read(net: nn.Module, names, x, labels):
    reader = TapReader(net, names)
    logits, taps = reader(x)
    reader.close()
    return logits, taps, fisher_scores(logits, taps, labels)


@pytest.mark.parametrize("make, names", NETS)
@pytest.mark.parametrize("soft", [False, True])
def test_fisher_scores_are_plain_autograd_on_the_whole_network(make, names, soft):
    """Cut at the first tap, batched, among in-place layers: the scores of autograd, one image at a time."""
    torch.manual_seed(1)
    net, x = make(), torch.randn(5, 3, 9, 9)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    labels = torch.rand(5, 5).softmax(1) if soft else torch.tensor([0, 4, 2, 2, 1])
    expected = torch.tensor(reference.fisher_scores(net, names, x, labels), dtype=torch.float64)
    _, taps, scores = read(net, names, x, labels)
    assert scores.shape == (5, sum(lengths(taps))) and scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-7)
    assert expected.abs().sum() > 1e-3


@pytest.mark.parametrize("make, names", NETS)
def test_taps_and_logits_are_those_of_the_bare_network(make, names):
    """Reading changes neither the logits nor what a tap held when its module returned, in the order of names."""
    torch.manual_seed(2)
    net, x = make().eval(), torch.randn(3, 3, 9, 9)
    bare, held = net(x), {}
    hooks = []
    for name in names:
        keep = lambda m, i, o, name=name: held.update({name: o.detach().clone()})  # noqa: E731
        hooks.append(net.get_submodule(name).register_forward_hook(keep))
    net(x)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        logits, taps, _ = read(net, names, x, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(logits, bare)
    for name, tap in zip(names, taps, strict=True):
        torch.testing.assert_close(tap.detach(), held[name])
    torch.testing.assert_close(features(taps), torch.cat([spatial_mean(held[n]) for n in names], 1))


def test_scores_do_not_depend_on_batch_mates():
    """The loss is a sum and the net in eval mode: other images, or none, leave an image's score as it is."""
    torch.manual_seed(3)
    net, x, labels = branched(), torch.randn(6, 3, 9, 9), torch.tensor([0, 1, 2, 3, 4, 0])
    together = read(net, ["1", "2"], x, labels)[2]
    alone = read(net, ["1", "2"], x[2:3], labels[2:3])[2]
    mates = read(net, ["1", "2"], torch.cat([100 * torch.randn(3, 3, 9, 9), x[2:3]]), torch.tensor([1, 1, 1, 2]))[2]
    torch.testing.assert_close(together[2], alone[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(together[2], mates[3], rtol=1e-4, atol=1e-7)


def test_the_trunk_has_no_graph_and_no_parameter_gets_a_gradient():
    """Autograd records from the first tap on: the tap is a leaf, the trunk has no graph, p.grad stays None."""
    net, seen = plain(), []
    net[1].register_forward_hook(lambda m, i, o: seen.append(o.requires_grad))
    net[5].register_forward_hook(lambda m, i, o: seen.append(o.requires_grad))
    _, taps, _ = read(net.train(), ["2", "8"], torch.randn(2, 3, 9, 9, requires_grad=True), torch.tensor([0, 1]))
    assert seen == [False, True]
    assert taps[0].is_leaf and taps[0].grad_fn is None
    assert all(p.grad is None and not p.requires_grad for p in net.parameters()) and not net.training


def test_scores_in_inference_mode_are_the_same():
    """A caller's inference mode does not reach into the reader."""
    net, x, labels = plain(), torch.randn(2, 3, 9, 9), torch.tensor([0, 1])
    expected = read(net, ["4"], x, labels)[2]
    with torch.inference_mode():
        torch.testing.assert_close(read(net, ["4"], x.clone(), labels)[2], expected)


def test_a_shared_tensor_changed_in_place_leaves_the_record_alone():
    """A tap whose module hands on its input (Identity) is recorded as it was, whatever is done to the input later."""

    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.same, self.linear = nn.Identity(), nn.Linear(3, 2)

        def forward(self, x):
            x = x * 2
            y = self.same(x)
            x.zero_()
            return self.linear(y.relu_() + x)

    x = torch.randn(4, 3)
    assert torch.equal(TapReader(Shares(), ["same"])(x)[1][0], x * 2)


def test_a_tap_the_logits_do_not_depend_on_scores_zero():
    """An auxiliary branch, alone or beside a tap that matters, gives zeros and no error."""

    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.side, self.main = nn.Linear(3, 2), nn.Linear(3, 4)

        def forward(self, x):
            self.side(x)
            return self.main(x)

    x, labels = torch.randn(2, 3), torch.tensor([0, 1])
    assert torch.equal(read(Auxiliary(), ["side"], x, labels)[2], torch.zeros(2, 2))
    both = read(Auxiliary(), ["side", "main"], x, labels)[2]
    assert torch.equal(both[:, :2], torch.zeros(2, 2)) and both[:, 2:].abs().min() > 0


def test_names_that_cannot_be_read_are_refused():
    """Unknown, repeated, shared, unused and non-tensor taps each say what is wrong; the reader works again after."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.unused, self.pair, self.last = nn.ReLU(), nn.ReLU(), nn.LSTM(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            x, _ = self.pair(self.relu(self.relu(x)))
            return self.last(x)

    with pytest.raises(ValueError, match=r"'layer9' is not a submodule of Odd.*relu, unused, pair, last"):
        TapReader(Odd(), ["layer9"])
    with pytest.raises(ValueError, match="each named once"):
        TapReader(Odd(), ["last", "last"])
    for name, message in [("relu", "twice"), ("unused", "never called"), ("pair", "got tuple")]:
        reader = TapReader(Odd(), [name])
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                reader(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"expected logits \(N, D\), got \(3,\)"):
        TapReader(nn.Sequential(nn.Flatten(0)), ["0"])(torch.randn(3))


def test_a_closed_reader_leaves_the_network_as_it_was():
    """After close no hook is left, and before it the net works without the reader."""
    net = plain()
    reader = TapReader(net, ["2"])
    assert not net(torch.randn(1, 3, 9, 9)).requires_grad
    reader.close()
    assert all(not module._forward_hooks for module in net.modules())


@quick
@given(st.integers(0, 4), st.integers(1, 5), seeds, st.booleans())
def test_logit_slope_is_softmax_minus_label(n, d, seed, soft):
    """The closed form is the gradient of torch's cross-entropy."""
    torch.manual_seed(seed)
    logits = (3 * torch.randn(n, d, dtype=torch.float64)).requires_grad_()
    labels = torch.rand(n, d, dtype=torch.float64) if soft else torch.randint(d, (n,))
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits)
    torch.testing.assert_close(logit_slope(logits.detach(), labels), expected)


def test_a_confident_model_keeps_the_direction_of_its_scores():
    """At p = 1 - 2e-26 the slope still sums to zero: the predicted class gets minus what the others get."""
    slope = logit_slope(torch.tensor([[60.0, 0.0, 0.0]]), torch.tensor([0]))[0]
    assert slope[0] == -(slope[1] + slope[2]) < 0


BAD_LABELS = [torch.tensor([0, 5]), torch.tensor([-1, 0]), torch.zeros(3), torch.zeros(2), torch.zeros(2, 5).long()]


@pytest.mark.parametrize("labels", BAD_LABELS)
def test_labels_that_do_not_fit_are_refused(labels):
    """A class out of range, another number of labels, or a soft label of integers is an error, not a wrong gradient."""
    reader = TapReader(plain(), ["2"])
    with pytest.raises(ValueError, match="expected"):
        fisher_scores(*reader(torch.randn(2, 3, 9, 9)), labels)


def one_by_one(net: nn.Module, names, x, num_classes: int) -> torch.Tensor:
    """(N, D, L): `fisher_scores` of every class, each from a forward of its own."""
    return torch.stack([read(net, names, x, torch.full((len(x),), d))[2] for d in range(num_classes)], 1)


@pytest.mark.parametrize("make, names", NETS)
def test_class_scores_are_plain_autograd_for_every_class(make, names):
    """One batched backward gives what autograd gives, image by image and class by class."""
    torch.manual_seed(4)
    net, x = make(), torch.randn(3, 3, 9, 9)
    scores = class_scores(*TapReader(net, names)(x))
    each = [reference.fisher_scores(net, names, x, torch.full((3,), d)) for d in range(5)]
    expected = torch.tensor(each, dtype=torch.float64).transpose(0, 1)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(scores, one_by_one(net, names, x, 5), rtol=1e-4, atol=1e-7)
    assert expected.abs().sum() > 1e-3 and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("make, names", [NETS[0], NETS[3]])
def test_class_scores_of_a_confident_model_keep_their_direction(make, names):
    """Where softmax rounds to 1, the tiny scores of the predicted class are right to their own rounding."""
    torch.manual_seed(5)
    net, x = make(), torch.randn(3, 3, 9, 9)
    net[-1].bias.data[2] += 60
    assert (net.eval()(x).softmax(1)[:, 2] == 1).all()
    scores, expected = class_scores(*TapReader(net, names)(x)), one_by_one(net, names, x, 5)
    size = expected.abs().amax(2, keepdim=True)
    assert (size[:, 2] > 0).all() and (size[:, 2] < 1e-20).all()
    torch.testing.assert_close(scores / size, expected / size, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_class_scores_of_taps_that_do_not_matter_are_zeros(n):
    """A side branch scores zero for every class, alone or beside a tap that matters, for any number of images."""

    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.side, self.main = nn.Conv2d(3, 2, 1), nn.Linear(3, 4)

        def forward(self, x):
            self.side(x)
            return self.main(x.mean((2, 3)))

    x = torch.randn(n, 3, 5, 5)
    assert torch.equal(class_scores(*TapReader(Side(), ["side"])(x)), torch.zeros(n, 4, 2))
    with torch.inference_mode():
        net = Side()
        both = class_scores(*TapReader(net, ["side", "main"])(x))
    assert torch.equal(both[..., :2], torch.zeros(n, 4, 2)) and both.shape == (n, 4, 6)
    torch.testing.assert_close(both[..., 2:], one_by_one(net, ["main"], x, 4))


@quick
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 3), seeds)
def test_spatial_mean_is_the_mean_of_each_channel(shape, n, seed):
    """For vectors, tokens and maps of any shape, the loops' mean; half precision is summed in float32."""
    t = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    expected = torch.tensor(reference.spatial_mean(t), dtype=torch.float64).reshape(spatial_mean(t).shape)
    torch.testing.assert_close(spatial_mean(t).double(), expected, rtol=0, atol=1e-6)
    assert spatial_mean(t.half()).dtype == torch.float32
    assert lengths([t]) == (spatial_mean(t).shape[1],)


@quick
@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.integers(1, 5), seeds)
def test_grid_features_are_the_means_of_cells(n, channels, height, width, side, seed):
    """As the loops have them, channel by channel; beside them a vector tap as it is; side 1 is the spatial mean."""
    generator = torch.Generator().manual_seed(seed)
    taps = [torch.randn(n, channels, height, width, generator=generator), torch.randn(n, 3, generator=generator)]
    found, scales = grid_features(taps, side)
    cells = channels * min(side, height) * min(side, width)
    assert scales == (cells, 3) and found.shape == (n, cells + 3)
    expected = torch.tensor(reference.grid_means(taps[0], side), dtype=torch.float64).reshape(n, cells)
    torch.testing.assert_close(found[:, :cells].double(), expected, rtol=0, atol=1e-6)
    assert found[:, cells:].equal(taps[1])
    assert grid_features(taps, 1)[0].equal(features(taps)) and grid_features(taps, 1)[1] == lengths(taps)
    for i in range(n):  # whatever the batch mates
        assert grid_features([tap[i : i + 1] for tap in taps], side)[0].equal(found[i : i + 1])


def test_spatial_mean_refuses_other_shapes():
    """One or five dimensions have no agreed meaning."""
    for shape in [(3,), (1, 2, 3, 4, 5)]:
        with pytest.raises(ValueError, match="expected a tap of shape"):
            spatial_mean(torch.zeros(shape))


ODD = [0.0, 1e38, -3e38, 1e-38, -1e-45, 7.0, float("nan"), float("inf")]
NUMBERS = st.one_of(st.floats(-3, 3, width=32), st.sampled_from(ODD))


def rows_of(ls: tuple[int, ...]):
    return st.tuples(st.just(ls), st.lists(st.lists(NUMBERS, min_size=sum(ls), max_size=sum(ls)), max_size=4))


@quick
@given(some_lengths.flatmap(rows_of))
@example(((3, 2), [[1e38, -3e38, 2e38, 1e-45, 3e-45], [float("nan"), 1, 2, 1, 2]]))
def test_standardise_is_the_loops_result(case):
    """Any magnitude, constants, NaN and infinities: the float64 loops' numbers, never a NaN, each scale on its own."""
    ls, rows = case
    x = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), sum(ls))
    got = standardise(x, ls)
    expected = torch.tensor([reference.standardise(row, ls) for row in x.tolist()], dtype=torch.float64).reshape(
        x.shape
    )
    assert got.dtype == torch.float32 and got.isfinite().all()
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)
    for part in got.double().split(list(ls), 1):
        norm = part.norm(dim=1)
        assert (((norm - 1).abs() < 1e-6) | (norm == 0)).all() and (part.sum(1).abs() < 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -0.7, 0.0, 6e4])
def test_constant_vectors_become_zeros(dtype, value):
    """Where the mean of equal numbers rounds, nothing of that rounding is left; nor of a last digit's jitter."""
    for n in (1, 2, 3, 7, 1000):
        x = torch.full((2, n), value, dtype=dtype)
        x[1, 0] *= 1 + 2.0**-23
        assert torch.equal(standardise(x, (n,)), torch.zeros(2, n))


@pytest.mark.parametrize("factor", [1e-38, 1e-30, 1e30, 1e38])
def test_standardise_does_not_depend_on_magnitude_or_offset(factor):
    """A correlation knows neither scale nor shift: the smallest Fisher scores count as the largest do."""
    x = torch.rand(3, 8)
    torch.testing.assert_close(standardise(x * factor, (5, 3)), standardise(x, (5, 3)), rtol=0, atol=1e-5)
    torch.testing.assert_close(standardise(x + 3, (5, 3)), standardise(x, (5, 3)), rtol=0, atol=1e-5)


def test_standardise_refuses_lengths_that_do_not_add_up():
    """Scales must cover the vector, each with a number at least."""
    for ls in [(2, 2), (), (5, 0)]:
        with pytest.raises(ValueError, match="expected"):
            standardise(torch.zeros(1, 5), ls)


def test_pfk_imports_torch_alone():
    """The mathematics comes without Ray, Arrow, click or torchvision."""
    others = "('ray', 'pyarrow', 'click', 'torchvision')"
    code = f"import sys, raypfk.pfk; sys.exit(str([m for m in {others} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]", done.stderr
