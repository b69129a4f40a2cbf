"""Precision, recall, density and coverage by nearest neighbours, as a function and as torchmetrics."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from diffbench.metrics.base import Measurement, Rows, squared_distances


class Neighbours(NamedTuple):
    """Shares of samples and of reference points, each in 0 to 1 except density, which has no upper bound."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(features: Tensor, reference: Tensor, k: int, chunk: int = 1024) -> Neighbours:
    """Compute precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    A point's ball reaches to its k-th nearest neighbour in its own set, not counting the point itself.
    Precision: share of samples inside the ball of some reference point; recall: share of reference points inside the
    ball of some sample; both include the boundary, as in the ADM evaluator. Density: mean number of reference balls
    around a sample, over k; coverage: share of reference balls with a sample inside; both exclude the boundary, as in
    the authors' code.

    Args:
        features: (N, D) features of samples, N > k.
        reference: (M, D) features of real images, M > k.
        k: rank of the neighbour that sets a ball's radius.
        chunk: rows of the distance matrix in memory at once.

    Raises:
        ValueError: if either side has k samples or fewer.
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


def _kth_neighbour(points: Tensor, k: int, chunk: int) -> Tensor:
    """Return each point's squared distance (N,) to its k-th nearest neighbour."""
    # The nearest of the k + 1 nearest points is the point itself.
    return torch.cat([squared_distances(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(chunk)])


class PrecisionRecall(Rows):
    """Improved precision and recall with k = 3 (Kynkäänniemi et al. 2019)."""

    higher_is_better = True
    names, k = ("precision", "recall"), 3

    def __init__(self, reference: Tensor, count: int, keep: int | None = None) -> None:
        super().__init__(reference.shape[1], count, keep)
        self.reference = reference

    @classmethod
    def of(cls, measurement: Measurement) -> Self | None:
        rows = measurement.main.rows
        return cls(rows, measurement.count, measurement.keep) if len(rows) else None

    def compute(self) -> dict[str, float]:
        x = self.rows()
        values = neighbours(x, self.reference.to(x), self.k)
        return {name: getattr(values, name) for name in self.names}


class DensityCoverage(PrecisionRecall):
    """Density and coverage with k = 5 (Naeem et al. 2020)."""

    names, k = ("density", "coverage"), 5
