"""Encoding and decoding of images by an autoencoder, in batches that fit in memory."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffbench.autoencoders import KLAutoencoder, kl
from diffbench.core.errors import UserError
from diffbench.core.pixels import from_uint8, to_uint8
from diffbench.core.tensors import eval_mode

PIXELS = 2**19
"""Pixels that pass through an autoencoder at once: 512 images of 32x32, or 8 of 256x256."""


def at_once(height: int, width: int) -> int:
    """Return the number of images of this size that pass through an autoencoder at once."""
    return max(1, PIXELS // (height * width))


def _inputs(autoencoder: KLAutoencoder, images: Tensor) -> Iterator[Tensor]:
    parameter = next(autoencoder.parameters())
    for part in images.split(at_once(*images.shape[2:])):
        yield from_uint8(part.to(parameter.device)).to(parameter.dtype)


@torch.no_grad()
def reconstruct(
    autoencoder: KLAutoencoder, images: Tensor, check: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor]:
    """Reconstruct images (N, C, H, W) uint8 from the means of their latents; return them and the KL (N,) in nats.

    `check` is called before each batch, and may raise.

    Raises:
        UserError: if a reconstructed value is not finite.
    """
    reconstructions, divergences = [], []
    with eval_mode(autoencoder):
        for x in _inputs(autoencoder, images):
            check()
            restored, mean, log_variance = autoencoder(x)
            if broken := int((~restored.isfinite()).sum()):
                raise UserError(f"the autoencoder's output is not finite, in {broken} of {restored.numel()} values")
            reconstructions.append(to_uint8(restored).cpu())
            divergences.append(kl(mean, log_variance).cpu())
    return torch.cat(reconstructions), torch.cat(divergences)


def side_by_side(autoencoder: KLAutoencoder, images: Tensor, columns: int = 10) -> Tensor:
    """Return rows of images (N, C, H, W) uint8, each row followed by the row of its reconstructions."""
    restored, _ = reconstruct(autoencoder, images)
    rows = zip(images.split(columns), restored.split(columns), strict=True)
    return torch.cat([image for row in rows for image in row])


@torch.no_grad()
def decode(autoencoder: KLAutoencoder, latents: Tensor) -> Tensor:
    """Decode latents (N, c, h, w), scaled as denoisers see them, to pixels (N, C, H, W) in about [-1, 1]."""
    dtype, factor = next(autoencoder.to(latents.device).parameters()).dtype, autoencoder.config.factor
    parts = latents.to(dtype).split(at_once(latents.shape[2] * factor, latents.shape[3] * factor))
    return torch.cat([autoencoder.decode(autoencoder.unscaled(part)) for part in parts])


@torch.no_grad()
def spread(autoencoder: KLAutoencoder, images: Tensor) -> tuple[float, float]:
    """Return the mean and standard deviation of the latents of images (N, C, H, W) uint8, over all elements."""
    first, second, count = 0.0, 0.0, 0
    for x in _inputs(autoencoder, images):
        mean, log_variance = (m.double() for m in autoencoder.encode(x))
        first += float(mean.sum())
        second += float((mean.square() + log_variance.exp()).sum())
        count += mean.numel()
    centre = first / count
    return centre, (second / count - centre**2) ** 0.5
