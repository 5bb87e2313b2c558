"""Networks, their taps and their checkpoints."""

import io
import pickle

import pytest
import torch
from torch import nn
from torchvision import models as zoo

from raypfk import models
from raypfk.errors import UserError
from raypfk.pfk import McDropout

PAPER_LENET_TAPS = ("conv1", "conv2", "fc1")
META = {"name": "lenet", "channels": 1, "classes": 10, "size": 28, "round": 3, "run": "9f" * 16}


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_lenet_is_the_papers():
    """Layer for layer the network of section 5.1: 21,840 parameters, descriptor lengths 10 + 20 + 50 = 80."""
    net = models.build("lenet", 1, 10, 28, seed=0)
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items() if name.endswith("weight")}
    assert shapes == {
        "conv1.0.weight": (10, 1, 5, 5),
        "conv2.0.weight": (20, 10, 5, 5),
        "fc1.0.weight": (50, 320),
        "fc2.weight": (10, 50),
    }
    assert sum(p.numel() for p in net.parameters()) == 21_840
    assert models.check_taps(net, PAPER_LENET_TAPS, 1, 28) == (10, 20, 50)
    assert models.check_taps(net, ["conv2"], 1, 28) == (20,)


def test_lenet_tap_reads_the_block_after_pooling_and_relu():
    """conv1's and conv2's outputs are 12x12 and 4x4 and hold no negative value."""
    net = models.build("lenet", 1, 10, 28, seed=0)
    seen = []
    for name in PAPER_LENET_TAPS:
        net.get_submodule(name).register_forward_hook(lambda _m, _i, out: seen.append(out))
    net(torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    assert [tuple(out.shape) for out in seen] == [(2, 10, 12, 12), (2, 20, 4, 4), (2, 50)]
    assert all(out.min() >= 0 and out.max() > 0 for out in seen)


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (17, 3), (32, 3), (64, 1)])
def test_lenet_takes_other_sizes(size, channels):
    """From 16 pixels on, the first linear layer follows the image's size."""
    net = models.build("lenet", channels, 4, size, seed=0)
    assert net(torch.zeros(2, channels, size, size)).shape == (2, 4)


@pytest.mark.parametrize("size", [8, 15])
def test_lenet_refuses_images_too_small(size):
    """The message names the smallest size and the setting that helps."""
    with pytest.raises(UserError, match=rf"16x16 pixels or more, found {size}x{size}.*image\.size.*image\.resize"):
        models.build("lenet", 1, 10, size, seed=0)


@pytest.mark.parametrize("name", ["resnet10", "resnet18"])
def test_resnet_taps(name):
    """The four stages of a ResNet give 64, 128, 256 and 512 values; layer3 and layer4 are the paper's 768."""
    net = models.build(name, 3, 10, 32, seed=0)
    assert models.check_taps(net, ["layer1", "layer2", "layer3", "layer4"], 3, 32) == (64, 128, 256, 512)
    blocks = [len(getattr(net, f"layer{i}")) for i in range(1, 5)]
    assert blocks == ([1, 1, 1, 1] if name == "resnet10" else [2, 2, 2, 2])


@pytest.mark.parametrize(("name", "size"), [("resnet10", 32), ("mobilenet_v3_small", 64), ("squeezenet1_1", 64)])
def test_one_channel(name, size):
    """A network made for colour takes greyscale images, and its first convolution differs in nothing else."""
    grey, colour = (models.build(name, channels, 5, size, seed=0).eval() for channels in (1, 3))
    assert grey(torch.zeros(1, 1, size, size)).shape == (1, 5)
    first, usual = (next(m for m in net.modules() if isinstance(m, nn.Conv2d)) for net in (grey, colour))
    assert (first.kernel_size, first.stride, first.padding) == (usual.kernel_size, usual.stride, usual.padding)
    assert (first.bias is None) == (usual.bias is None)


@pytest.mark.parametrize(("name", "size", "tap"), [("googlenet", 64, "inception5b"), ("inception_v3", 96, "Mixed_7c")])
def test_networks_with_auxiliary_classifiers_give_plain_logits(name, size, tap, recwarn):
    """googlenet and inception_v3 are built without them, also for training, and without torchvision's warning."""
    net = models.build(name, 3, 5, size, seed=0).train()
    logits = net(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 5)
    assert models.check_taps(net, [tap], 3, size)[0] >= 1024
    assert not recwarn.list


def test_every_network_of_torchvision_is_known():
    known = models.names()
    assert {"lenet", "resnet10", "resnet18", "vit_b_16", "efficientnet_b0"} <= set(known)
    assert len(known) == len(set(known)) == len(zoo.list_models(module=zoo)) + 2


@pytest.mark.parametrize(
    ("name", "hint"), [("resnet81", "did you mean .*resnet18"), ("LeNet", "did you mean lenet"), ("zzz", r"\.\.\.\)$")]
)
def test_unknown_network(name, hint):
    """The message names the field, what came and what is close to it."""
    with pytest.raises(UserError, match=rf"model\.name: '{name}' is not a known network.*{hint}"):
        models.build(name, 3, 10, 32, seed=0)


def test_segmentation_networks_are_not_offered():
    """Only classification networks: their logits are (N, D)."""
    with pytest.raises(UserError, match=r"model\.name"):
        models.build("fcn_resnet50", 3, 10, 32, seed=0)


@pytest.mark.parametrize("name", ["lenet", "resnet10", "mobilenet_v3_small"])
def test_the_seed_decides_the_weights(name):
    """Same seed, same weights; another seed, others; whatever the global random state is."""
    torch.manual_seed(1)
    first = weights(models.build(name, 1, 10, 32, seed=7))
    torch.manual_seed(2)
    assert same(first, weights(models.build(name, 1, 10, 32, seed=7)))
    assert not same(first, weights(models.build(name, 1, 10, 32, seed=8)))


def test_building_leaves_the_global_random_state():
    """So that what else is random in a process does not depend on whether a network was built."""
    state, seed = torch.get_rng_state(), torch.initial_seed()
    net = models.build("resnet10", 1, 10, 32, seed=7, dropout=0.5)
    models.replace_last_layer(net, 4, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.initial_seed() == seed


@pytest.mark.parametrize(
    ("name", "size", "last"),
    [("lenet", 28, "fc2"), ("resnet10", 32, "fc"), ("mobilenet_v3_small", 64, "classifier.3"),
     ("squeezenet1_1", 64, "classifier.1"), ("shufflenet_v2_x0_5", 64, "fc")],
)  # fmt: skip
def test_replace_last_layer(name, size, last):
    """4 rotations become D classes: the last layer starts anew, seeded, and every other weight stays."""
    net = models.build(name, 3, 4, size, seed=0)
    before = weights(net)
    assert models.replace_last_layer(net, 7, seed=5) is net
    after = weights(net)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(key.rpartition(".")[0] == last for key in changed)
    assert net.eval()(torch.zeros(1, 3, size, size)).shape == (1, 7)
    again = models.replace_last_layer(models.build(name, 3, 4, size, seed=0), 7, seed=5)
    assert same(after, weights(again))
    assert not same(after, weights(models.replace_last_layer(again, 7, seed=6)))


@pytest.mark.parametrize(
    ("name", "size", "last"), [("lenet", 28, "fc2"), ("resnet10", 32, "fc"), ("mobilenet_v3_small", 64, "classifier.3")]
)
def test_dropout_comes_before_the_last_layer(name, size, last):
    """Weights, their names and the logits in eval mode are those without it; training drops some of its inputs."""
    plain, net = (models.build(name, 3, 4, size, seed=0, dropout=p).eval() for p in (0.0, 0.5))
    assert same(weights(plain), weights(net))
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(x), net(x))
    layer, ones = net.get_submodule(last).train(), torch.ones(50, net.get_submodule(last).in_features)
    nn.init.eye_(layer.weight), nn.init.zeros_(layer.bias)
    assert set(layer(ones)[:, :4].unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("training", [True, False])
def test_dropout_survives_a_new_last_layer(training):
    """The layer that starts anew has the same share, mode and weights as without dropout."""
    plain, net = (models.build("lenet", 1, 4, 28, seed=0, dropout=p).train(training) for p in (0.0, 0.25))
    assert same(*(weights(models.replace_last_layer(it, 7, seed=5)) for it in (plain, net)))
    dropout = [layer for layer in net.modules() if isinstance(layer, nn.Dropout)]
    assert [layer.p for layer in dropout] == [0.25]
    assert all(layer.training == training for layer in net.modules())


def test_dropout_is_where_only_the_last_layer_is_run_again():
    """Monte Carlo dropout finds it, and shares all that comes before."""
    mc = McDropout(models.build("resnet10", 1, 4, 32, seed=0, dropout=0.5), 9)
    assert (mc.active, mc.full, mc.partial) == (True, 1, 9)
    assert not McDropout(models.build("resnet10", 1, 4, 32, seed=0), 9).active


def test_dropout_needs_a_linear_last_layer():
    with pytest.raises(UserError, match=r"squeezenet1_1 has no linear last layer"):
        models.build("squeezenet1_1", 3, 4, 64, seed=0, dropout=0.5)


def test_check_taps_leaves_the_network_as_it_was():
    """No hook stays behind, no parameter is frozen, training mode and running statistics stay."""
    net = models.build("resnet10", 3, 10, 32, seed=0).train()
    net.layer1.eval()
    before = weights(net)
    models.check_taps(net, ["layer3", "layer4"], 3, 32)
    assert net.training
    assert net.layer4.training
    assert not net.layer1.training
    assert all(p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert same(before, weights(net))


def test_check_taps_keeps_the_order_of_the_taps():
    net = models.build("lenet", 1, 10, 28, seed=0)
    assert models.check_taps(net, ["fc1", "conv1"], 1, 28) == (50, 10)


def test_check_taps_names_an_unknown_layer():
    net = models.build("resnet18", 3, 10, 32, seed=0)
    expected = r"model\.taps\[1\]: 'layer9' is not a layer of resnet18; expected one of conv1, .*layer4.*did you mean"
    with pytest.raises(UserError, match=expected):
        models.check_taps(net, ["layer3", "layer9"], 3, 32)
    assert models.check_taps(net, ["layer3.0.bn1"], 3, 32) == (256,)  # a dotted name is one


def test_check_taps_refuses_a_tap_twice():
    net = models.build("lenet", 1, 10, 28, seed=0)
    with pytest.raises(UserError, match=r"model\.taps: .*conv1"):
        models.check_taps(net, ["conv1", "conv1"], 1, 28)


def test_check_taps_refuses_a_layer_that_runs_more_than_once():
    """A ResNet's block uses its ReLU twice."""
    net = models.build("resnet10", 3, 10, 32, seed=0)
    with pytest.raises(UserError, match=r"model\.taps: .*layer1\.0\.relu"):
        models.check_taps(net, ["layer1.0.relu"], 3, 32)


def test_check_taps_refuses_a_scale_of_one_value():
    """One value has no correlation with another."""
    net = models.build("lenet", 1, 1, 28, seed=0)
    with pytest.raises(UserError, match=r"model\.taps\[1\]: 'fc2' gives 1 value"):
        models.check_taps(net, ["fc1", "fc2"], 1, 28)


@pytest.mark.parametrize(("name", "size"), [("alexnet", 28), ("vit_b_16", 32)])
def test_check_taps_names_a_network_that_cannot_take_the_images(name, size):
    net = models.build(name, 3, 10, size, seed=0)
    tap = next(path for path, _ in net.named_children())
    with pytest.raises(UserError, match=rf"model\.name: {name} cannot take images of {size}x{size} pixels"):
        models.check_taps(net, [tap], 3, size)


def test_a_checkpoint_comes_back():
    """Weights bit for bit, and meta with its types."""
    net = models.build("resnet10", 1, 10, 32, seed=0)
    state, meta = models.load(models.save(net, META), "model.pt")
    assert same(state, weights(net))
    assert meta == META
    other = models.build("resnet10", 1, 10, 32, seed=1)
    other.load_state_dict(state)
    assert same(weights(other), weights(net))


def test_a_checkpoint_is_the_same_bytes_again():
    """Its digest can stand for it."""
    first, second = (models.save(models.build("lenet", 1, 10, 28, seed=0), META) for _ in range(2))
    assert first == second


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the checkpoint's code was run",))


def torch_bytes(value: object) -> bytes:
    sink = io.BytesIO()
    torch.save(value, sink)
    return sink.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"not a checkpoint\n" * 100, id="text"),
        pytest.param(bytes(range(256)) * 16, id="binary"),
        pytest.param(models.save(models.LeNet(), META)[:5000], id="cut"),
        pytest.param(pickle.dumps(Bomb()), id="pickle that runs code"),
        pytest.param(torch_bytes({"weights": {}, "meta": Bomb()}), id="torch file that runs code"),
        pytest.param(torch_bytes(models.LeNet()), id="whole module"),
        pytest.param(torch_bytes(models.LeNet().state_dict()), id="bare state_dict"),
        pytest.param(torch_bytes([1, 2]), id="list"),
        pytest.param(torch_bytes({"weights": [], "meta": {}}), id="weights not a dict"),
        pytest.param(torch_bytes({"weights": {"a": 1}, "meta": {}}), id="weights not tensors"),
    ],
)
def test_what_is_not_a_checkpoint_is_refused(data):
    """With one line that names the file, and without running what is in it."""
    with pytest.raises(UserError, match=r"^s3://b/model\.pt: expected a checkpoint of raypfk") as caught:
        models.load(data, "s3://b/model.pt")
    assert "\n" not in str(caught.value)
    print(caught.value)
