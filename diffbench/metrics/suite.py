"""All metrics of one set of samples, and statistics of real images: one pass of the extractor feeds everything."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from diffbench.metrics.base import Measurement, ReferenceStatistics, Rows, states_device
from diffbench.metrics.extractors.base import Extractor
from diffbench.metrics.frechet import Moments
from diffbench.metrics.registry import METRICS


class Suite:
    """The registered metrics of samples against real images.

    Args:
        measurement: the samples, and what they are compared with.
        brief: only the metrics that are also measured in training.
    """

    def __init__(self, measurement: Measurement, brief: bool = False) -> None:
        self.extractor, self.count = measurement.extractor, measurement.count
        device = states_device(self.extractor.device)
        rows = [m for m in METRICS.values() if m.measure and (m.in_training or not brief)]
        # A class may compute several metrics; where it computes one, this is its name.
        names = {m.measure: m.computed or m.name for m in rows if m.measure}
        made = [(name, measure.of(measurement)) for measure, name in names.items()]
        measured: dict[str, Metric | MetricCollection] = {name: metric for name, metric in made if metric is not None}
        self.metrics = MetricCollection(measured, compute_groups=False).to(device)

    def update(self, images: Tensor, index: Tensor, labels: Tensor | None = None) -> None:
        """Add samples (B, C, H, W) uint8 number `index` (B,), drawn for `labels` (B,)."""
        found = self.extractor(images)
        of_network = {"features": found.pooled, "logits": found.logits, "spatial": found.spatial}
        self.metrics.update(images=images, index=index, labels=labels, **of_network)

    def compute(self) -> dict[str, float]:
        """Name without extractor and count -> value; every process must call it, in step, and gets the same."""
        values = {name: float(value) for name, value in self.metrics.compute().items()}
        order = {name: place for place, name in enumerate(METRICS)}
        return dict(sorted(values.items(), key=lambda item: order.get(item[0], len(order))))


def reference_statistics(extractor: Extractor, batches: Iterable[Tensor], count: int, keep: int) -> ReferenceStatistics:
    """Statistics of `count` images in batches (B, C, H, W) uint8, with the features of `keep` of them.

    Raises:
        ValueError: if there are fewer than two images, another number than `count`, or features that are not finite.
    """
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
        raise ValueError("statistics need at least 2 images, got none")
    return ReferenceStatistics(fit.gaussian(), rows.rows().float(), spatial.gaussian() if spatial is not None else None)
