"""How close the second class comes to the first (Scheffer, Decomain and Wrobel, Active Hidden Markov Models for
Information Extraction, 2001)."""

from raypfk.pfk import uncertainty
from raypfk.strategies import by_predictions


@by_predictions()
def margin(logits_TND):
    return uncertainty.margin(logits_TND)
