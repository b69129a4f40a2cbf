"""Distances between sets of features, as plain functions. Float64 throughout."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """A Gaussian fit of n feature vectors: mean (D,) and unbiased covariance (D, D), float64."""

    n: int
    mean: Tensor
    cov: Tensor


def gaussian(features: Tensor) -> Gaussian:
    """The fit of features (N, D).

    Raises:
        ValueError: with fewer than two samples.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {len(features)}")
    x = features.double()
    return Gaussian(len(x), x.mean(0), x.T.cov().reshape(x.shape[1], x.shape[1]))


def frechet(a: Gaussian, b: Gaussian) -> Tensor:
    """Squared Fréchet distance of two Gaussians (Heusel et al. 2017), float64 scalar on their device.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). The last term is the nuclear norm of S1^(1/2) S2^(1/2): real by
    construction, and exact to rounding where a covariance is singular, as it is with fewer samples than features.
    """
    cross = torch.linalg.svdvals(_sqrt(a.cov) @ _sqrt(b.cov)).sum()
    return (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross


def _sqrt(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Squared Fréchet distance between Gaussian fits of two feature sets (N, D) and (M, D)."""
    return float(frechet(gaussian(features), gaussian(reference)))


def frechet_infinity(features: Tensor, reference: Gaussian, order: Tensor, points: int = 15) -> float:
    """The Fréchet distance extrapolated to infinitely many samples (Chong & Forsyth 2020); a diagnostic.

    A line in 1/N through the distances of the first N samples in `order`, for `points` values of N from 5,000 (half
    of the samples where there are fewer than 10,000) to all of them, read off at 1/N = 0. The bias of the reference's
    own finite number stays.

    Args:
        features: (N, D) of samples.
        reference: what they are compared with.
        order: (N,) a permutation of the samples.
        points: how many distances the line goes through.

    Raises:
        ValueError: under 5,000 samples, where the bias is not linear in 1/N.
    """
    n = len(features)
    if n < 5000:
        raise ValueError(f"fd_infinity needs at least 5,000 samples, where the bias is linear in 1/N; got {n:,}")
    counts = torch.linspace(5000 if n >= 10_000 else n // 2, n, points).long()
    distances = torch.stack([frechet(gaussian(features[order[:c]]), reference) for c in counts.tolist()])
    inverse = (1 / counts.double()).to(distances)
    slope = ((inverse - inverse.mean()) * distances).sum() / (inverse - inverse.mean()).square().sum()
    return float(distances.mean() - slope * inverse.mean())


def kernel_distance(features: Tensor, reference: Tensor) -> Tensor:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (KID; Binkowski et al. 2018), float64 scalar.

    Raises:
        ValueError: with fewer than two samples on either side.
    """
    x, y = features.double(), reference.double()
    n, m, width = len(x), len(y), x.shape[1]
    if min(n, m) < 2:
        raise ValueError(f"an unbiased kernel distance needs at least 2 samples on either side, got {n} and {m}")

    def total(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / width + 1).pow(3).sum()

    def own(a: Tensor) -> Tensor:
        return (a.square().sum(1) / width + 1).pow(3).sum()

    within = (total(x, x) - own(x)) / (n * (n - 1)) + (total(y, y) - own(y)) / (m * (m - 1))
    return within - 2 * total(x, y) / (n * m)


class Neighbours(NamedTuple):
    """Shares of samples and of reference points, each in 0 to 1 but for the density, which has no upper bound."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(features: Tensor, reference: Tensor, k: int, chunk: int = 1024) -> Neighbours:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    A point's ball reaches to its k-th nearest neighbour in its own set; a point is no neighbour of itself. Precision:
    samples inside the ball of a reference point; recall: reference points inside the ball of a sample, both with the
    rim, as the ADM evaluator counts. Density: reference balls that a sample lies in, over k; coverage: reference
    points whose ball holds a sample, both without the rim, as their authors count.

    Args:
        features: (N, D) of samples, N > k.
        reference: (M, D) of real images, M > k.
        k: which neighbour.
        chunk: rows of a distance matrix held at once.
    """
    if min(len(features), len(reference)) <= k:
        raise ValueError(f"k={k} neighbours need more than {k} samples, got {len(features)} and {len(reference)}")
    center = reference.double().mean(0)
    x, ref = features.double() - center, reference.double() - center
    x_radius, ref_radius = (_kth_neighbour(a, k, chunk) for a in (x, ref))
    precise = within = torch.zeros((), dtype=torch.float64, device=x.device)
    recalled = torch.zeros(len(ref), dtype=torch.bool, device=x.device)
    nearest = torch.full((len(ref),), torch.inf, dtype=torch.float64, device=x.device)
    for rows, radius in zip(x.split(chunk), x_radius.split(chunk), strict=True):
        d = squared_distances(rows, ref)
        precise = precise + (d <= ref_radius).any(1).sum()
        within = within + (d < ref_radius).sum()
        recalled |= (d <= radius[:, None]).any(0)
        nearest = torch.minimum(nearest, d.amin(0))
    n, covered = len(x), (nearest < ref_radius).double().mean()
    return Neighbours(float(precise / n), float(recalled.double().mean()), float(within / (k * n)), float(covered))


def coverage(features: Tensor, reference: Tensor, k: int = 5) -> float:
    """Share of the reference points (M, D) that have one of the samples (N, D) within their k-th nearest neighbour."""
    center = reference.double().mean(0)
    x, ref = features.double() - center, reference.double() - center
    nearest = torch.cat([squared_distances(rows, x).amin(1) for rows in ref.split(1024)])
    return float((nearest < _kth_neighbour(ref, k, 1024)).double().mean())


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, M) of float64 points (N, D) and (M, D); what cannot be told from zero in float64 is zero."""
    scale = x.square().sum(1)[:, None] + y.square().sum(1)
    d = scale - 2 * x @ y.T
    return torch.where(d > 1e-12 * scale, d, 0)


def _kth_neighbour(points: Tensor, k: int, chunk: int) -> Tensor:
    """(N,) squared distance of each point to its k-th nearest other one."""
    # The first of the k + 1 nearest is the point itself.
    return torch.cat([squared_distances(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(chunk)])


def nearest(images: Tensor, reference: Tensor, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """The nearest reference image of each image, in Euclidean distance of pixels in [0, 1].

    Args:
        images: (N, ...) uint8.
        reference: (M, ...) uint8.
        chunk: reference images compared at once.

    Returns:
        distances (N,) float64, indices (N,).
    """
    x = images.flatten(1).double() / 255
    best = x.new_full((len(x),), torch.inf)
    index = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for start in range(0, len(reference), chunk):
        part = reference[start : start + chunk].to(x.device).flatten(1).double() / 255
        d, i = squared_distances(x, part).min(1)
        index = torch.where(d < best, i + start, index)
        best = torch.minimum(best, d)
    return best.sqrt(), index


def nearest_distance(images: Tensor, reference: Tensor) -> Tensor:
    """(N,) Euclidean distance of each image (N, ...) uint8 to the nearest of the reference, pixels in [0, 1]."""
    return nearest(images, reference)[0]


def inception_score(logits: Sequence[Tensor]) -> float:
    """exp of the mean divergence of p(y|x) from p(y) (Salimans et al. 2016), averaged over chunks of logits (N, K).

    The ADM evaluator takes consecutive chunks of 5,000 in the file's order, a shorter last one counting like the rest.
    """
    scores = []
    for chunk in logits:
        log_p = chunk.double().log_softmax(1)
        p = log_p.exp()
        marginal = p.mean(0)
        scores.append(((p * log_p).sum(1).mean() - torch.special.xlogy(marginal, marginal).sum()).exp())
    return float(torch.stack(scores).mean())
