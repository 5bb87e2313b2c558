"""VAAL: what a discriminator in the latent space of a variational autoencoder least takes for a labelled image (Sinha,
Ebrahimi and Darrell, Variational Adversarial Active Learning, ICCV 2019)."""

from raypfk.strategies import by_adversary


@by_adversary
def vaal(logits_N):
    return -logits_N
