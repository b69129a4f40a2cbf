"""Detection of copied training images, by a calibrated threshold on the distance to the nearest training image.

Distances are relative to those between training images nearby.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

RATE = 0.005
"""False-alarm rate that the threshold allows: the share of images that are not copies and yet are flagged."""
NEIGHBOURS = 5
LEAST = 20
"""Minimum number of training images, below which no usual distance can be estimated."""
SIDE, MAX_COMPONENTS, KEPT_VARIANCE = 32, 128, 0.95
FITTED = CALIBRATED = 4000
_CELLS = 2**24


class Judgement(NamedTuple):
    """Images compared with the training images, each field (B,).

    Attributes:
        ratio: distance to the nearest training image over the usual one there; 0 for a copy, about 1 for a new image.
        authentic: whether that training image is nearer to another one than to the image (Alaa et al. 2022, Eq. 4).
        nearest: index of that training image.
    """

    ratio: Tensor
    authentic: Tensor
    nearest: Tensor


@dataclass(frozen=True)
class Calibration:
    """The ratio below which an image counts as a copy, and the false alarms that it causes.

    Attributes:
        threshold: images with a ratio below it are flagged as copies.
        false_alarms: number of real images flagged, out of `real` images that are not copies.
        authenticity: share of those real images that are authentic; None without held-out images.
    """

    threshold: float
    false_alarms: int
    real: int
    authenticity: float | None


class CopyDetector:
    """A detector of copies of training images, mirrored or not, by distances between principal components.

    An image's even and odd parts under the horizontal flip are projected separately, so that a flip changes only signs.
    Components are divided by the root of their standard deviation, half way to whitening: the noise of a noisy copy is
    spread over all of them, while the difference between two images is not.

    The usual distance near an image is that to its second nearest training image (Yoon et al. 2023), or, if larger, the
    median distance from its five nearest ones to their own nearest neighbours. So a copy is found even if the original
    occurs twice, and images that occur many times, such as those of a few simple patterns, do not count as copies.

    Args:
        training: (N, C, H, W) uint8, at least `LEAST` images; a side above 32 pixels is averaged down to 32.
        device: where distances are computed, in float32.
    """

    calibration: Calibration

    def __init__(self, training: Tensor, device: torch.device | str = "cpu") -> None:
        if len(training) < LEAST:
            raise ValueError(f"copy detection needs at least {LEAST} training images, got {len(training)}")
        self.device = torch.device(device)
        parts = [self._parts(images) for images in training[_some(len(training), FITTED)].split(1024)]
        even, odd = (torch.cat(part) for part in zip(*parts, strict=True))
        self.mean = even.mean(0)
        spectra = [torch.linalg.eigh(x.T @ x / len(x)) for x in (even - self.mean, odd)]
        variances = torch.cat([variance for variance, _ in spectra]).sort(descending=True).values.clamp_min(0)
        enough = int((variances.cumsum(0) < KEPT_VARIANCE * variances.sum()).sum())
        least = max(float(variances[: MAX_COMPONENTS + 1][min(enough, MAX_COMPONENTS - 1, len(variances) - 1)]), 1e-12)
        kept = [(variance >= least, variance, basis) for variance, basis in spectra]
        self.bases = [basis[:, k] * variance[k] ** -0.25 for k, variance, basis in kept]
        self.even = self.bases[0].shape[1]
        """Number of components of the even part, which come first."""
        self.points = torch.cat([self._project(images) for images in training.split(1024)])
        self.size = self.points.square().sum(1)
        self.rounding = 0.01 * float(self.size.mean().sqrt()) + 1e-12
        """Distance below which images count as equal."""
        # Filled in on demand: each training image's distances to its two nearest others, and the index of the nearest.
        self.own = torch.full((len(training), 2), torch.nan, device=self.device)
        self.other = torch.zeros(len(training), dtype=torch.int64, device=self.device)

    def judge(self, images: Tensor) -> Judgement:
        """Judge images (B, C, H, W) uint8."""
        return self._judge(self._project(images))

    def calibrate(self, held_out: Iterable[Tensor] = ()) -> Calibration:
        """Find the threshold from leave-one-out training images, and count the held-out images that it flags.

        Args:
            held_out: batches (B, C, H, W) uint8 of images that are neither trained on nor judged. Without any, the
                leave-one-out training images are counted instead.
        """
        chosen = _some(len(self.points), CALIBRATED).to(self.device)
        chosen = chosen[self._own(chosen)[:, 0] > self.rounding]  # drop repeated images, which are copies themselves
        ratios = self._judge(self.points[chosen], chosen).ratio.sort().values
        rank = max(1, int(RATE * (len(ratios) + 1)))
        threshold = float(ratios[rank - 1]) if len(ratios) else 0.0
        judged = [self.judge(batch) for batch in held_out]
        if not judged:
            return Calibration(threshold, rank, max(rank, len(ratios)), None)
        ratio, authentic, _ = (torch.cat(part) for part in zip(*judged, strict=True))
        return Calibration(threshold, int((ratio < threshold).sum()), len(ratio), float(authentic.double().mean()))

    def _judge(self, points: Tensor, left_out: Tensor | None = None) -> Judgement:
        distance, near = self._nearest(points, NEIGHBOURS, left_out)
        nearest_two = self._own(near)
        own = nearest_two[..., 0]
        if left_out is not None:
            own = torch.where(self.other[near] == left_out[:, None], nearest_two[..., 1], own)
        usual = torch.maximum(distance[:, 1], own.median(1).values)
        ratio = (distance[:, 0] + self.rounding) / (usual + self.rounding)
        return Judgement(ratio, distance[:, 0] > own[:, 0], near[:, 0])

    def _own(self, index: Tensor) -> Tensor:
        unknown = index[self.own[index, 0].isnan()].unique()
        self.own[unknown], others = self._nearest(self.points[unknown], 2, unknown)
        self.other[unknown] = others[:, 0]
        return self.own[index]

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
        """Return the even and odd parts of images under the horizontal flip, (B, D) each, left half only."""
        x = images.to(self.device).float() / 255
        if max(x.shape[-2:]) > SIDE:
            x = adaptive_avg_pool2d(x, (min(SIDE, x.shape[-2]), min(SIDE, x.shape[-1])))
        half, mirrored = (a[..., : (x.shape[-1] + 1) // 2].flatten(1) for a in (x, x.flip(3)))
        return (half + mirrored) * 2**-0.5, (half - mirrored) * 2**-0.5


def _some(count: int, most: int) -> Tensor:
    """Return at most `most` of the numbers 0..count-1 in random order, the same on every call."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most]
