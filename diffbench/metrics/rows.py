"""Torchmetrics of distances that need the feature vectors themselves: a table of them, each in its sample's place."""

from typing import Any

import torch
from torch import Tensor

from diffbench.metrics.functional import Gaussian, frechet_infinity, kernel_distance, neighbours
from diffbench.metrics.streaming import Sums, finite_rows, on


class Rows(Sums):
    """Feature vectors by the number of their sample, so that neither order nor process matters.

    Args:
        dim: of a feature vector.
        count: samples in all; each must come exactly once.
        keep: how many are kept, spread evenly over the count; None for all.
    """

    seen: Tensor
    bad: Tensor
    table: Tensor

    def __init__(self, dim: int, count: int, keep: int | None = None) -> None:
        super().__init__()
        self.count = count
        kept = spread(count, count if keep is None else min(keep, count))
        self.slots = torch.full((count,), -1)
        self.slots[kept] = torch.arange(len(kept))
        self.add_sum("seen", count)
        self.add_sum("bad")
        self.add_sum("table", len(kept), dim)

    def update(self, features: Tensor, index: Tensor) -> None:
        """Takes in features (B, dim) of samples number `index` (B,)."""
        x, finite = finite_rows(features, self.table)
        slot = self.slots[index.cpu()].to(x.device)
        self.seen.index_add_(0, index.to(x.device), torch.ones_like(x[:, 0]))
        self.bad += (~finite).sum()
        self.table.index_add_(0, slot[slot >= 0], torch.where(finite[:, None], x, 0)[slot >= 0])

    def rows(self) -> Tensor:
        """(keep, dim) the kept vectors, once every sample has come exactly once."""
        self._check(self.seen.sum(), self.bad, self.count)
        wrong = (self.seen != 1).nonzero()[:, 0].tolist()
        if wrong:
            times = int(self.seen[wrong[0]])
            raise ValueError(f"{type(self).__name__}: sample {wrong[0]} came {times} times, {len(wrong)} such in all")
        return self.table

    def compute(self) -> Any:
        """The kept vectors."""
        return self.rows()


class KernelDistance(Rows):
    """KID: mean and standard deviation of the unbiased squared MMD over subsets (Binkowski et al. 2018).

    Args:
        reference: (M, dim) features of real images.
        count: samples in all.
        keep: how many of them are kept.
        subsets: pairs of row numbers, of the kept samples and of the reference; None compares all with all.
            The spread between subsets is no confidence interval.
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

    def compute(self) -> dict[str, Tensor]:
        """{"kid", "kid_sd"}, float64 scalars; the second only where there are subsets."""
        x = self.rows()
        y = self.reference.to(x)
        if self.subsets is None:
            return {"kid": kernel_distance(x, y)}
        values = torch.stack([kernel_distance(x[i.to(x.device)], y[j.to(x.device)]) for i, j in self.subsets])
        return {"kid": values.mean(), "kid_sd": values.std()}


class PrecisionRecall(Rows):
    """Improved precision and recall with k=3 (Kynkäänniemi et al. 2019)."""

    def __init__(self, reference: Tensor, count: int, keep: int | None = None, k: int = 3) -> None:
        super().__init__(reference.shape[1], count, keep)
        self.reference, self.k = reference, k

    def compute(self) -> dict[str, float]:
        """{"precision", "recall"}."""
        x = self.rows()
        found = neighbours(x, self.reference.to(x), self.k)
        return {"precision": found.precision, "recall": found.recall}


class DensityCoverage(PrecisionRecall):
    """Density and coverage with k=5 (Naeem et al. 2020)."""

    def __init__(self, reference: Tensor, count: int, keep: int | None = None, k: int = 5) -> None:
        super().__init__(reference, count, keep, k)

    def compute(self) -> dict[str, float]:
        """{"density", "coverage"}."""
        x = self.rows()
        found = neighbours(x, self.reference.to(x), self.k)
        return {"density": found.density, "coverage": found.coverage}


class FrechetInfinity(Rows):
    """`frechet_infinity` of all samples, in an order (count,) that the caller draws."""

    def __init__(self, reference: Gaussian, count: int, order: Tensor) -> None:
        if count < 5000:
            raise ValueError(f"fd_infinity needs at least 5,000 samples, got {count:,}")
        super().__init__(len(reference.mean), count)
        self.reference, self.order = reference, order

    def compute(self) -> float:
        """The extrapolated distance."""
        x = self.rows()
        return frechet_infinity(x, on(self.reference, x), self.order.to(x.device))


def spread(count: int, keep: int) -> Tensor:
    """`keep` of the numbers 0..count-1, evenly spread."""
    return torch.arange(keep) * count // max(1, keep)
