"""Batches of latents by position: training cannot tell them from batches of pictures."""

from torch import Tensor

from diffbench.autoencoders import sample
from diffbench.core import keyed
from diffbench.data.latents import LatentSet
from diffbench.data.module import PositionDataModule


class LatentDataModule(PositionDataModule[LatentSet]):
    """Batches of latents of unit variance, drawn anew at each position from the posteriors."""

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Moments travel to the device and are drawn from there: the draw is a function of (seed, position)."""
        mean, log_variance = batch["mean"].float(), batch["log_variance"].float()
        noise = keyed.normal(keyed.key(self.seed, "posterior"), batch["position"], tuple(mean.shape[1:]))
        x0 = (sample(mean, log_variance, noise) - self.train.shift) * self.train.scale
        return {"x0": x0, "label": batch["label"], "position": batch["position"]}
