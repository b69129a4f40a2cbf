"""Training of an autoencoder: its loss, and what is measured and drawn of its reconstructions meanwhile."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from diffbench.autoencoders import KLAutoencoder, kl
from diffbench.config.autoencoder_sections import LossConfig
from diffbench.config.sections import OptimizerConfig
from diffbench.core import collectives as together
from diffbench.core import rng
from diffbench.data.coding import reconstruct, side_by_side
from diffbench.data.registry import ImageSet
from diffbench.metrics.reconstruction import psnr, ssim
from diffbench.sampling.images import grid, save_grid
from diffbench.training.clock import at_step_end, due
from diffbench.training.ema import EMA
from diffbench.training.logger import RunLog
from diffbench.training.module import Module

Features = Callable[[Tensor], Tensor]
"""Pictures (B, C, H, W) in [-1, 1] to features (B, D), through which gradients flow."""


class AutoencoderModule(Module):
    """Trains an autoencoder to restore x0; the noise of its latents is keyed by (seed, position).

    Args:
        autoencoder: the network.
        loss: weights of the loss's terms.
        optimizer: settings.
        seed: of the run.
        batch_size: images of an optimizer step.
        features: of the perceptual term, where the loss has one.
    """

    network: KLAutoencoder

    def __init__(
        self,
        autoencoder: KLAutoencoder,
        loss: LossConfig,
        optimizer: OptimizerConfig,
        seed: int,
        batch_size: int,
        features: Features | None = None,
    ) -> None:
        super().__init__(autoencoder, optimizer, seed, batch_size)
        if (loss.perceptual is None) != (features is None):
            raise ValueError("loss.perceptual: an extractor and its features come together")
        self.loss, self.features = loss, features

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The batch's mean loss per number of a picture."""
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


class Reconstructions(L.Callback):
    """Of the averaged weights on held-out pictures: PSNR, SSIM and KL every `validate` images, a grid every `draw`."""

    def __init__(self, run_log: RunLog, ema: EMA, data: ImageSet, validate: int, draw: int) -> None:
        self.run_log, self.ema, self.images, self.validate, self.draw = run_log, ema, data.images, validate, draw

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_step_end(trainer, batch_idx):
            return
        assert isinstance(pl_module, AutoencoderModule)
        step, last, size = trainer.global_step, trainer.global_step == trainer.max_steps, self.run_log.batch_size
        for act, every in ((self._measure, self.validate), (self._draw, self.draw)):
            if last or due(step, size, every):
                with self.run_log.clock.paused(), self.ema.applied():
                    act(pl_module.network)

    def _measure(self, autoencoder: KLAutoencoder) -> None:
        mine = together.share(len(self.images))  # of several ranks; each has some, or this is no large set
        restored, divergence = map(together.rows, reconstruct(autoencoder, self.images[mine]))
        scores = {"val/psnr": psnr(restored, self.images), "val/ssim": ssim(restored, self.images)}
        self.run_log.record(scores | {"val/kl": float(divergence.double().mean())})

    def _draw(self, autoencoder: KLAutoencoder) -> None:
        pairs = side_by_side(autoencoder, self.images[:40])
        if together.rank():
            return
        save_grid(pairs, 10, self.run_log.folder / "samples" / f"images-{self.run_log.images:09d}.png")
        self.run_log.writer.add_image("samples/ema", grid(pairs, 10), self.run_log.images, dataformats="HWC")
