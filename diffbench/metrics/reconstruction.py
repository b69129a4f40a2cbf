"""How near reconstructions come to their originals, and how near PCA comes with as many numbers."""

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

BATCH = 512
LOSSLESS = 100.0
MOST = 4096
"""Beyond so many pixels PCA is fitted to as many pictures, for the sake of time."""


def psnr(images: Tensor, originals: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of pictures (N, C, H, W) uint8; an equal picture counts 100 dB."""
    parts = []
    for a, b in zip(images.split(BATCH), originals.split(BATCH), strict=True):
        error = (a.double() - b.double()).square().flatten(1).mean(1)
        parts.append((10 * (255**2 / error).log10()).clamp(max=LOSSLESS))
    return float(torch.cat(parts).mean())


def ssim(images: Tensor, originals: Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004) of pictures (N, C, H, W) uint8; 1 for equal ones."""
    total = 0.0
    for a, b in zip(images.split(BATCH), originals.split(BATCH), strict=True):
        each = structural_similarity_index_measure(a.double(), b.double(), data_range=255.0, reduction="sum")
        assert isinstance(each, Tensor)
        total += float(each)
    return total / len(images)


def pca_reconstruction(training: Tensor, images: Tensor, numbers: int) -> Tensor:
    """Pictures (N, C, H, W) uint8 as `numbers` principal components of the training pictures tell them.

    Raises:
        ValueError: if there are fewer training pictures or pixels than components.
    """
    mean, basis = _principal(training, numbers)
    parts = []
    for part in images.split(BATCH):
        x = part.flatten(1).double() - mean
        parts.append((mean + x @ basis @ basis.T).round().clamp(0, 255).to(torch.uint8).view_as(part))
    return torch.cat(parts)


def _principal(training: Tensor, numbers: int) -> tuple[Tensor, Tensor]:
    """Mean (D,) and the first directions (D, numbers), orthonormal, float64."""
    pixels = training[0].numel()
    if pixels > MOST:
        training = training[:: -(-len(training) // MOST)]
    if numbers > min(len(training), pixels):
        raise ValueError(f"{numbers} components of {len(training)} pictures of {pixels} numbers")
    mean = torch.stack([part.flatten(1).double().sum(0) for part in training.split(BATCH)]).sum(0) / len(training)
    if len(training) > pixels:
        scatter = torch.zeros(pixels, pixels, dtype=torch.float64)
        for part in training.split(BATCH):
            x = part.flatten(1).double() - mean
            scatter.addmm_(x.T, x)
        return mean, torch.linalg.eigh(scatter).eigenvectors[:, -numbers:]
    x = training.flatten(1).double() - mean
    _, vectors = torch.linalg.eigh(x @ x.T)
    return mean, torch.linalg.qr(x.T @ vectors[:, -numbers:]).Q
