"""Networks with named taps: the paper's LeNet and ResNet-10, and every classification network of torchvision."""

import copy
import difflib
import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from raypfk.errors import UserError
from raypfk.pfk.descriptors import TapReader, grid_features

Module = TypeVar("Module", bound=nn.Module)

LENET_SMALLEST = 16


class LeNet(nn.Module):
    """The paper's network for MNIST. A tap on `conv1`, `conv2` or `fc1` reads the block after pooling and ReLU."""

    def __init__(self, channels: int = 1, classes: int = 10, size: int = 28):
        super().__init__()
        if size < LENET_SMALLEST:
            raise UserError(
                f"model.name: lenet needs images of {LENET_SMALLEST}x{LENET_SMALLEST} pixels or more, "
                f"found {size}x{size}; set image.size (and image.resize) to scale them up, say to 28"
            )
        side = ((size - 4) // 2 - 4) // 2
        self.conv1 = nn.Sequential(nn.Conv2d(channels, 10, 5), nn.MaxPool2d(2), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU())
        self.fc1 = nn.Sequential(nn.Linear(20 * side * side, 50), nn.ReLU())
        self.fc2 = nn.Linear(50, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.conv2(self.conv1(x)).flatten(1)))


def names() -> list[str]:
    """What `model.name` may be."""
    from torchvision import models

    return ["lenet", "resnet10", *models.list_models(module=models)]


class _DroppedLinear(nn.Linear):
    """A linear layer with dropout before it, and no other names of weights than without."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dropout: float):
        super().__init__(inputs, outputs, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dropout(x))


def build(name: str, channels: int, classes: int, size: int, seed: int, dropout: float = 0.0) -> nn.Module:
    """The network with random weights: the same `seed`, the same weights; the global random state stays as it was.

    size: side of the images in pixels. dropout: share of the last layer's inputs that training drops, beside what the
    network drops by itself. Its attribute `name` says which network it is.
    """

    def make() -> nn.Module:
        if name == "lenet":
            return LeNet(channels, classes, size)
        return _take_channels(_torchvision(name, classes), channels)

    net = seeded(make, seed)
    net.name = name
    if dropout:
        last = last_layer(net)
        net.set_submodule(_last(net, nn.Linear)[0], _dropped(last, dropout))
    return net.to(memory_format=torch.channels_last)  # on a CPU convolutions and pooling take half the time or less


def seeded(make: Callable[[], Module], seed: int) -> Module:
    """What `make` makes of random numbers from this seed; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would seed the GPUs' generators too, for good.
        torch.default_generator.manual_seed(seed)
        return make()


def _dropped(layer: nn.Linear, dropout: float) -> _DroppedLinear:
    """The same layer, with dropout before it."""
    with torch.device("meta"):  # draws nothing
        new = _DroppedLinear(layer.in_features, layer.out_features, layer.bias is not None, dropout)
    new.load_state_dict(layer.state_dict(), assign=True)
    return new


@dataclass(frozen=True)
class Architecture:
    """What a network is, without its weights: what `build` takes, but for the seed."""

    name: str
    channels: int
    classes: int
    size: int
    dropout: float = 0.0

    def build(self, seed: int = 0) -> nn.Module:
        return build(self.name, self.channels, self.classes, self.size, seed, self.dropout)


def last_layer(net: nn.Module) -> nn.Linear:
    """The layer that gives the logits. UserError where it is none of `nn.Linear`."""
    _, layer = _last(net, nn.Linear) or ("", None)
    if layer is None:
        raise UserError(f"model.name: {_name(net)} has no linear last layer, which model.dropout or the strategy needs")
    return layer


def replace_last_layer(net: Module, classes: int, seed: int) -> Module:
    """Start the last layer anew, in place, with `classes` outputs; all others keep their weights."""
    # SqueezeNet alone has no Linear at all: there the last convolution gives the logits.
    path, old = _last(net, nn.Linear) or _last(net, nn.Conv2d) or ("", None)
    if old is None:
        raise UserError(f"model.name: {_name(net)} has no linear and no convolutional layer to start anew")
    if isinstance(old, nn.Linear):
        new = seeded(lambda: nn.Linear(old.in_features, classes, bias=old.bias is not None), seed)
        if isinstance(old, _DroppedLinear):
            new = _dropped(new, old.dropout.p).train(old.training)
    else:
        new = seeded(lambda: _convolution_like(old, old.in_channels, classes), seed)
    net.set_submodule(path, new.to(old.weight.device, old.weight.dtype))
    return net


def check_taps(net: nn.Module, taps: Sequence[str], channels: int, size: int, grid: int = 1) -> tuple[int, ...]:
    """Lengths L_j of the scales that the taps give, from one black image; UserError where they cannot be read.

    grid: of `pfk.grid_features` instead.
    """
    layers = [path for path, _ in net.named_modules() if path]
    for i, tap in enumerate(taps):
        if tap not in layers:
            raise UserError(
                f"model.taps[{i}]: {tap!r} is not a layer of {_name(net)}; expected one of "
                f"{', '.join(path for path, _ in net.named_children())}, or a layer inside them{_guess(tap, layers)}"
            )
    weight = next(net.parameters())
    try:
        reader = TapReader(copy.deepcopy(net), taps)  # a copy, because a reader freezes its network for good
        _, outputs = reader(torch.zeros(1, channels, size, size, device=weight.device, dtype=weight.dtype))
        _, lengths = grid_features(outputs, grid)
    except ValueError as error:
        raise UserError(f"model.taps: {error}") from None
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"model.name: {_name(net)} cannot take images of {size}x{size} pixels: {error}") from None
    for i, (tap, length) in enumerate(zip(taps, lengths, strict=True)):
        if length < 2:
            raise UserError(f"model.taps[{i}]: {tap!r} gives {length} value per image, expected 2 or more to correlate")
    return lengths


def save(net: nn.Module, meta: dict[str, str | int]) -> bytes:
    """A checkpoint file: the weights, and which network, run and round they belong to."""
    sink = io.BytesIO()
    torch.save({"weights": {k: v.detach().cpu() for k, v in net.state_dict().items()}, "meta": dict(meta)}, sink)
    return sink.getvalue()


def load(data: bytes, origin: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, on the CPU, and `meta` of a file of `save`. Runs no code of the file's; UserError names `origin`."""
    tree = unpack(data, origin, ("weights", "meta"))
    weights, meta = tree["weights"], tree["meta"]
    if not isinstance(meta, dict) or not isinstance(weights, dict):
        raise UserError(f"{origin}: expected a checkpoint of raypfk, found 'weights' or 'meta' that is not a dict")
    if not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{origin}: expected a checkpoint of raypfk, found weights that are not tensors")
    return weights, meta


def unpack(data: bytes, origin: str, names: Sequence[str]) -> dict[str, Any]:
    """What a torch file holds under just these names. Runs no code of the file's; UserError names `origin`."""
    try:
        _refuse_bomb(data)
        tree = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file fails in as many ways as there are formats
        why = str(error) if isinstance(error, _Bomb) else type(error).__name__
        raise UserError(
            f"{origin}: expected a checkpoint of raypfk (weights and plain values, no code), "
            f"found {len(data)} bytes that are not one ({why})"
        ) from None
    if not isinstance(tree, dict) or set(tree) != set(names):
        found = f"a dict of {sorted(map(str, tree))[:6]}" if isinstance(tree, dict) else type(tree).__name__
        wanted = " and ".join(map(repr, names))
        raise UserError(f"{origin}: expected a checkpoint of raypfk with {wanted}, found {found}")
    return tree


def restore(net: nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Give the network these weights. UserError that names `origin` and the first that is not the network's."""
    own = net.state_dict()
    for name in [*own, *weights]:
        wanted, came = (_shape(kept[name]) if name in kept else "none" for kept in (own, weights))
        if wanted != came:
            raise UserError(f"{origin}: weights of another network: {name!r} is {came}, expected {wanted}")
        if not weights[name].isfinite().all():
            raise UserError(f"{origin}: expected finite weights, found NaN or infinity in {name!r}")
    net.load_state_dict(weights)


def _shape(weight: Tensor) -> str:
    kind = str(weight.dtype).removeprefix("torch.")
    return " x ".join([*map(str, weight.shape), kind if weight.layout == torch.strided else str(weight.layout)])


class _Bomb(ValueError):
    pass


def _refuse_bomb(data: bytes) -> None:
    """torch.save compresses nothing: a file that unpacks to more than it is was made to fill the memory."""
    with zipfile.ZipFile(io.BytesIO(data)) as members:
        size = sum(member.file_size for member in members.infolist())
    if size > len(data):
        raise _Bomb(f"they would unpack to {size} bytes")


def _torchvision(name: str, classes: int) -> nn.Module:
    from torchvision import models

    if name == "resnet10":
        return models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=classes)
    if name not in models.list_models(module=models):
        raise UserError(
            f"model.name: {name!r} is not a known network; expected lenet, resnet10 or a classification network of "
            f"torchvision (resnet18, mobilenet_v3_small, ...){_guess(name, names())}"
        )
    # Auxiliary classifiers would give tuples instead of logits; both ask to be told how their weights begin.
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, num_classes=classes, **options)


def _take_channels(net: nn.Module, channels: int) -> nn.Module:
    path, old = next((path, m) for path, m in net.named_modules() if isinstance(m, nn.Conv2d))
    if old.in_channels != channels:
        net.set_submodule(path, _convolution_like(old, channels, old.out_channels))
    return net


def _convolution_like(old: nn.Conv2d, channels: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(
        channels,
        outputs,
        old.kernel_size,
        old.stride,
        old.padding,
        old.dilation,
        old.groups,
        bias=old.bias is not None,
        padding_mode=old.padding_mode,
    )


def _last(net: nn.Module, kind: type[nn.Module]) -> tuple[str, Any] | None:
    found = [(path, module) for path, module in net.named_modules() if isinstance(module, kind)]
    return found[-1] if found else None


def _name(net: nn.Module) -> str:
    return getattr(net, "name", type(net).__name__)


def _guess(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
