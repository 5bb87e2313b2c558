"""Descriptors: features z (section 4.1) and Fisher scores g (section 4.2) of the taps of a network.

Shapes: N images, D classes, L = sum of L_j descriptor length, C x H x W or T x C one tap's output.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A scale whose values differ by no more than this share of the largest is constant up to float32 rounding.
CONSTANT = 4 * torch.finfo(torch.float32).eps


class TapReader:
    """Runs a network and returns its logits and the outputs of its taps, ready for `fisher_scores`.

    `reader(x) -> (logits (N, D), taps)`, the taps in the order of `names`. Autograd records only from the first tap
    that fires, so the trunk before it costs a forward and no memory. The constructor sets `net.eval()` and freezes all
    parameters for good; `close` takes the hooks off again. A network may be called without the reader: the hooks then
    do nothing.

    Raises ValueError for a name that is not a submodule or given twice and, when called, for a tap that is called twice
    in one forward, never, or whose output is not a floating-point tensor, and for logits that are not (N, D).
    """

    def __init__(self, net: nn.Module, names: Sequence[str]):
        modules = dict(net.named_modules(remove_duplicate=False))
        for name in names:
            if not name or name not in modules:
                top = ", ".join(child for child, _ in net.named_children())
                raise ValueError(
                    f"tap {name!r} is not a submodule of {type(net).__name__}; at its top level are: {top}"
                )
        if not names or len(set(names)) < len(names):
            raise ValueError(f"expected one or more taps, each named once, got {list(names)}")
        self.net = net.eval().requires_grad_(False)
        self.names = tuple(names)
        self._seen: dict[str, Tensor] | None = None  # None: not reading, hooks rest
        self._hooks = [modules[name].register_forward_hook(self._hook(name)) for name in names]

    def __call__(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        seen = self._seen = {}
        try:
            with torch.inference_mode(False), torch.enable_grad():
                logits = self.net(x.detach())
        finally:
            self._seen = None
        missing = [name for name in self.names if name not in seen]
        if missing:
            raise ValueError(f"taps {missing} were never called in the forward pass")
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ValueError(f"expected logits (N, D), got {_what(logits)} from {type(self.net).__name__}")
        return logits, [seen[name] for name in self.names]

    def close(self) -> None:
        """Takes the hooks off the network."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str):
        def read(_module: nn.Module, _inputs: tuple, out: Tensor) -> Tensor | None:
            if self._seen is None:
                return None
            if name in self._seen:
                raise ValueError(f"tap {name!r} is called twice in one forward pass; tap a module that is called once")
            if not isinstance(out, Tensor) or not out.is_floating_point():
                raise ValueError(f"tap {name!r}: expected a floating-point tensor, got {_what(out)}")
            # Two copies: in-place work on what the module returned, or on what is handed on, must not reach the tap.
            tap = out.clone() if out.requires_grad else out.detach().clone().requires_grad_()
            self._seen[name] = tap
            return tap.clone()

        return read


def spatial_mean(t: Tensor) -> Tensor:
    """The paper's phi (section 4.1): mean over H, W of (N, C, H, W), T of tokens (N, T, C); (N, C) as it is.

    Returns (N, C), float32 or better. Raises ValueError for any other number of dimensions.
    """
    dtype = torch.promote_types(t.dtype, torch.float32)
    if t.ndim == 4:
        return t.mean((2, 3), dtype=dtype)
    if t.ndim == 3:
        return t.mean(1, dtype=dtype)
    if t.ndim == 2:
        return t.to(dtype)
    raise ValueError(f"expected a tap of shape (N, C, H, W), (N, T, C) or (N, C), got {tuple(t.shape)}")


def lengths(taps: Sequence[Tensor]) -> tuple[int, ...]:
    """The length L_j of each scale: the channels of each tap."""
    return tuple(t.shape[2] if t.ndim == 3 else t.shape[1] for t in taps)


def features(taps: Sequence[Tensor]) -> Tensor:
    """Features z, (N, L): the spatial means of the taps side by side, float32 or better, without a graph."""
    return torch.cat([spatial_mean(t.detach()) for t in taps], dim=1)


def grid_features(taps: Sequence[Tensor], side: int) -> tuple[Tensor, tuple[int, ...]]:
    """Features that know where: the means of each tap over the cells of a grid, and the lengths of their scales.

    A tap (N, C, H, W) has at most side x side cells, at most one for each of its H and W, which may overlap where these
    do not divide; channel by channel, their means side by side. Other taps are as `features` has them, as all are with
    side 1. Returns ((N, L'), lengths), float32 or better, without a graph. Spatial pyramids: Lazebnik et al. 2006.
    """
    parts = [_cells(t.detach(), side) for t in taps]
    return torch.cat(parts, dim=1), tuple(part.shape[1] for part in parts)


def _cells(t: Tensor, side: int) -> Tensor:
    if t.ndim != 4 or side == 1:
        return spatial_mean(t)
    size = tuple(min(side, extent) for extent in t.shape[2:])
    return F.adaptive_avg_pool2d(t.to(torch.promote_types(t.dtype, torch.float32)), size).flatten(1)


def fisher_scores(logits: Tensor, taps: Sequence[Tensor], labels: Tensor, retain_graph: bool = False) -> Tensor:
    """Fisher scores g, (N, L): spatial mean of dL_i / d(tap output), L_i the cross-entropy of image i (section 4.2).

    `logits` (N, D) and `taps` come from one call of a `TapReader`. `labels`: classes (N,) int64, or soft labels (N, D)
    float. The loss is summed over the batch, so an image's scores do not depend on its batch mates. No parameter gets a
    gradient. A tap that the logits do not depend on scores zero. `retain_graph` keeps the graph for further labels.
    Raises ValueError for labels of another shape or a class outside 0..D-1.
    """
    slope_ND = logit_slope(logits.detach(), labels).to(logits.dtype)
    return _scores_of_slope(logits, taps, slope_ND, retain_graph)


def class_scores(logits: Tensor, taps: Sequence[Tensor]) -> Tensor:
    """Fisher scores of every class, (N, D, L): [:, d] is `fisher_scores` of label d, all D from one batched backward.

    `logits` (N, D) and `taps` are as `fisher_scores` takes them; the graph is freed. It takes the memory of D backwards
    at once. The backward of each layer after the first tap must work under `torch.func.vmap`: those of torch do; one of
    your own must not branch on the gradient's values, nor write a gradient into a tensor in place.
    """
    p_ND, others_ND = _probabilities(logits.detach())
    own_D1D = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)[:, None]
    slope_DND = torch.where(own_D1D, -others_ND, p_ND).to(logits.dtype)  # what logit_slope gives for labels 0..D-1
    # Not autograd's is_grads_batched: that runs convolutions and normalisation one class after the other.
    return torch.func.vmap(lambda slope_ND: _scores_of_slope(logits, taps, slope_ND), out_dims=1)(slope_DND)


def _scores_of_slope(logits: Tensor, taps: Sequence[Tensor], slope_ND: Tensor, retain_graph: bool = False) -> Tensor:
    grads = [None] * len(taps)
    if logits.requires_grad:
        grads = torch.autograd.grad(logits, taps, slope_ND, retain_graph=retain_graph, allow_unused=True)
    return features([torch.zeros_like(t) if g is None else g for t, g in zip(taps, grads, strict=True)])


def logit_slope(logits: Tensor, labels: Tensor) -> Tensor:
    """d(sum of cross-entropies) / d(logits), (N, D) float64: softmax - label, exact also where softmax rounds to 1.

    A confident model's score for its predicted class is the difference 1 - p, which float32 gives as 0 or as noise;
    Fisher scores are then standardised, so that noise would count as much as a signal.
    """
    n, d = logits.shape
    if labels.shape == (n,) and not labels.is_floating_point():
        if n and not 0 <= int(labels.min()) <= int(labels.max()) < d:
            raise ValueError(f"expected classes 0..{d - 1}, got {int(labels.min())}..{int(labels.max())}")
        y_ND = F.one_hot(labels.long(), d).double()
    elif labels.shape == (n, d) and labels.is_floating_point():
        y_ND = labels.detach().double()
    else:
        raise ValueError(f"expected labels ({n},) int64 or ({n}, {d}) float, got {tuple(labels.shape)} {labels.dtype}")
    p_ND, others_ND = _probabilities(logits)
    return p_ND * (y_ND.sum(1, keepdim=True) - y_ND) - y_ND * others_ND


def _probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """p and 1 - p, (N, D) float64, each to its own last digits."""
    p_ND = logits.double().softmax(1)
    top_N1 = p_ND.argmax(1, keepdim=True)
    others_ND = (1 - p_ND).scatter(1, top_N1, p_ND.scatter(1, top_N1, 0.0).sum(1, keepdim=True))  # 1 - p, no cancelling
    return p_ND, others_ND


def standardise(x_NL: Tensor, lengths: Sequence[int]) -> Tensor:
    """Each scale of each row minus its mean, at unit length: a dot product of two is their Pearson correlation (eq. 6).

    `x_NL` is of any floating dtype and magnitude, `lengths` its L_j. Returns (N, L) float32, computed in float64. A
    scale of a row becomes zeros where it is constant up to float32 rounding, or holds a NaN or an infinity.
    Raises ValueError where the lengths do not add up to L.
    """
    check_lengths(lengths)
    if x_NL.ndim != 2 or x_NL.shape[1] != sum(lengths):
        raise ValueError(f"expected (N, {sum(lengths)}) for scales of {tuple(lengths)}, got {tuple(x_NL.shape)}")
    return torch.cat([_standardise_scale(x_Nl) for x_Nl in x_NL.detach().split(list(lengths), dim=1)], dim=1)


def _standardise_scale(x_Nl: Tensor) -> Tensor:
    x_Nl = x_Nl.double()
    finite_N1 = x_Nl.isfinite().all(1, keepdim=True)
    x_Nl = x_Nl.where(finite_N1, 0.0)
    low_N1, high_N1 = x_Nl.aminmax(dim=1, keepdim=True)
    most_N1 = torch.maximum(-low_N1, high_N1)
    dead_N1 = high_N1 - low_N1 <= CONSTANT * most_N1
    x_Nl = x_Nl / most_N1.where(~dead_N1, 1.0)  # so that no square under- or overflows
    x_Nl = x_Nl - x_Nl.mean(1, keepdim=True)
    return (x_Nl / x_Nl.norm(dim=1, keepdim=True)).where(~dead_N1, 0.0).float()


def check_lengths(lengths: Sequence[int]) -> None:
    """Raises ValueError unless `lengths` are one or more scales of at least one number each."""
    if not lengths or min(lengths) < 1:
        raise ValueError(f"expected the length of one or more scales, each at least 1, got {tuple(lengths)}")


def _what(value: object) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
