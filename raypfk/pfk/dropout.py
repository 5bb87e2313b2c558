"""Monte Carlo dropout: K stochastic passes of a network, of which only what lies after its first dropout is run again.

Gal and Ghahramani, Dropout as a Bayesian approximation, ICML 2016, section 4. Shapes: N images, K passes, D classes,
E numbers of an image that a dropout layer keeps or drops.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from raypfk.pfk import draws

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 22}  # numbers that enter the tail at once: cache on a CPU, launches on a GPU
LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# What is kept or dropped as one: the numbers of an input (N, ...), or its channels. None: not done here.
UNITS = {
    F.dropout: slice(1, None),
    F.dropout1d: slice(1, 2),
    F.dropout2d: slice(1, 2),
    F.dropout3d: slice(1, 2),
    F.alpha_dropout: None,
    F.feature_alpha_dropout: None,
}


class McDropout:
    """Logits of K = `passes`, each with masks of its own: `mc(x (N, C, H, W), salts (N,) int64) -> (K, N, D)`.

    The constructor sets `net.eval()`: only dropout (nn.Dropout, Dropout1d to 3d, and their functions) is random. It
    keeps a number, or a channel, with probability 1 - p and scales it by 1 / (1 - p). Masks follow from an image's own
    salt, the pass, the layer and the place within the image alone, so its logits do not depend on its batch mates, to
    the last bit; in a batch of another size, at another place of it, or with another K, libraries may round otherwise.

    The trunk before the first dropout is run once. `full` and `partial` count the passes of an image from the network's
    input and from its first dropout: 1 and K; K and 0 if the network cannot be traced (what it does depends on the
    data); 1 and 0 if it is not `active`: no dropout has p > 0, and the K passes are one, expanded. Whether a network
    that cannot be traced is active is told by its layers alone, not by dropout functions.

    Raises ValueError for `passes` below 1, for another kind of dropout (alpha dropout, or inside an attention or
    recurrent layer) and, when called, for salts that are not (N,) int64, for logits that are not (N, D), and for a
    dropout whose input is not (N, ...).
    """

    def __init__(self, net: nn.Module, passes: int):
        if passes < 1:
            raise ValueError(f"expected 1 or more passes, got {passes}")
        _check_layers(net)
        self.passes, self._tail = passes, net.eval()
        try:
            graph = fx.Tracer().trace(net)
        except Exception:  # a network can defeat tracing in as many ways as there are programs
            self.active, runs = _drops(net), (passes, 0)
        else:
            first = next((node for node in graph.nodes if _is_dropout(node, net)), None)
            self.active, runs = first is not None, (1, passes)
        self.full, self.partial = runs if self.active else (1, 0)
        if self.partial:
            self._trunk, self._tail = _cut(net, graph, first)

    @torch.no_grad()
    def __call__(self, x: Tensor, salts: Tensor) -> Tensor:
        n = len(x)
        if salts.shape != (n,) or salts.dtype != torch.int64:
            raise ValueError(f"expected salts ({n},) int64, got {tuple(salts.shape)} {salts.dtype}")
        if not self.active:
            return _check_logits(self._tail(x), n).expand(self.passes, n, -1)
        salts_KN = draws.bits(salts.to(x.device), torch.arange(self.passes, device=x.device)[:, None])
        if not self.partial:
            return torch.stack([self._pass((x.clone(),), salts_N) for salts_N in salts_KN])
        values = self._trunk(x)
        numbers = sum(value.numel() for value in tree_leaves(values) if isinstance(value, Tensor))
        size = max(1, CHUNK.get(x.device.type, 1 << 22) // max(1, numbers))
        return torch.cat([self._passes(values, salts_kN) for salts_kN in salts_KN.split(size)])

    def _passes(self, values: tuple, salts_kN: Tensor) -> Tensor:
        """Logits (k, N, D) of k passes at once; the tail sees a batch of N, as in a single pass."""
        # Each pass gets a copy of its own, because layers may work in place.
        copies = tree_map(lambda v: v.expand(len(salts_kN), *v.shape).clone() if isinstance(v, Tensor) else v, values)
        dims = tree_map(lambda v: 0 if isinstance(v, Tensor) else None, values)
        return torch.vmap(self._pass, in_dims=(dims, 0))(copies, salts_kN)

    def _pass(self, values: tuple, salts: Tensor) -> Tensor:
        with _Masks(salts):
            return _check_logits(self._tail(*values), len(salts))


class _Masks(TorchFunctionMode):
    """Within it dropout is active, in eval mode too, and takes its masks from the salts (N,) of one pass."""

    def __init__(self, salts: Tensor):
        super().__init__()
        self.salts = salts
        self.layers = 0  # how many have drawn so far

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in UNITS or kwargs["p"] == 0:
            return function(*args, **kwargs)
        if UNITS[function] is None:
            raise ValueError(f"expected dropout of numbers or channels, got {function.__name__}")
        mask = self._mask(args[0], UNITS[function], kwargs["p"])
        return args[0].mul_(mask) if kwargs["inplace"] else args[0] * mask

    def _mask(self, x: Tensor, units: slice, p: float) -> Tensor:
        n = len(self.salts)
        if not x.ndim or len(x) != n:
            raise ValueError(f"expected dropout of an input ({n}, ...), got {tuple(x.shape)}")
        salts_N1 = draws.bits(self.salts, self.layers)[:, None]
        self.layers += 1
        places_E = torch.arange(math.prod(x.shape[units]), device=x.device)
        keep_NE = draws.uniform(salts_N1, places_E) >= p
        mask_NE = keep_NE.to(x.dtype).div_(1 - p if p < 1 else 1)
        return mask_NE.view(n, *x.shape[units], *[1] * len(x.shape[units.stop or x.ndim :]))


def _cut(net: nn.Module, graph: fx.Graph, first: fx.Node) -> tuple[fx.GraphModule, fx.GraphModule]:
    """What comes before node `first`, and the rest, which takes the values that the former returns."""
    nodes = list(graph.nodes)
    before, after = nodes[: nodes.index(first)], nodes[nodes.index(first) :]
    crossing = [node for node in before if not node.users.keys().isdisjoint(after)]
    trunk, tail = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in before:
        copies[node] = trunk.node_copy(node, copies.__getitem__)
    trunk.output(tuple(copies[node] for node in crossing))
    copies = {node: tail.placeholder(node.name) for node in crossing}
    for node in after:
        copies[node] = tail.node_copy(node, copies.__getitem__)
    return fx.GraphModule(net, trunk), fx.GraphModule(net, tail)


def _is_dropout(node: fx.Node, net: nn.Module) -> bool:
    if node.op == "call_module":
        return _drops(net.get_submodule(node.target))
    return node.target in UNITS and node.kwargs["p"] > 0


def _drops(net: nn.Module) -> bool:
    return any(isinstance(layer, LAYERS) and layer.p > 0 for layer in net.modules())


def _check_layers(net: nn.Module) -> None:
    for name, layer in net.named_modules():
        alpha = isinstance(layer, nn.AlphaDropout | nn.FeatureAlphaDropout) and layer.p
        hidden = isinstance(layer, nn.MultiheadAttention | nn.RNNBase) and layer.dropout
        if alpha or hidden:
            raise ValueError(f"expected dropout of numbers or channels, got that of {name}, {type(layer).__name__}")


def _check_logits(logits: Tensor, n: int) -> Tensor:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"expected logits ({n}, D), got {got}")
    return logits
