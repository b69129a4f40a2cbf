"""All metrics of one set of samples, and statistics of real images, from a single pass of the extractor."""

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
        brief: whether to compute only the metrics that are also measured in training.
    """

    def __init__(self, measurement: Measurement, brief: bool = False) -> None:
        self.extractor, self.count = measurement.extractor, measurement.count
        device = states_device(self.extractor.device)
        rows = [m for m in METRICS.values() if m.measure and (m.in_training or not brief)]
        # One name per class, which the collection uses as the metric's name if the class computes a single value.
        names = {m.measure: m.computed or m.name for m in rows if m.measure}
        candidates = [(name, measure.of(measurement)) for measure, name in names.items()]
        metrics: dict[str, Metric | MetricCollection] = {name: m for name, m in candidates if m is not None}
        self.metrics = MetricCollection(metrics, compute_groups=False).to(device)

    def update(self, images: Tensor, index: Tensor, labels: Tensor | None = None) -> None:
        """Add samples (B, C, H, W) uint8 numbered `index` (B,), drawn for `labels` (B,)."""
        features = self.extractor(images)
        outputs = {"features": features.pooled, "logits": features.logits, "spatial": features.spatial}
        self.metrics.update(images=images, index=index, labels=labels, **outputs)

    def compute(self) -> dict[str, float]:
        """Return name (without extractor and count) -> value; a collective call, with the same result on every rank."""
        values = {name: float(value) for name, value in self.metrics.compute().items()}
        order = {name: place for place, name in enumerate(METRICS)}
        return dict(sorted(values.items(), key=lambda item: order.get(item[0], len(order))))


def reference_statistics(extractor: Extractor, batches: Iterable[Tensor], count: int, keep: int) -> ReferenceStatistics:
    """Compute statistics of `count` images in batches (B, C, H, W) uint8, and keep the features of `keep` of them.

    Raises:
        ValueError: if there are fewer than two images, their number is not `count`, or features are not finite.
    """
    device = states_device(extractor.device)
    fit: Moments | None = None
    spatial: Moments | None = None
    rows = Rows(extractor.dim, count, keep).to(device)
    done = 0
    for batch in batches:
        features = extractor(batch)
        if fit is None:  # sums are taken about the mean of the first batch
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
