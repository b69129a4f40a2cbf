"""Copies of training images: how near an image is to one, against what is usual there, and a calibrated threshold."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

RATE = 0.005
"""False alarms that the threshold allows, as a share of images that are not copies."""
NEIGHBOURS = 5
LEAST = 20
"""Training images without which nothing is usual."""
SIDE, MOST, VARIANCE = 32, 128, 0.95
FITTED = CALIBRATED = 4000
_CELLS = 2**24


class Judged(NamedTuple):
    """Images against the training images, each (B,).

    Attributes:
        ratio: distance to the nearest training image over what is usual there; 0 for a copy, about 1 for a new image.
        authentic: whether that training image is nearer to another one than to the image (Alaa et al. 2022, Eq. 4).
        nearest: number of the training image.
    """

    ratio: Tensor
    authentic: Tensor
    nearest: Tensor


@dataclass(frozen=True)
class Calibration:
    """From which ratio on an image counts as a copy, and how often that is wrong.

    Attributes:
        threshold: images with a ratio below it are flagged.
        false_alarms: real images flagged that are not copies, out of `real`.
        authenticity: share of those real images that are authentic; None without held-out images.
    """

    threshold: float
    false_alarms: int
    real: int
    authenticity: float | None


class CopyDetector:
    """Training images as points among which copies are looked for, in either orientation.

    Points are principal components: an image's even and odd part under the horizontal flip are projected apart, so that
    a flip changes signs only. Components are divided by the root of their standard deviation, half way to whitening:
    the noise of a noisy copy is spread over all of them, a difference between two images is not.

    Usual near an image is the distance to its second nearest training image (Yoon et al. 2023), or the median distance
    of its five nearest ones to others where that is larger: so a copy is found whose original is there twice, and
    images that are there many times, as those of few possible patterns, are not taken for copies.

    Args:
        training: (N, C, H, W) uint8, at least `LEAST`; a side above 32 pixels is averaged down to 32.
        device: where distances are computed, in float32.
    """

    calibration: Calibration

    def __init__(self, training: Tensor, device: torch.device | str = "cpu") -> None:
        if len(training) < LEAST:
            raise ValueError(f"copies need at least {LEAST} training images, got {len(training)}")
        self.device = torch.device(device)
        parts = [self._parts(images) for images in training[_some(len(training), FITTED)].split(1024)]
        even, odd = (torch.cat(part) for part in zip(*parts, strict=True))
        self.mean = even.mean(0)
        spectra = [torch.linalg.eigh(x.T @ x / len(x)) for x in (even - self.mean, odd)]
        variances = torch.cat([variance for variance, _ in spectra]).sort(descending=True).values.clamp_min(0)
        enough = int((variances.cumsum(0) < VARIANCE * variances.sum()).sum())
        least = max(float(variances[: MOST + 1][min(enough, MOST - 1, len(variances) - 1)]), 1e-12)
        kept = [(variance >= least, variance, basis) for variance, basis in spectra]
        self.bases = [basis[:, k] * variance[k] ** -0.25 for k, variance, basis in kept]
        self.even = self.bases[0].shape[1]
        """Components of the even part; they come first."""
        self.points = torch.cat([self._project(images) for images in training.split(1024)])
        self.size = self.points.square().sum(1)
        self.rounding = 0.01 * float(self.size.mean().sqrt()) + 1e-12
        """Distance below which images count as equal."""
        # Of each training image, filled in as it is needed: its two nearest others, and the number of the first.
        self.own = torch.full((len(training), 2), torch.nan, device=self.device)
        self.other = torch.zeros(len(training), dtype=torch.int64, device=self.device)

    def judge(self, images: Tensor) -> Judged:
        """Judge images (B, C, H, W) uint8."""
        return self._judge(self._project(images))

    def calibrate(self, held_out: Iterable[Tensor] = ()) -> Calibration:
        """Find the threshold by training images, each left out in turn, and count the held-out images that it flags.

        Args:
            held_out: batches (B, C, H, W) uint8 of images that are neither trained on nor judged. Without any, the
                training images that were left out are counted.
        """
        chosen = _some(len(self.points), CALIBRATED).to(self.device)
        chosen = chosen[self._own(chosen)[:, 0] > self.rounding]  # a repeated image is a copy itself
        ratios = self._judge(self.points[chosen], chosen).ratio.sort().values
        rank = max(1, int(RATE * (len(ratios) + 1)))
        threshold = float(ratios[rank - 1]) if len(ratios) else 0.0
        judged = [self.judge(batch) for batch in held_out]
        if not judged:
            return Calibration(threshold, rank, max(rank, len(ratios)), None)
        ratio, authentic, _ = (torch.cat(part) for part in zip(*judged, strict=True))
        return Calibration(threshold, int((ratio < threshold).sum()), len(ratio), float(authentic.double().mean()))

    def _judge(self, points: Tensor, left_out: Tensor | None = None) -> Judged:
        distance, near = self._nearest(points, NEIGHBOURS, left_out)
        two = self._own(near)
        own = two[..., 0]
        if left_out is not None:
            own = torch.where(self.other[near] == left_out[:, None], two[..., 1], own)
        usual = torch.maximum(distance[:, 1], own.median(1).values)
        ratio = (distance[:, 0] + self.rounding) / (usual + self.rounding)
        return Judged(ratio, distance[:, 0] > own[:, 0], near[:, 0])

    def _own(self, numbers: Tensor) -> Tensor:
        unknown = numbers[self.own[numbers, 0].isnan()].unique()
        self.own[unknown], others = self._nearest(self.points[unknown], 2, unknown)
        self.other[unknown] = others[:, 0]
        return self.own[numbers]

    def _nearest(self, points: Tensor, k: int, left_out: Tensor | None) -> tuple[Tensor, Tensor]:
        found = [torch.zeros(0, k, device=self.device)], [torch.zeros(0, k, dtype=torch.int64, device=self.device)]
        n, e = len(self.points), self.even
        for rows in torch.arange(len(points), device=self.device).split(max(1, _CELLS // n)):
            x = points[rows]
            product = (x[:, e:] @ self.points[:, e:].T).abs_().addmm_(x[:, :e], self.points[:, :e].T)
            d = product.mul_(-2).add_(self.size).add_(x.square().sum(1)[:, None])
            if left_out is not None:
                d[torch.arange(len(x), device=self.device), left_out[rows]] = torch.inf
            nearest = d.topk(k, largest=False)
            found[0].append(nearest.values.clamp_min(0).sqrt())
            found[1].append(nearest.indices)
        return torch.cat(found[0]), torch.cat(found[1])

    def _project(self, images: Tensor) -> Tensor:
        even, odd = self._parts(images)
        return torch.cat([(even - self.mean) @ self.bases[0], odd @ self.bases[1]], dim=1)

    def _parts(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The even and the odd part of images under the horizontal flip, (B, D) each, without their mirror image."""
        x = images.to(self.device).float() / 255
        if max(x.shape[-2:]) > SIDE:
            x = adaptive_avg_pool2d(x, (min(SIDE, x.shape[-2]), min(SIDE, x.shape[-1])))
        half, mirrored = (a[..., : (x.shape[-1] + 1) // 2].flatten(1) for a in (x, x.flip(3)))
        return (half + mirrored) * 2**-0.5, (half - mirrored) * 2**-0.5


def _some(count: int, most: int) -> Tensor:
    """At most so many of the numbers 0..count-1, always the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most]
