"""How far the likeliest class is from certain (Lewis and Gale, A Sequential Algorithm for Training Text Classifiers,
1994)."""

from raypfk.pfk import uncertainty
from raypfk.strategies import by_predictions


@by_predictions()
def least_confidence(logits_TND):
    return uncertainty.least_confidence(logits_TND)
