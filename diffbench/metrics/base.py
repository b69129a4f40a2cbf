"""Base classes of the metrics: torchmetrics of float64 sums, updated batch by batch on any number of processes.

Float64 sums merge by adding: in batches of any size and order, over processes of which some have no samples, and from a
checkpoint. A metric holds statistics only and no network: one feature extractor serves all of them from outside.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from diffbench.metrics.copies import CopyDetector
from diffbench.metrics.extractors.base import Extractor

KEPT = 10_000
"""Feature vectors kept of either side, at most, for metrics that need the vectors themselves."""


class Gaussian(NamedTuple):
    """A Gaussian fit of n feature vectors: mean (D,) and unbiased covariance (D, D), float64."""

    n: int
    mean: Tensor
    cov: Tensor

    def like(self, other: Tensor) -> "Gaussian":
        return Gaussian(self.n, self.mean.to(other), self.cov.to(other))


@dataclass
class ReferenceStatistics:
    """Statistics of real images.

    Attributes:
        fit: of their features.
        rows: (M, D) float32 features of some or all of them, evenly spaced; none where only the fit is known.
        spatial: fit of the spatial layer, where the extractor offers one.
    """

    fit: Gaussian
    rows: Tensor
    spatial: Gaussian | None = None


def _permutation(n: int, *key: str | int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(zlib.crc32(repr(key).encode())))


@dataclass(frozen=True)
class Rule:
    """Decides without a network whether images solve the tasks of their labels.

    Attributes:
        holds: (images (B, C, H, W) uint8 on the CPU, labels (B,)) -> (B,) bool.
        abilities: the ability that each label's task asks for.
    """

    holds: Callable[[Tensor, Tensor], Tensor]
    abilities: tuple[str, ...]


@dataclass
class Measurement:
    """Samples and what they are compared with: all that a metric is made from.

    Attributes:
        extractor: whose features are compared.
        references: name -> statistics for Fréchet distances; every other metric compares with "fd".
        labels: whether samples come with the labels that they were drawn for.
        detector: of copies of training images; None leaves that metric out.
        infinity: whether the Fréchet distance is extrapolated too.
        by_class: whether samples are numbered class by class. The Inception score's chunks are then taken of them as
            they are shuffled for export.
        permutation: (n, *key) -> a permutation of n numbers that follows from the key alone.
        rule: of the data set, where its labels are tasks.
    """

    extractor: Extractor
    references: Mapping[str, ReferenceStatistics]
    count: int
    labels: bool = True
    detector: CopyDetector | None = None
    infinity: bool = False
    by_class: bool = False
    permutation: Callable[..., Tensor] = _permutation
    rule: Rule | None = None

    @property
    def main(self) -> ReferenceStatistics:
        """Statistics that metrics other than the Fréchet distance compare with."""
        return self.references["fd"]

    @property
    def keep(self) -> int:
        """Samples whose feature vectors are kept."""
        return min(self.count, KEPT)


class SampleMetric(Metric):
    """A metric of samples whose states are float64 sums.

    Its `update` takes what it needs of a batch, by these names: `images` (B, C, H, W) uint8, `index` (B,) the numbers
    of the samples, `labels` (B,), and what the extractor gives: `features` (B, D), `logits` (B, K), `spatial` (B, S).
    """

    full_state_update = False

    def __init__(self) -> None:
        # A cached value on a process that got nothing new would leave the others waiting in the all-reduce.
        super().__init__(compute_with_cache=False)

    @classmethod
    def of(cls, measurement: Measurement) -> Self | None:
        """Make the metric for a measurement; None where it cannot be measured."""
        raise NotImplementedError

    def add_sum(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)

    @property
    def update_called(self) -> bool:
        """Always true: a process without a sample of its own is not a mistake."""
        return True

    def forward(self, *_: Any, **__: Any) -> Any:
        """Refused: a batch's own distance means nothing, and the base class would count the batch twice."""
        raise TypeError(f"{type(self).__name__}: use update() for each batch and compute() once at the end")

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        # The base class gathers every process's copy of every state, and then sums; one all-reduce does the same.
        states = [getattr(self, name) for name in self._defaults]
        packed = torch.cat([state.flatten() for state in states])
        dist.all_reduce(packed, group=process_group or self.process_group)
        for name, part in zip(self._defaults, packed.split([s.numel() for s in states]), strict=True):
            setattr(self, name, part.view_as(getattr(self, name)))

    def checked_count(self, found: Tensor, bad: Tensor, count: int | None = None) -> int:
        """The number of samples; ValueError if it is not the announced `count`, or some are not finite."""
        n, name = int(found), type(self).__name__
        if int(bad):
            raise ValueError(f"{name}: {int(bad)} of {n} samples have non-finite features")
        if count is not None and n != count:
            raise ValueError(f"{name}: got {n} samples where {count} were announced; were some padded or dropped?")
        return n


class Rows(SampleMetric):
    """A table of feature vectors by the number of their sample, so that neither order nor process matters.

    Args:
        count: samples in all; each must come exactly once.
        keep: how many are kept, evenly spaced over the count; None for all.
    """

    seen: Tensor
    bad: Tensor
    table: Tensor

    def __init__(self, dim: int, count: int, keep: int | None = None) -> None:
        super().__init__()
        self.count = count
        kept = evenly_spaced(count, count if keep is None else min(keep, count))
        self.slots = torch.full((count,), -1)
        self.slots[kept] = torch.arange(len(kept))
        self.add_sum("seen", count)
        self.add_sum("bad")
        self.add_sum("table", len(kept), dim)

    def update(self, features: Tensor, index: Tensor) -> None:
        """Add features (B, dim) of samples number `index` (B,)."""
        x, finite = finite_rows(features, self.table)
        slot = self.slots[index.cpu()].to(x.device)
        self.seen.index_add_(0, index.to(x.device), torch.ones_like(x[:, 0]))
        self.bad += (~finite).sum()
        self.table.index_add_(0, slot[slot >= 0], torch.where(finite[:, None], x, 0)[slot >= 0])

    def rows(self) -> Tensor:
        """Kept vectors (keep, dim); ValueError unless every sample came exactly once and is finite."""
        self.checked_count(self.seen.sum(), self.bad, self.count)
        wrong = (self.seen != 1).nonzero()[:, 0].tolist()
        if wrong:
            times = int(self.seen[wrong[0]])
            raise ValueError(f"{type(self).__name__}: sample {wrong[0]} came {times} times, {len(wrong)} such in all")
        return self.table

    def compute(self) -> Any:
        return self.rows()


def evenly_spaced(count: int, keep: int) -> Tensor:
    """`keep` of the numbers 0..count-1, evenly spaced."""
    return torch.arange(keep) * count // max(1, keep)


def finite_rows(features: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, D) as float64 on the state's device, and which rows of them are finite."""
    if features.ndim != 2 or features.shape[1] != state.shape[-1]:
        raise ValueError(f"features must be (B, {state.shape[-1]}), got {tuple(features.shape)}")
    x = features.detach().to(state.device).double()
    return x, x.isfinite().all(1)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, M) between float64 points (N, D) and (M, D); values within rounding error of zero are zero."""
    scale = x.square().sum(1)[:, None] + y.square().sum(1)
    d = scale - 2 * x @ y.T
    return torch.where(d > 1e-12 * scale, d, 0)


def states_device(device: torch.device) -> torch.device:
    """Device for float64 sums: the network's, or the CPU where that has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
