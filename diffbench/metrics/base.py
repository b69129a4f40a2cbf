"""Base classes of the metrics: torchmetrics whose states are float64 sums, updated by batch on any number of ranks.

Sums merge by addition, whatever the size and order of batches, also over ranks without samples and from a checkpoint.
A metric contains statistics but no network: a single feature extractor outside the metrics feeds all of them.
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
"""Maximum number of feature vectors kept per side, for metrics that need the vectors themselves."""


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
        fit: Gaussian fit of the images' features.
        rows: (M, D) float32 features of some or all images, evenly spaced; empty if only the fit is known.
        spatial: Gaussian fit of the spatial layer, if the extractor has one.
    """

    fit: Gaussian
    rows: Tensor
    spatial: Gaussian | None = None


def _permutation(n: int, *key: str | int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(zlib.crc32(repr(key).encode())))


@dataclass(frozen=True)
class Rule:
    """A rule that decides, without a network, whether images solve the tasks of their labels.

    Attributes:
        solves: (images (B, C, H, W) uint8 on the CPU, labels (B,)) -> (B,) bool.
        abilities: for each label, the ability that its task tests.
    """

    solves: Callable[[Tensor, Tensor], Tensor]
    abilities: tuple[str, ...]


@dataclass
class Measurement:
    """Everything that a metric is built from: facts about the samples, and what they are compared with.

    Attributes:
        extractor: the extractor whose features are compared.
        references: name -> statistics for Fréchet distances; every other metric compares with "fd".
        count: number of samples.
        labels: whether samples come with the labels that they were drawn for.
        detector: detector of copies of training images; None omits that metric.
        infinity: whether to extrapolate the Fréchet distance to infinitely many samples.
        by_class: whether samples are numbered class by class; the Inception score then uses the shuffled export order.
        permutation: (n, *key) -> a permutation of n numbers that depends on the key alone.
        rule: rule of the data set, if its labels are tasks.
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
        """The statistics that metrics other than the Fréchet distance compare with."""
        return self.references["fd"]

    @property
    def keep(self) -> int:
        """Number of samples whose feature vectors are kept."""
        return min(self.count, KEPT)


class SampleMetric(Metric):
    """A metric of samples whose states are float64 sums.

    `update` takes those of these arguments that the metric needs: `images` (B, C, H, W) uint8, `index` (B,) the numbers
    of the samples, `labels` (B,), and the extractor's `features` (B, D), `logits` (B, K) and `spatial` (B, S).
    """

    full_state_update = False

    def __init__(self) -> None:
        # A rank that returned a cached value would skip the all-reduce and leave the other ranks waiting in it.
        super().__init__(compute_with_cache=False)

    @classmethod
    def of(cls, measurement: Measurement) -> Self | None:
        """Make the metric for a measurement; return None if it cannot be measured."""
        raise NotImplementedError

    def add_sum(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)

    @property
    def update_called(self) -> bool:
        """Always true, since a rank may legitimately have no samples."""
        return True

    def forward(self, *_: Any, **__: Any) -> Any:
        """Raise TypeError: the distance of one batch is meaningless, and the base class would count the batch twice."""
        raise TypeError(f"{type(self).__name__}: use update() for each batch and compute() once at the end")

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        # The base class gathers every state from every rank and then sums; a single all-reduce does the same.
        states = [getattr(self, name) for name in self._defaults]
        packed = torch.cat([state.flatten() for state in states])
        dist.all_reduce(packed, group=process_group or self.process_group)
        for name, part in zip(self._defaults, packed.split([s.numel() for s in states]), strict=True):
            setattr(self, name, part.view_as(getattr(self, name)))

    def checked_count(self, found: Tensor, bad: Tensor, count: int | None = None) -> int:
        """Return the number of samples; raise ValueError if it differs from `count`, or some are not finite."""
        n, name = int(found), type(self).__name__
        if int(bad):
            raise ValueError(f"{name}: {int(bad)} of {n} samples have non-finite features")
        if count is not None and n != count:
            raise ValueError(f"{name}: got {n} samples, expected {count}; were some padded or dropped?")
        return n


class Rows(SampleMetric):
    """A table of feature vectors indexed by sample number, so that neither order nor rank matters.

    Args:
        count: total number of samples; each must be added exactly once.
        keep: how many vectors to keep, evenly spaced over the samples; None for all.
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
        """Add features (B, dim) of the samples numbered `index` (B,)."""
        x, finite = finite_rows(features, self.table)
        slot = self.slots[index.cpu()].to(x.device)
        self.seen.index_add_(0, index.to(x.device), torch.ones_like(x[:, 0]))
        self.bad += (~finite).sum()
        self.table.index_add_(0, slot[slot >= 0], torch.where(finite[:, None], x, 0)[slot >= 0])

    def rows(self) -> Tensor:
        """Return the kept vectors (keep, dim); raise ValueError unless every sample is finite and was added once."""
        self.checked_count(self.seen.sum(), self.bad, self.count)
        wrong = (self.seen != 1).nonzero()[:, 0].tolist()
        if wrong:
            name, times = type(self).__name__, int(self.seen[wrong[0]])
            raise ValueError(f"{name}: sample {wrong[0]} was added {times} times; {len(wrong)} were not added once")
        return self.table

    def compute(self) -> Any:
        return self.rows()


def evenly_spaced(count: int, keep: int) -> Tensor:
    """Return `keep` of the numbers 0..count-1, evenly spaced."""
    return torch.arange(keep) * count // max(1, keep)


def finite_rows(features: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return features (B, D) as float64 on the state's device, and a mask (B,) of the finite rows."""
    if features.ndim != 2 or features.shape[1] != state.shape[-1]:
        raise ValueError(f"features must be (B, {state.shape[-1]}), got {tuple(features.shape)}")
    x = features.detach().to(state.device).double()
    return x, x.isfinite().all(1)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return squared distances (N, M) of float64 points (N, D) and (M, D); values within rounding of zero are zero."""
    scale = x.square().sum(1)[:, None] + y.square().sum(1)
    d = scale - 2 * x @ y.T
    return torch.where(d > 1e-12 * scale, d, 0)


def states_device(device: torch.device) -> torch.device:
    """Return the device for float64 sums: the network's, or the CPU if that has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
