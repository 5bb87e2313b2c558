"""A strategy rehearsed: its function is called once, on inputs that are made up, for somebody's own is not to fail
after the hours of a pretraining, or of a round whose labels are bought."""

from typing import Any

import torch
from torch import Tensor

from raypfk.errors import UserError
from raypfk.pfk import Kernel, LastLayer
from raypfk.pfk.greedy import Part
from raypfk.strategies import Strategy

IMAGES = 3
SCORES, WEIGHTS = "a score for each image, a floating tensor (N,)", "a weight for each class, a floating tensor (D,)"


def rehearse(strategy: Strategy, lengths: tuple[int, ...], weight: str, classes: int, inputs: int) -> None:
    """UserError for a function that fails, or does not return what its decorator says.

    lengths: L_j of the scales. weight: the configured scale weight. classes: D. inputs: of the last layer, H.
    """
    try:
        found = _called(strategy, lengths, weight, classes, inputs)
    except Exception as error:  # whatever somebody's function does
        raise UserError(f"strategy: {strategy.name!r}: {type(error).__name__}: {error}") from None
    fits, expected = {
        "kernel": (isinstance(found, Kernel) and found.lengths == lengths, f"a pfk.Kernel of the lengths {lengths}"),
        "predictions": (_numbers(found, IMAGES), SCORES),
        "gradients": (isinstance(found, Part), "a pfk.greedy.Part"),
        "adversary": (_numbers(found, IMAGES), SCORES),
        "chance": (_numbers(found, classes), WEIGHTS) if strategy.given else (found == 1, "1.0"),
    }[strategy.kind]
    if not fits:
        shape = f" {tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else ""
        raise UserError(f"strategy: {strategy.name!r}: expected {expected}, found {type(found).__name__}{shape}")


def _called(strategy: Strategy, lengths: tuple[int, ...], weight: str, classes: int, inputs: int) -> Any:
    match strategy.kind:
        case "kernel":
            return strategy(lengths, weight)
        case "predictions":
            return strategy(torch.zeros(2, IMAGES, classes))
        case "gradients":
            vectors, keys = LastLayer(torch.ones(IMAGES, classes), torch.ones(IMAGES, inputs)), torch.arange(IMAGES)
            return strategy(vectors, keys, keys, **dict.fromkeys(strategy.given, vectors))
        case "adversary":
            return strategy(torch.zeros(IMAGES))
        case "chance":
            return strategy(torch.ones(classes, dtype=torch.int64)) if strategy.given else strategy()


def _numbers(found: Any, count: int) -> bool:
    return isinstance(found, Tensor) and found.shape == (count,) and found.is_floating_point()
