"""Strategies: acquisition functions, each a small file of its own with one function and its paper.

A decorator says what the function is given and what is made of what it returns; the stages do the rest, whatever the
strategy. `named("bald")` is this folder's bald.py, `named("package.module:function")` anybody's.

Shapes: N images, D classes, T passes (of dropout), L numbers of a descriptor.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from raypfk.errors import UserError

Kind = Literal["kernel", "predictions", "gradients", "adversary", "chance"]


@dataclass(frozen=True)
class Strategy:
    """An acquisition function, and what it is to be given. name: as the configuration has it."""

    kind: Kind
    function: Callable[..., Any]
    given: frozenset[str] = frozenset()
    name: str = ""

    def __call__(self, *args, **kwargs) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self):
        return named, (self.name,)  # its function's name is the strategy's: it cannot be found by it


def by_kernel(function: Callable) -> Strategy:
    """`function(lengths, weight) -> pfk.Kernel`, of the scales' lengths L_j and the configured scale weight.

    The images that are most similar to the centers are chosen, rank by rank (Gudovskiy et al. 2020, Algorithm 1).
    """
    return Strategy("kernel", function)


def by_predictions(*given: Literal["passes"]) -> Callable[[Callable], Strategy]:
    """`function(logits (T, N, D)) -> scores (N,)` float32: the images of the largest scores are chosen.

    given "passes": it says nothing unless T > 1. The first round's images are drawn by chance, as in the program of
    Gudovskiy et al.: its network has a random last layer, whose predictions say nothing.
    """
    return lambda function: Strategy("predictions", function, frozenset(given))


def by_gradients(*given: Literal["labelled", "misses"]) -> Callable[[Callable], Strategy]:
    """`function(vectors, keys (N,), salts (N,)) -> pfk.greedy.Part`, which proposes images one after another.

    vectors: a `pfk.LastLayer` of some of the pool's images, with the class that the network predicts for a label.
    given: further keywords; "labelled", the vectors of what is labelled already, as if its labels were not known; and
    "misses", those of the validation images that the network gets wrong (all, if none), with their true labels.
    """
    return lambda function: Strategy("gradients", function, frozenset(given))


def by_adversary(function: Callable) -> Strategy:
    """`function(logits (N,)) -> scores (N,)` float32: the images of the largest scores are chosen.

    logits: of being labelled already, by the discriminator that is trained in the round (Sinha et al. 2019), float32.
    The first round has no labelled image yet: its images are drawn by chance.
    """
    return Strategy("adversary", function)


def by_chance(*given: Literal["classes"]) -> Callable[[Callable], Strategy]:
    """`function() -> 1.0`, the same chance for all; given "classes", `function(counts (D,)) -> weights (D,)`.

    counts: images of each class, as the label estimator has it, of those that may be drawn. They are drawn without
    replacement.
    """
    return lambda function: Strategy("chance", function, frozenset(given))


def names() -> list[str]:
    """The strategies of this folder."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def named(name: str) -> Strategy:
    """The strategy of this name, or at `package.module:function`. UserError where there is none."""
    if ":" in name:
        place, _, attribute = name.partition(":")
    else:
        attribute = name.replace("-", "_")
        place = f"{__name__}.{attribute}"
        if name not in names():
            raise UserError(f"strategy: expected {', '.join(names())} or package.module:function, found {name!r}")
    try:
        found = getattr(importlib.import_module(place), attribute, None)
    except Exception as error:  # whatever somebody's module does when it is imported
        raise UserError(f"strategy: {name!r}: {type(error).__name__}: {error}") from None
    if not isinstance(found, Strategy):
        decorators = "by_kernel, by_predictions, by_gradients, by_adversary or by_chance"
        expected = f"a function under {decorators} of raypfk.strategies"
        raise UserError(f"strategy: {name!r}: expected {expected}, found {type(found).__name__}")
    return replace(found, name=name)
