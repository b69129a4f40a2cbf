"""Latents of a data set: the posterior's mean and log-variance are kept, so that each epoch draws anew."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffbench.autoencoders import KLAutoencoder
from diffbench.core.pixels import from_uint8
from diffbench.data.sources import ImageSet


@dataclass(frozen=True)
class LatentSet:
    """Gaussian posteriors of N pictures: mean and log-variance (N, c, h, w), labels (N,)."""

    mean: Tensor
    log_variance: Tensor
    labels: Tensor
    num_classes: int
    scale: float = 1.0
    shift: float = 0.0

    def __len__(self) -> int:
        return len(self.mean)

    def first(self, count: int) -> "LatentSet":
        """The first `count` pictures' latents, or fewer where there are fewer."""
        mean, log_variance, labels = (a[:count] for a in (self.mean, self.log_variance, self.labels))
        return replace(self, mean=mean, log_variance=log_variance, labels=labels)

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """What a batch holds of the pictures `index` (B,): mean, log_variance (B, c, h, w), label (B,)."""
        return {"mean": self.mean[index], "log_variance": self.log_variance[index], "label": self.labels[index]}

    def clean(self, index: Tensor) -> Tensor:
        """The scaled posterior means of the pictures `index` (B,), (B, c, h, w) float32."""
        return (self.mean[index].float() - self.shift) * self.scale


@torch.no_grad()
def encode(images: ImageSet, autoencoder: KLAutoencoder, batch_size: int = 256) -> LatentSet:
    """The latents of a data set, in memory."""
    device = next(autoencoder.parameters()).device
    parts = [autoencoder.encode(from_uint8(part.to(device))) for part in images.images.split(batch_size)]
    mean, log_variance = (torch.cat([p[i].cpu() for p in parts]) for i in (0, 1))
    scale, shift = autoencoder.config.scaling_factor, autoencoder.config.shift_factor
    return LatentSet(mean, log_variance, images.labels, images.num_classes, scale, shift)
