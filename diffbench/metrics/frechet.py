"""Fréchet distances between Gaussian fits of features (Heusel et al. 2017), as functions and as torchmetrics."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from diffbench.metrics.base import Gaussian, Measurement, Rows, SampleMetric, finite_rows


def gaussian(features: Tensor) -> Gaussian:
    """Fit a Gaussian to features (N, D), N at least 2."""
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {len(features)}")
    x = features.double()
    return Gaussian(len(x), x.mean(0), x.T.cov().reshape(x.shape[1], x.shape[1]))


def frechet(a: Gaussian, b: Gaussian) -> Tensor:
    """Compute the squared Fréchet distance of two Gaussians (Heusel et al. 2017), a float64 scalar on their device.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). tr (S1 S2)^(1/2) is the nuclear norm of S1^(1/2) S2^(1/2): real by
    construction, and exact up to rounding even for singular covariances, such as with fewer samples than features.
    """
    cross = torch.linalg.svdvals(_sqrt(a.cov) @ _sqrt(b.cov)).sum()
    return (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross


def _sqrt(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Compute the squared Fréchet distance between Gaussian fits of two feature sets (N, D) and (M, D)."""
    return float(frechet(gaussian(features), gaussian(reference)))


def frechet_infinity(features: Tensor, reference: Gaussian, order: Tensor, points: int = 15) -> float:
    """Extrapolate the Fréchet distance to infinitely many samples (Chong & Forsyth 2020); a diagnostic.

    Fit a line in 1/N to the distances of the first N samples in `order`, for `points` values of N from 5,000 (half of
    the samples if there are fewer than 10,000) to all of them, and evaluate it at 1/N = 0. The bias from the finite
    number of reference images remains.

    Args:
        features: (N, D) features of samples.
        order: (N,) a permutation of the samples.

    Raises:
        ValueError: for fewer than 5,000 samples, where the bias is not linear in 1/N.
    """
    n = len(features)
    if n < 5000:
        raise ValueError(f"fd_infinity needs at least 5,000 samples, where the bias is linear in 1/N; got {n:,}")
    counts = torch.linspace(5000 if n >= 10_000 else n // 2, n, points).long()
    distances = torch.stack([frechet(gaussian(features[order[:c]]), reference) for c in counts.tolist()])
    inverse = (1 / counts.double()).to(distances)
    slope = ((inverse - inverse.mean()) * distances).sum() / (inverse - inverse.mean()).square().sum()
    return float(distances.mean() - slope * inverse.mean())


class Moments(SampleMetric):
    """A metric that computes the Gaussian fit of features.

    Args:
        count: expected number of samples, checked at the end; None for any number.
        center: (dim,) a point near the mean, the same on every rank; sums about it avoid cancellation.
    """

    n: Tensor
    bad: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, dim: int, count: int | None = None, center: Tensor | None = None) -> None:
        super().__init__()
        self.count = count
        self.center = torch.zeros(dim, dtype=torch.float64) if center is None else center.cpu().double()
        self.add_sum("n")
        self.add_sum("bad")
        self.add_sum("total", dim)
        self.add_sum("outer", dim, dim)

    def update(self, features: Tensor) -> None:
        x, finite = finite_rows(features, self.total)
        x = torch.where(finite[:, None], x - self.center.to(x), 0)
        self.n += len(x)
        self.bad += (~finite).sum()
        self.total += x.sum(0)
        self.outer += x.T @ x

    def gaussian(self) -> Gaussian:
        """Return the Gaussian fit of all samples; raise ValueError if there are fewer than two, or not `count`."""
        n = self.checked_count(self.n, self.bad, self.count)
        if n < 2:
            raise ValueError(f"{type(self).__name__}: a covariance needs at least 2 samples, got {n}")
        mean = self.total / n
        cov = (self.outer - n * mean.outer(mean)) / (n - 1)
        return Gaussian(n, self.center.to(mean) + mean, cov)

    def compute(self) -> Any:
        return self.gaussian()


class FrechetDistance(Moments):
    """Squared Fréchet distance to a Gaussian fit of real images (Heusel et al. 2017), or to several by name.

    Args:
        references: fit of real images; or several by name, all in one feature space.
        count: expected number of samples, checked at the end; None for any number.
    """

    higher_is_better = False

    def __init__(self, references: Gaussian | Mapping[str, Gaussian], count: int | None = None) -> None:
        self.alone = isinstance(references, Gaussian)
        named = {"fd": references} if isinstance(references, Gaussian) else dict(references)
        first = next(iter(named.values()))
        super().__init__(len(first.mean), count, center=first.mean)
        self.references = named

    @classmethod
    def of(cls, measurement: Measurement) -> Self | None:
        return cls({name: r.fit for name, r in measurement.references.items()}, measurement.count)

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Return the distance, a float64 scalar; or name -> distance for several references."""
        fit = self.gaussian()
        distances = {name: frechet(fit, reference.like(fit.mean)) for name, reference in self.references.items()}
        return distances["fd"] if self.alone else distances


class SpatialFrechetDistance(FrechetDistance):
    """sFID, the Fréchet distance of the extractor's spatial layer (Nash et al. 2021)."""

    @classmethod
    def of(cls, measurement: Measurement) -> Self | None:
        spatial = measurement.main.spatial
        return None if spatial is None else cls({"fd_spatial": spatial}, measurement.count)

    def update(self, spatial: Tensor) -> None:
        """Add the spatial layer (B, S) of samples."""
        super().update(spatial)


class FrechetInfinity(Rows):
    """`frechet_infinity` of all samples, in an order (count,) that the caller provides."""

    higher_is_better = False

    def __init__(self, reference: Gaussian, count: int, order: Tensor) -> None:
        if count < 5000:
            raise ValueError(f"fd_infinity needs at least 5,000 samples, got {count:,}")
        super().__init__(len(reference.mean), count)
        self.reference, self.order = reference, order

    @classmethod
    def of(cls, measurement: Measurement) -> Self | None:
        if not measurement.infinity:
            return None
        order = measurement.permutation(measurement.count, "order of samples", "fd_infinity")
        return cls(measurement.main.fit, measurement.count, order)

    def compute(self) -> float:
        x = self.rows()
        return frechet_infinity(x, self.reference.like(x), self.order.to(x.device))
