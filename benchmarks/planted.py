"""Test of the copy detector: copies of training images are planted among held-out ones; how many does it find?

    python -m benchmarks.planted digits shapes16 shapes32 FOLDER_WITH_CIFAR10

In each draw, a random half of the held-out images measures the rate of false alarms; the copies replace some of at most
1,000 images of the other half.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffbench.core.pixels import from_uint8, to_uint8
from diffbench.data.digits import DigitsConfig, digits
from diffbench.data.images import CIFAR10Config, cifar10
from diffbench.data.sets import ImageSet
from diffbench.data.shapes import ShapesConfig, shapes
from diffbench.metrics.copies import CopyDetector
from diffbench.metrics.memorisation import Share, share_of_copies
from diffbench.reports.text import as_text

KINDS = ("exact", "flipped", "noise 0.05", "noise 0.1")
DRAWS = 20
MOST_FALSE, LEAST_FOUND = 0.05, 2 / 3


@dataclass
class Draw:
    """The result of one draw.

    Attributes:
        planted: kind -> whether each copy is flagged, (n,) bool.
        false_alarms: share of the held-out images that are flagged.
        share: the share of copies that the detector reports.
        count: number of images judged.
    """

    planted: dict[str, Tensor]
    false_alarms: float
    share: Share
    count: int

    def found(self, kinds: Sequence[str] = KINDS) -> tuple[int, int]:
        """Return the numbers of copies flagged and of copies planted."""
        return sum(int(self.planted[k].sum()) for k in kinds), sum(len(self.planted[k]) for k in kinds)

    @property
    def covered(self) -> bool:
        """Whether the interval of the reported share contains the true share of copies."""
        return self.share.low <= self.found()[1] / self.count <= self.share.high

    @property
    def passed(self) -> bool:
        """Whether at most 5% are false alarms and at least two thirds of the copies are found."""
        found, planted = self.found()
        return self.false_alarms <= MOST_FALSE and found >= LEAST_FOUND * planted


def kinds_of(images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Leave images (N, C, H, W) uint8 unchanged, flip them or add noise (sigma 0.05 or 0.1 in [-1, 1]), at random."""
    kind = torch.randint(len(KINDS), (len(images),), generator=generator)
    parts = [images[kind == i] for i in range(len(KINDS))]
    noisy = [
        to_uint8(from_uint8(x) + sigma * torch.randn(x.shape, generator=generator))
        for x, sigma in zip(parts[2:], (0.05, 0.1), strict=True)
    ]
    return dict(zip(KINDS, [parts[0], parts[1].flip(3), *noisy], strict=True))


def draws(train: ImageSet, held_out: ImageSet, shares: Sequence[float], seed: int = 0) -> dict[float, list[Draw]]:
    """Plant each share of copies among held-out images, in `DRAWS` random draws."""
    generator = torch.Generator().manual_seed(seed)
    detector = CopyDetector(train.images)
    threshold = detector.calibrate().threshold
    flags = torch.cat([detector.judge(images).ratio < threshold for images in held_out.images.split(1000)])
    return {
        share: [_draw(train, detector, threshold, flags, share, generator) for _ in range(DRAWS)] for share in shares
    }


def _draw(
    train: ImageSet, detector: CopyDetector, threshold: float, flags: Tensor, share: float, generator: torch.Generator
) -> Draw:
    others, apart = flags[torch.randperm(len(flags), generator=generator)].chunk(2)
    others = others[:1000]
    number = round(share * len(others))
    copied = train.images[torch.randperm(len(train), generator=generator)[:number]]
    others = others[number:]
    kinds = kinds_of(copied, generator)
    planted = {kind: detector.judge(images).ratio < threshold for kind, images in kinds.items()}
    flagged = sum(int(flags.sum()) for flags in planted.values()) + int(others.sum())
    reported = share_of_copies(flagged, number + len(others), int(apart.sum()), len(apart))
    return Draw(planted, float(others.double().mean()), reported, number + len(others))


def load(name: str) -> tuple[ImageSet, ImageSet]:
    """Load training and held-out images: digits, shapes16, shapes32, or CIFAR-10 from a folder."""
    if name == "digits":
        return digits(DigitsConfig())
    if name in ("shapes16", "shapes32"):
        return shapes(ShapesConfig(image_size=int(name[6:])))
    return cifar10(CIFAR10Config(path=name))


def main(names: Sequence[str]) -> None:
    """Print a row for each data set and share."""
    for name in names:
        rows = []
        train, held_out = load(name)
        for share, drawn in draws(train, held_out, (0.0, 0.01, 0.05, 0.2)).items():
            row = {"data": train.name, "planted": f"{share:.0%}"}
            for kind in KINDS:
                found, planted = (sum(n) for n in zip(*(d.found([kind]) for d in drawn), strict=True))
                row[kind] = f"{found} of {planted}"
            alarms = [d.false_alarms for d in drawn]
            row["false alarms, mean and most"] = f"{sum(alarms) / len(alarms):.1%}, {max(alarms):.1%}"
            row["draws passed"] = f"{sum(d.passed for d in drawn)} of {len(drawn)}"
            row["share reported"] = f"{sum(d.share.value for d in drawn) / len(drawn):.1%}"
            row["interval covers it"] = f"{sum(d.covered for d in drawn)} of {len(drawn)}"
            rows.append(row)
        print(as_text(rows), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
