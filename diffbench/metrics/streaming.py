"""The same distances as torchmetrics: fed batch by batch, on any number of processes, each with one all-reduce.

Every state is a float64 sum, so that states merge by adding: in batches of any size and order, over processes of
which some have nothing, and from a checkpoint. They hold statistics only, no network: a feature extractor
(`extractors`) stands outside and serves all of them at once.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from diffbench.metrics.functional import Gaussian, frechet, nearest_distance


class Sums(Metric):
    """A metric whose states are float64 sums."""

    full_state_update = False

    def __init__(self) -> None:
        # A cached value on a process that got nothing new would leave the others waiting in the all-reduce.
        super().__init__(compute_with_cache=False)

    def add_sum(self, name: str, *shape: int) -> None:
        """Registers a state of zeros."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)

    @property
    def update_called(self) -> bool:
        """Always true: a process without a sample of its own is no mistake."""
        return True

    def forward(self, *_: Any, **__: Any) -> Any:
        """Refused: a batch's own distance means nothing, and the base class would count the batch twice."""
        raise TypeError(f"{type(self).__name__}: use update() for each batch and compute() once at the end")

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        # The base class gathers every process's copy of every state, and then sums.
        states = [getattr(self, name) for name in self._defaults]
        packed = torch.cat([state.flatten() for state in states])
        dist.all_reduce(packed, group=process_group or self.process_group)
        for name, part in zip(self._defaults, packed.split([s.numel() for s in states]), strict=True):
            setattr(self, name, part.view_as(getattr(self, name)))

    def _check(self, found: Tensor, bad: Tensor, count: int | None = None) -> int:
        """The number of samples, once it is the right one and all of them are finite."""
        n, name = int(found), type(self).__name__
        if int(bad):
            raise ValueError(f"{name}: {int(bad)} of {n} samples have non-finite features")
        if count is not None and n != count:
            raise ValueError(f"{name}: got {n} samples where {count} were announced; were some padded or dropped?")
        return n


class Moments(Sums):
    """Gaussian fit of features.

    Args:
        dim: of a feature vector.
        count: how many samples there will be, checked in the end; None for any number.
        center: (dim,) a point near the mean, the same on every process; sums about it lose no digits.
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
        """Takes in features (B, dim)."""
        x, finite = finite_rows(features, self.total)
        x = torch.where(finite[:, None], x - self.center.to(x), 0)
        self.n += len(x)
        self.bad += (~finite).sum()
        self.total += x.sum(0)
        self.outer += x.T @ x

    def gaussian(self) -> Gaussian:
        """The fit of what the states hold."""
        n = self._check(self.n, self.bad, self.count)
        if n < 2:
            raise ValueError(f"{type(self).__name__}: a covariance needs at least 2 samples, got {n}")
        mean = self.total / n
        cov = (self.outer - n * mean.outer(mean)) / (n - 1)
        return Gaussian(n, self.center.to(mean) + mean, cov)

    def compute(self) -> Any:
        """The Gaussian fit."""
        return self.gaussian()


class FrechetDistance(Moments):
    """Squared Fréchet distances to Gaussians (Heusel et al. 2017), by name; of spatial features it is sFID.

    Args:
        references: name -> fit of real images; all of one feature space.
        count: how many samples there will be, checked in the end; None for any number.
    """

    higher_is_better = False

    def __init__(self, references: Mapping[str, Gaussian], count: int | None = None) -> None:
        first = next(iter(references.values()))
        super().__init__(len(first.mean), count, center=first.mean)
        self.references = dict(references)

    def compute(self) -> dict[str, Tensor]:
        """name -> distance, a float64 scalar."""
        fit = self.gaussian()
        return {name: frechet(fit, on(reference, fit.mean)) for name, reference in self.references.items()}


class InceptionScore(Sums):
    """exp of the mean divergence of p(y|x) from p(y) (Salimans et al. 2016), as the ADM evaluator takes it.

    The score is the mean over consecutive chunks of 5,000 samples by number, a shorter last one counting like the
    rest. So the order of the numbers matters: they should be shuffled where the labels are not. (torch-fidelity
    instead shuffles and takes ten splits.)

    Args:
        classes: of the logits.
        count: samples in all.
        chunk: samples of a chunk.
    """

    higher_is_better = True
    n: Tensor
    bad: Tensor
    p: Tensor
    negative_entropy: Tensor

    def __init__(self, classes: int, count: int, chunk: int = 5000) -> None:
        super().__init__()
        self.count, self.chunk = count, chunk
        chunks = -(-count // chunk)
        self.add_sum("n", chunks)
        self.add_sum("bad")
        self.add_sum("p", chunks, classes)
        self.add_sum("negative_entropy", chunks)

    def update(self, logits: Tensor, index: Tensor) -> None:
        """Takes in logits (B, classes) of samples number `index` (B,)."""
        x, finite = finite_rows(logits, self.p)
        chunk = index.to(x.device) // self.chunk
        log_p = torch.where(finite[:, None], x, 0).log_softmax(1)
        self.n.index_add_(0, chunk, torch.ones_like(x[:, 0]))
        self.bad += (~finite).sum()
        self.p.index_add_(0, chunk, log_p.exp())
        self.negative_entropy.index_add_(0, chunk, (log_p.exp() * log_p).sum(1))

    def compute(self) -> Tensor:
        """The score, a float64 scalar."""
        self._check(self.n.sum(), self.bad, self.count)
        marginal = self.p / self.n[:, None]
        entropy = torch.special.xlogy(marginal, marginal).sum(1)
        return (self.negative_entropy / self.n - entropy).exp().mean()


class LabelAccuracy(Sums):
    """Share of samples whose label the extractor's classifier names."""

    higher_is_better = True
    n: Tensor
    bad: Tensor
    right: Tensor

    def __init__(self, count: int | None = None) -> None:
        super().__init__()
        self.count = count
        for name in ("n", "bad", "right"):
            self.add_sum(name)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Takes in logits (B, classes) and labels (B,)."""
        self.n += len(labels)
        self.bad += (~logits.isfinite().all(1)).sum().to(self.bad)
        self.right += (logits.argmax(1) == labels.to(logits.device)).sum().to(self.right)

    def compute(self) -> Tensor:
        """The share, in 0 to 1."""
        return self.right / self._check(self.n, self.bad, self.count)


class NearestDistance(Sums):
    """Mean distance of images to their nearest reference image, pixels in [0, 1]; copies lie at zero."""

    n: Tensor
    bad: Tensor
    total: Tensor

    def __init__(self, reference: Tensor, count: int | None = None) -> None:
        super().__init__()
        self.reference, self.count = reference, count
        for name in ("n", "bad", "total"):
            self.add_sum(name)

    def update(self, images: Tensor) -> None:
        """Takes in images (B, C, H, W) uint8."""
        self.n += len(images)
        self.total += nearest_distance(images.to(self.total.device), self.reference).sum()

    def compute(self) -> Tensor:
        """The mean, a float64 scalar."""
        return self.total / self._check(self.n, self.bad, self.count)


def on(fit: Gaussian, like: Tensor) -> Gaussian:
    """A fit on the device and in the type of a tensor."""
    return Gaussian(fit.n, fit.mean.to(like), fit.cov.to(like))


def finite_rows(features: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, D) as float64 on the state's device, and which rows of them are finite."""
    if features.ndim != 2 or features.shape[1] != state.shape[-1]:
        raise ValueError(f"features must be (B, {state.shape[-1]}), got {tuple(features.shape)}")
    x = features.detach().to(state.device).double()
    return x, x.isfinite().all(1)
