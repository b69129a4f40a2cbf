"""Pictures for the eye: grids of images as PNG."""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from diffbench.core.files import atomic


def grid(images: Tensor, columns: int, scale: int = 1) -> np.ndarray:
    """Images (N, C, H, W) uint8, one or three channels, as rows of `columns` with a thin border.

    Returns:
        (rows * H', columns * W', 3) uint8, each pixel enlarged to `scale` pixels a side.
    """
    rgb = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    rgb = rgb.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    rgb = nn.functional.pad(rgb, (2, 2, 2, 2), value=128)
    missing = -len(rgb) % columns
    rgb = torch.cat([rgb, rgb.new_full((missing, *rgb.shape[1:]), 128)])
    return rearrange(rgb, "(r k) c h w -> (r h) (k w) c", k=columns).numpy()


def save_png(picture: np.ndarray, path: Path) -> None:
    """Writes an (H, W, 3) uint8 picture atomically."""
    with atomic(path) as file:
        Image.fromarray(picture).save(file, format="PNG")


def save_grid(images: Tensor, columns: int, path: Path) -> None:
    """Writes images (N, C, H, W) uint8 as a PNG, small ones enlarged for the eye."""
    save_png(grid(images, columns, scale=max(1, 40 // images.shape[-1])), path)


def save_npz(samples: Tensor, path: Path) -> None:
    """Writes samples (N, C, H, W) as `arr_0`: pictures (N, H, W, C) uint8, as ADM's evaluator reads them; others as
    they are, float32."""
    pictures = samples.dtype == torch.uint8
    with atomic(path) as file:
        np.savez(file, (samples.permute(0, 2, 3, 1) if pictures else samples).numpy())
