"""What a label would tell about the network: the entropy of the mean prediction less the mean entropy (Houlsby et al.,
Bayesian Active Learning for Classification and Preference Learning, 2011; Gal, Islam and Ghahramani, ICML 2017)."""

from raypfk.pfk import uncertainty
from raypfk.strategies import by_predictions


@by_predictions("passes")
def bald(logits_TND):
    return uncertainty.bald(logits_TND)
