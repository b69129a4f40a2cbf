"""Distances between sets of features, as plain functions. Float64 throughout."""

import torch
from torch import Tensor


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), float64.

    Raises:
        ValueError: with fewer than two samples.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {len(features)}")
    x = features.double()
    return x.mean(0), x.T.cov()


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Squared Fréchet distance between Gaussian fits of two feature sets (N, D) and (M, D) (Heusel et al. 2017).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); the last term is the nuclear norm of S1^(1/2) S2^(1/2).
    """
    (mean1, cov1), (mean2, cov2) = moments(features), moments(reference)
    cross = torch.linalg.svdvals(_sqrt(cov1) @ _sqrt(cov2)).sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


def _sqrt(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def coverage(features: Tensor, reference: Tensor, k: int = 5) -> float:
    """Share of the reference points that have a sample within their k-th nearest neighbour (Naeem et al. 2020).

    Args:
        features: (N, D) of samples.
        reference: (M, D) of real images, M > k; distances are strict, a point is no neighbour of itself.
    """
    x, ref = features.double(), reference.double()
    radius = torch.cdist(ref, ref).kthvalue(k + 1, dim=1).values
    return float((torch.cdist(ref, x).amin(1) < radius).double().mean())


def nearest_distance(images: Tensor, reference: Tensor) -> Tensor:
    """(N,) Euclidean distance of each image (N, ...) uint8 to the nearest of the reference, pixels in [0, 1]."""
    x, ref = (a.flatten(1).double() / 255 for a in (images, reference))
    return torch.cdist(x, ref).amin(1)
