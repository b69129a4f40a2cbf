"""The LightningModule that trains an autoencoder."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffbench.autoencoders import KLAutoencoder, kl
from diffbench.config.kinds import LossConfig
from diffbench.core import rng
from diffbench.training.module import OptimizerLike, TrainingModule

Features = Callable[[Tensor], Tensor]
"""A differentiable map from images (B, C, H, W) in [-1, 1] to features (B, D)."""


class AutoencoderModule(TrainingModule):
    """LightningModule that trains an autoencoder to reconstruct x0; (seed, position) determine the latents' noise.

    `features` is the feature extractor of the perceptual term; None if the loss has no such term.
    """

    network: KLAutoencoder

    def __init__(
        self,
        autoencoder: KLAutoencoder,
        loss: LossConfig,
        optimizer: OptimizerLike | None = None,
        seed: int = 0,
        features: Features | None = None,
    ) -> None:
        super().__init__(autoencoder, optimizer, seed=seed)
        if (loss.perceptual is None) != (features is None):
            raise ValueError("loss.perceptual: give both an extractor and its features, or neither")
        self.loss, self.features = loss, features

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of the batch, averaged over images and their C * H * W values."""
        batch = self.take(batch)
        x = batch["x0"].to(next(self.network.parameters()).dtype)
        noise = None
        if self.loss.kl_weight:  # a plain autoencoder decodes the mean
            shape = self.network.config.latent_shape(tuple(x.shape[1:]))
            noise = rng.normal(rng.key(self.seed, "posterior"), batch["position"], shape).to(x.dtype)
        restored, mean, log_variance = self.network(x, noise)
        difference = restored - x
        total = (difference.abs() if self.loss.reconstruction == "l1" else difference.square()).mean()
        if self.loss.kl_weight:
            total = total + self.loss.kl_weight * kl(mean, log_variance).mean() / x[0].numel()
        if self.features is not None:
            with torch.no_grad():
                wanted = self.features(x)
            total = total + self.loss.perceptual_weight * (self.features(restored) - wanted).square().mean()
        return total
