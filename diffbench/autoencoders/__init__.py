"""Autoencoders, from images to latents and back; only initialisation is random."""

from diffbench.autoencoders.kl import KLAutoencoder, KLConfig, kl, remove_variance_, sample

__all__ = ["KLAutoencoder", "KLConfig", "kl", "remove_variance_", "sample"]
