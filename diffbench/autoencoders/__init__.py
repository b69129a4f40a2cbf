"""Autoencoders, from images to latents and back; only initialisation is random."""

from diffbench.autoencoders.kl import KLAutoencoder, KLConfig, kl, sample, without_spread_

__all__ = ["KLAutoencoder", "KLConfig", "kl", "sample", "without_spread_"]
