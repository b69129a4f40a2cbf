"""The share of copies among samples with its confidence interval, and authenticity."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from diffbench.metrics.base import Measurement, Rows
from diffbench.metrics.copies import CopyDetector


class Share(NamedTuple):
    """A share with its 95% confidence interval, each in 0..1."""

    value: float
    low: float
    high: float


def share_of_copies(flagged: int, count: int, false_alarms: int, real: int) -> Share:
    """Estimate the share of copies among samples, corrected for false alarms.

    With a share c of copies and false-alarm rate f, c + (1 - c) f of the samples are flagged. Opposite ends of the
    exact 97.5% binomial intervals (Clopper & Pearson 1934) of the two rates give at least 95% coverage together.
    Copies that the detector misses are not counted.

    Args:
        flagged: number of samples flagged, out of `count`.
        false_alarms: number of real images flagged that are not copies, out of `real`.
    """
    low, high = _binomial_interval(flagged, count)
    least, most = _binomial_interval(false_alarms, real)
    rates = ((flagged / count, false_alarms / real), (low, most), (high, least))
    return Share(*(max(0.0, (p - f) / (1 - f)) if f < 1 else 0.0 for p, f in rates))


def _binomial_interval(k: int, n: int, confidence: float = 0.975) -> tuple[float, float]:
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    low = float(betaincinv(k, n - k + 1, tail)) if k else 0.0
    return low, float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0


class Memorisation(Rows):
    """The share of copies with its interval, and authenticity. Table columns are ratio, authentic and nearest."""

    def __init__(self, detector: CopyDetector, count: int) -> None:
        super().__init__(3, count)
        self.detector = detector

    @classmethod
    def of(cls, measurement: Measurement) -> Self | None:
        return None if measurement.detector is None else cls(measurement.detector, measurement.count)

    def update(self, images: Tensor, index: Tensor) -> None:
        """Add images (B, C, H, W) uint8 of the samples numbered `index` (B,)."""
        super().update(torch.stack([a.double() for a in self.detector.judge(images)], dim=1), index)

    def flagged(self) -> int:
        """Return the number of samples flagged as copies."""
        return int((self.rows()[:, 0] < self.detector.calibration.threshold).sum())

    def compute(self) -> dict[str, float]:
        calibration = self.detector.calibration
        share = share_of_copies(self.flagged(), self.count, calibration.false_alarms, calibration.real)
        authenticity = float(self.rows()[:, 1].mean())
        return {"copies": share.value, "copies_low": share.low, "copies_high": share.high, "authenticity": authenticity}
