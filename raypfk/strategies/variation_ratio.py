"""How many passes disagree with the class that most vote for (Freeman 1965; Gal, Islam and Ghahramani, Deep Bayesian
Active Learning with Image Data, ICML 2017; Beluch et al., The Power of Ensembles for Active Learning, CVPR 2018)."""

from raypfk.pfk import uncertainty
from raypfk.strategies import by_predictions


@by_predictions("passes")
def variation_ratio(logits_TND):
    return uncertainty.variation_ratio(logits_TND)
