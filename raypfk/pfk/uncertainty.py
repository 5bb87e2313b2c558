"""Acquisition functions of uncertainty, the rivals of the Fisher kernel: how unsure a network is of each pool image.

Each takes the logits (T, N, D) of T passes over the same images, of any floating dtype, and returns scores (N,)
float32, computed in float64: the larger, the more worth labelling. Passes are the members of an ensemble, times the
dropout samples of each, all of equal weight; T = 1 is a plain network. An image with a NaN or an infinite logit in any
pass scores -inf, so that it comes after all others. An image's score does not depend, to the last bit, on its batch
mates. Raises ValueError unless the logits are floating-point, (T, N, D), with T and D at least 1.

Shapes: T passes, N images, D classes.
"""

import torch
from torch import Tensor

from raypfk.pfk.sums import fold_


def variation_ratio(logits_TND: Tensor) -> Tensor:
    """1 - f / T, f the number of passes that vote for the modal class (Freeman 1965; Beluch et al. 2018): 0..1 - 1/T.

    A pass votes for the first class of its largest logit. One pass agrees with itself: T = 1 gives zeros. (Gal et al.
    2017, section 4, write 1 - max p(y|x) of the mean probability: `least_confidence`.)
    """
    logits_TND, finite_N = _read(logits_TND)
    votes_TN = logits_TND.argmax(2)
    modal_TN = votes_TN == votes_TN.mode(0).values
    return _scores((~modal_TN).sum(0).double() / len(votes_TN), finite_N)


def max_entropy(logits_TND: Tensor) -> Tensor:
    """H[mean p], the entropy of the mean probability, in nats (Shannon 1948; Gal et al. 2017): 0..ln D."""
    p_TND, finite_N = _probabilities(logits_TND)
    rest_ND = _without_largest(_mean(p_TND))
    others_N = _sum(rest_ND, 1)
    largest_N = -torch.special.xlog1py(1 - others_N, -others_N)  # -p log p, of p = 1 - others that may round to 1
    return _scores(_sum(torch.special.entr(rest_ND), 1) + largest_N, finite_N)


def bald(logits_TND: Tensor) -> Tensor:
    """H[mean p] - mean H[p], what the label would tell of the weights, in nats (Houlsby et al. 2011): 0..ln min(T, D).

    Computed as what it equals, the mean over passes of KL(p || mean p): where passes nearly agree, the difference of
    entropies would be rounding alone. With m the mean of a class and p = (1 + e) m, its term is
    m ((1 + e) ln(1 + e) - e): never negative, and the last e adds up to 0 over the passes.
    """
    p_TND, finite_N = _probabilities(logits_TND)
    mean_ND = _mean(p_TND)
    e_TND = (p_TND - mean_ND) / mean_ND.where(mean_ND > 0, 1.0)
    terms_TND = mean_ND * (torch.special.xlog1py(1 + e_TND, e_TND) - e_TND)
    return _scores(_sum(_mean(terms_TND), 1).clamp(min=0), finite_N)  # a log1p may be off by its last bit


def margin(logits_TND: Tensor) -> Tensor:
    """1 - (largest - second largest mean probability) (Scheffer et al. 2001): 0..1, and 0 for a single class."""
    p_TND, finite_N = _probabilities(logits_TND)
    rest_ND = _without_largest(_mean(p_TND))
    return _scores(_sum(rest_ND, 1) + rest_ND.amax(1), finite_N)


def least_confidence(logits_TND: Tensor) -> Tensor:
    """1 - largest mean probability (Lewis & Gale 1994): 0..1 - 1/D, exact also where that probability rounds to 1."""
    p_TND, finite_N = _probabilities(logits_TND)
    return _scores(_sum(_without_largest(_mean(p_TND)), 1), finite_N)


def _read(logits_TND: Tensor) -> tuple[Tensor, Tensor]:
    """The logits in float64, and the mask (N,) of images whose logits are all finite."""
    if logits_TND.ndim != 3 or 0 in logits_TND.shape[::2] or not logits_TND.is_floating_point():
        got = f"{tuple(logits_TND.shape)} {logits_TND.dtype}"
        raise ValueError(f"expected floating-point logits (T, N, D) with T and D at least 1, got {got}")
    logits_TND = logits_TND.detach().double()
    return logits_TND, logits_TND.isfinite().all(2).all(0)


def _scores(score_N: Tensor, finite_N: Tensor) -> Tensor:
    return score_N.where(finite_N, -torch.inf).float()


def _probabilities(logits_TND: Tensor) -> tuple[Tensor, Tensor]:
    """The probabilities (T, N, D) of each pass, and the mask of `_read`."""
    logits_TND, finite_N = _read(logits_TND)
    odds_TND = (logits_TND - logits_TND.amax(2, keepdim=True)).exp()  # softmax may sum by the row's place
    return odds_TND / _sum(odds_TND, 2).unsqueeze(2), finite_N


def mean_probabilities(logits_TND: Tensor) -> Tensor:
    """Softmax of each pass, averaged: (N, D) float64. `logits_TND` as of the scores."""
    return _mean(_probabilities(logits_TND)[0])


def _mean(x_TND: Tensor) -> Tensor:
    return _sum(x_TND, 0) / len(x_TND)


def _without_largest(p_ND: Tensor) -> Tensor:
    """The probabilities with each row's largest set to 0: the sum of a row is 1 - largest, without cancelling."""
    return p_ND.scatter(1, p_ND.argmax(1, keepdim=True), 0.0)


def _sum(x: Tensor, dim: int) -> Tensor:
    return fold_(x.clone(), dim)
