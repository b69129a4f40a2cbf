"""Distance of samples to the nearest training image, in pixels; copies are at zero."""

from typing import Any, Self

import torch
from torch import Tensor

from diffbench.metrics.base import Batch, Measurement, SampleMetric, squared_distances


def nearest(images: Tensor, reference: Tensor, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """Find the nearest reference image of each image, in Euclidean distance of pixels in [0, 1].

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


class NearestDistance(SampleMetric):
    """Mean distance of images to their nearest reference image, pixels in [0, 1]; copies are at zero."""

    n: Tensor
    bad: Tensor
    total: Tensor

    def __init__(self, reference: Tensor, count: int | None = None) -> None:
        super().__init__()
        self.reference, self.count = reference, count
        for name in ("n", "bad", "total"):
            self.add_sum(name)

    @classmethod
    def of(cls, measurement: Measurement) -> Self | None:
        return None if measurement.training is None else cls(measurement.training, measurement.count)

    def arguments(self, batch: Batch) -> tuple[Any, ...]:
        return (batch.images,)

    def update(self, images: Tensor) -> None:
        """Add images (B, C, H, W) uint8."""
        self.n += len(images)
        self.total += nearest_distance(images.to(self.total.device), self.reference).sum()

    def compute(self) -> Tensor:
        """The mean, a float64 scalar."""
        return self.total / self.checked_count(self.n, self.bad, self.count)
