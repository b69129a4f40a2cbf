"""PSNR and SSIM of reconstructions."""

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

BATCH = 512
LOSSLESS = 100.0


def psnr(images: Tensor, originals: Tensor) -> float:
    """Return the mean peak signal-to-noise ratio in dB of images (N, C, H, W) uint8; identical images count 100 dB."""
    parts = []
    for a, b in zip(images.split(BATCH), originals.split(BATCH), strict=True):
        error = (a.double() - b.double()).square().flatten(1).mean(1)
        parts.append((10 * (255**2 / error).log10()).clamp(max=LOSSLESS))
    return float(torch.cat(parts).mean())


def ssim(images: Tensor, originals: Tensor) -> float:
    """Return the mean structural similarity (Wang et al. 2004) of images (N, C, H, W) uint8; 1 for identical ones."""
    total = 0.0
    for a, b in zip(images.split(BATCH), originals.split(BATCH), strict=True):
        each = structural_similarity_index_measure(a.double(), b.double(), data_range=255.0, reduction="sum")
        assert isinstance(each, Tensor)
        total += float(each)
    return total / len(images)
