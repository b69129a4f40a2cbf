"""Image resizing. The method is part of an extractor's name, because it changes every distance."""

import torch
from torch import Tensor
from torch.nn import functional as F


def tf1(images: Tensor, size: int) -> Tensor:
    """Resize (B, C, H, W) to (B, C, size, size) float32 as TensorFlow 1 does: bilinear, without antialiasing.

    Output pixel i is sampled at i * H / size, without a half-pixel offset, as in the published Inception protocol.
    """

    def blend(x: Tensor, dim: int) -> Tensor:
        length = x.shape[dim]
        # In float32 like TensorFlow, since rounding decides on which side of a pixel a point falls.
        at = torch.arange(size, dtype=torch.float32, device=x.device) * torch.tensor(length / size).to(x.device)
        low = at.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        weight = (at - low).view(-1, *[1] * (x.ndim - 1 - dim))
        return torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)

    return blend(blend(images.float(), 3), 2)


def antialiased(images: Tensor, size: int) -> Tensor:
    """Resize (B, C, H, W) to (B, C, size, size) float32: bilinear between pixel centres, antialiased when shrinking."""
    if images.shape[-2:] == (size, size):
        return images.float()
    return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)


def area(images: Tensor, size: int) -> Tensor:
    """Resize (B, C, H, W) to (B, C, size, size) float32: each new pixel is the mean of those that it covers."""
    if images.shape[-2:] == (size, size):
        return images.float()
    return F.interpolate(images.float(), (size, size), mode="area")
