"""The only conversion between uint8 pixels and the networks' range [-1, 1]."""

import torch
from torch import Tensor


def to_uint8(x: Tensor) -> Tensor:
    """Convert [-1, 1] to 0..255, rounding to nearest (floor(127.5 x + 128), as DiT and EDM do); NaN becomes 0."""
    return (x.float() * 127.5 + 128).clamp(0, 255).nan_to_num(0).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Convert 0..255 to [-1, 1], float32."""
    return images.float().div_(127.5).sub_(1)
