"""The entropy of the mean prediction (Shannon 1948; Gal, Islam and Ghahramani, Deep Bayesian Active Learning with Image
Data, ICML 2017)."""

from raypfk.pfk import uncertainty
from raypfk.strategies import by_predictions


@by_predictions()
def max_entropy(logits_TND):
    return uncertainty.max_entropy(logits_TND)
