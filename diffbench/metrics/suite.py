"""Everything that is measured of one set of samples: one pass of the extractor feeds all metrics."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffbench.metrics.extractors.base import Extractor, Features
from diffbench.metrics.functional import Gaussian
from diffbench.metrics.rows import DensityCoverage, FrechetInfinity, KernelDistance, PrecisionRecall, Rows
from diffbench.metrics.streaming import FrechetDistance, InceptionScore, LabelAccuracy, Moments, NearestDistance, Sums

KEPT = 10_000
"""Feature vectors kept of either side, at most, for distances that need the vectors themselves."""


@dataclass
class Reference:
    """Statistics of real images.

    Attributes:
        fit: of their features.
        rows: (M, D) float32 features of some or all of them, spread evenly; none where only the fit is known.
        spatial: fit of the spatial layer, where the extractor offers one.
    """

    fit: Gaussian
    rows: Tensor
    spatial: Gaussian | None = None


def statistics(extractor: Extractor, batches: Iterable[Tensor], count: int, keep: int) -> Reference:
    """Statistics of `count` pictures in batches (B, C, H, W) uint8, with the features of `keep` of them."""
    device = states_device(extractor.device)
    fit: Moments | None = None
    spatial: Moments | None = None
    rows = Rows(extractor.dim, count, keep).to(device)
    done = 0
    for batch in batches:
        features = extractor(batch)
        if fit is None:  # sums are taken about the first batch's mean
            fit = Moments(extractor.dim, count, features.pooled.mean(0)).to(device)
            if features.spatial is not None:
                spatial = Moments(features.spatial.shape[1], count, features.spatial.mean(0)).to(device)
        fit.update(features.pooled)
        rows.update(features.pooled, torch.arange(done, done + len(batch)))
        if spatial is not None and features.spatial is not None:
            spatial.update(features.spatial)
        done += len(batch)
    if fit is None:
        raise ValueError("statistics need at least 2 pictures, got none")
    return Reference(fit.gaussian(), rows.rows().float(), spatial.gaussian() if spatial is not None else None)


class Batch(NamedTuple):
    """Samples, their numbers and labels, and what the extractor says of them."""

    images: Tensor
    number: Tensor
    labels: Tensor | None
    features: Features


class Suite:
    """The metrics of `count` samples against real images.

    Args:
        extractor: whose features are compared.
        references: name -> statistics for Fréchet distances; "fd" is the one that all other distances compare with.
        count: samples in all.
        subsets: of row numbers for the kernel distance (see `KernelDistance`).
        brief: only the Fréchet and the kernel distance.
        labels: whether samples come with the labels that they were made for.
        training: (N, C, H, W) uint8 images to which copies would lie close.
        order: permutation of the samples for the extrapolation to infinitely many; None leaves it out.
        places: (count,) where each sample stands in the file whose consecutive chunks the Inception score takes; None
            for the order of their numbers.
    """

    def __init__(
        self,
        extractor: Extractor,
        references: Mapping[str, Reference],
        count: int,
        *,
        subsets: list[tuple[Tensor, Tensor]] | None = None,
        brief: bool = False,
        labels: bool = True,
        training: Tensor | None = None,
        order: Tensor | None = None,
        places: Tensor | None = None,
    ) -> None:
        at = torch.arange(count) if places is None else places
        self.extractor, self.count = extractor, count
        self._fed: list[tuple[Sums, Callable[[Batch], tuple[Any, ...]]]] = []
        main, keep = references["fd"], min(count, KEPT)
        self._add(FrechetDistance({n: r.fit for n, r in references.items()}, count), lambda b: (b.features.pooled,))
        if len(main.rows):
            self._add(KernelDistance(main.rows, count, keep, subsets), lambda b: (b.features.pooled, b.number))
        if brief:
            return
        if len(main.rows):
            self._add(PrecisionRecall(main.rows, count, keep), lambda b: (b.features.pooled, b.number))
            self._add(DensityCoverage(main.rows, count, keep), lambda b: (b.features.pooled, b.number))
        if extractor.classes is not None:
            self._add(InceptionScore(extractor.classes, count), lambda b: (b.features.logits, at[b.number.cpu()]))
        if extractor.judges_labels and labels:
            self._add(LabelAccuracy(count), lambda b: (b.features.logits, b.labels))
        if main.spatial is not None:
            self._add(FrechetDistance({"fd_spatial": main.spatial}, count), lambda b: (b.features.spatial,))
        if training is not None:
            self._add(NearestDistance(training, count), lambda b: (b.images,))
        if order is not None:
            self._add(FrechetInfinity(main.fit, count, order), lambda b: (b.features.pooled, b.number))

    def _add(self, metric: Sums, feed: Callable[[Batch], tuple[Any, ...]]) -> None:
        self._fed.append((metric.to(states_device(self.extractor.device)), feed))

    def update(self, images: Tensor, index: Tensor, labels: Tensor | None = None) -> None:
        """Takes in samples (B, C, H, W) uint8 number `index` (B,), made for `labels` (B,)."""
        batch = Batch(images, index, labels, self.extractor(images))
        for metric, feed in self._fed:
            metric.update(*feed(batch))

    def compute(self) -> dict[str, float]:
        """Short name -> value; every process must call it, in step, and gets the same."""
        values: dict[str, float] = {}
        for metric, _ in self._fed:
            found = metric.compute()
            named = found if isinstance(found, dict) else {NAMES[type(metric)]: found}
            values |= {name: float(value) for name, value in named.items()}
        return values


NAMES: dict[type, str] = {
    FrechetInfinity: "fd_infinity",
    InceptionScore: "inception_score",
    LabelAccuracy: "label_accuracy",
    NearestDistance: "nearest_train",
}


def states_device(device: torch.device) -> torch.device:
    """Where float64 sums can live: with the network, but for a device without float64."""
    return torch.device("cpu") if device.type == "mps" else device


def metric_name(short: str, extractor: Extractor, count: int) -> str:
    """The name under which a value is recorded: metric/extractor@count. Only the published protocol's may be FID."""
    if short.startswith("nearest"):
        return f"{short}@{count}"
    if extractor.published and short.startswith("fd"):
        short = "sfid" if short == "fd_spatial" else f"fid{short.removeprefix('fd')}"
    return f"{short}/{extractor.name}@{count}"
