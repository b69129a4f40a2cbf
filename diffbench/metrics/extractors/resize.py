"""Resizing of images. The method is part of an extractor's name, because it changes every distance."""

import torch
from torch import Tensor
from torch.nn import functional as F


def tf1(images: Tensor, size: int) -> Tensor:
    """(B, C, H, W) to (B, C, size, size) float32 as TensorFlow 1 resizes: bilinear, corner to corner, no antialiasing.

    Output pixel i lies at i * H / size, not half a pixel further: what the published Inception protocol does.
    """

    def blend(x: Tensor, dim: int) -> Tensor:
        length = x.shape[dim]
        # In float32 like TensorFlow: the last digits decide on which side of a pixel a point falls.
        at = torch.arange(size, dtype=torch.float32, device=x.device) * torch.tensor(length / size).to(x.device)
        low = at.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        share = (at - low).view(-1, *[1] * (x.ndim - 1 - dim))
        return torch.lerp(x.index_select(dim, low), x.index_select(dim, high), share)

    return blend(blend(images.float(), 3), 2)


def antialiased(images: Tensor, size: int) -> Tensor:
    """(B, C, H, W) to (B, C, size, size) float32: bilinear between pixel centres, smoothed where it shrinks."""
    if images.shape[-2:] == (size, size):
        return images.float()
    return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)


def area(images: Tensor, size: int) -> Tensor:
    """(B, C, H, W) to (B, C, size, size) float32: the mean of the pixels that each new one covers."""
    if images.shape[-2:] == (size, size):
        return images.float()
    return F.interpolate(images.float(), (size, size), mode="area")
