"""Autoencoders: images to latents and back. Draws no random numbers but initialisation."""

from diffbench.autoencoders.kl import KLAutoencoder, KLConfig, kl, sample, without_spread_

__all__ = ["KLAutoencoder", "KLConfig", "kl", "sample", "without_spread_"]
