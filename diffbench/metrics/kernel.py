"""The kernel distance of features, KID (Binkowski et al. 2018), as a function and as a torchmetrics metric."""

from typing import Self

import torch
from torch import Tensor

from diffbench.metrics.base import Measurement, Rows

SUBSETS, SUBSET = 100, 1000
"""Number of subsets that the kernel distance is averaged over, and images per subset, as is common; fewer use all."""


def kernel_distance(features: Tensor, reference: Tensor) -> Tensor:
    """Compute the unbiased squared MMD of (N, D) and (M, D), N, M >= 2, with the kernel (x.y / D + 1)^3 (KID)."""
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


def subsets_of(measurement: Measurement) -> list[tuple[Tensor, Tensor]] | None:
    """Return (sample rows, reference rows) of each subset, the same for all runs; None if one subset takes all rows."""
    samples, real = measurement.keep, len(measurement.main.rows)
    size = min(SUBSET, samples, real)
    if size == samples == real:
        return None
    return [
        (
            measurement.permutation(samples, "kid", "samples", i)[:size],
            measurement.permutation(real, "kid", "real", i)[:size],
        )
        for i in range(SUBSETS)
    ]


class KernelDistance(Rows):
    """KID: mean and standard deviation of the unbiased squared MMD over subsets (Binkowski et al. 2018).

    Args:
        reference: (M, dim) features of real images.
        keep: number of samples whose features are kept.
        subsets: pairs (rows of the kept samples, rows of the reference); None compares all with all.
            The spread between subsets is not a confidence interval.
    """

    higher_is_better = False

    def __init__(
        self,
        reference: Tensor,
        count: int,
        keep: int | None = None,
        subsets: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        super().__init__(reference.shape[1], count, keep)
        self.reference, self.subsets = reference, subsets

    @classmethod
    def of(cls, measurement: Measurement) -> Self | None:
        rows = measurement.main.rows
        return cls(rows, measurement.count, measurement.keep, subsets_of(measurement)) if len(rows) else None

    def compute(self) -> dict[str, Tensor]:
        """Return "kid" and, if there are subsets, their standard deviation "kid_sd", as float64 scalars."""
        x = self.rows()
        y = self.reference.to(x)
        if self.subsets is None:
            return {"kid": kernel_distance(x, y)}
        values = torch.stack([kernel_distance(x[i.to(x.device)], y[j.to(x.device)]) for i, j in self.subsets])
        return {"kid": values.mean(), "kid_sd": values.std()}
