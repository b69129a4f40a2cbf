"""Image data sets by name: uint8 images and labels, split once and for all into training and held-out parts."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffbench.core.pixels import from_uint8


@dataclass(frozen=True)
class ImageSet:
    """Images (N, C, H, W) uint8 and labels (N,) int64 in 0..num_classes-1."""

    images: Tensor
    labels: Tensor
    num_classes: int

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> "ImageSet":
        """The first `count` images, or fewer where there are fewer."""
        return replace(self, images=self.images[:count], labels=self.labels[:count])

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """What a batch holds of the images `index` (B,): image (B, C, H, W) uint8, label (B,)."""
        return {"image": self.images[index], "label": self.labels[index]}

    def clean(self, index: Tensor) -> Tensor:
        """The images `index` (B,) as a denoiser is to restore them: (B, C, H, W) float32 in [-1, 1]."""
        return from_uint8(self.images[index])

    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of a hash of all pixels and labels."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass
class DigitsConfig:
    """scikit-learn's handwritten digits: 1,797 real 8x8 grey images in ten classes, inside the package."""

    held_out: int = 360
    """Images kept from training for validation, spread evenly over the classes; 10 to 1,000."""
    num_workers: int = 0
    """Loader processes; 0 loads in the training process, the fastest for data in memory."""
    size: int = 8
    """Side of the images; above 8 they are enlarged, bilinearly."""

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 512:
            raise ValueError(f"data.size must lie in 8 to 512, got {self.size}")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers must be at least 0, got {self.num_workers}")
        if not 10 <= self.held_out <= 1000:
            raise ValueError(f"data.held_out must lie in 10 to 1000, got {self.held_out}")


@cache
def _digits(held_out: int, size: int) -> tuple[ImageSet, ImageSet]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    # Sixteen grey levels, spread over the bytes: 16 becomes 255.
    images = (torch.from_numpy(bunch.images)[:, None] * (255 / 16)).round().to(torch.uint8)
    images = interpolate(images.float(), size=size, mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(range(len(labels)), test_size=held_out, stratify=bunch.target, random_state=0)
    return ImageSet(images[train], labels[train], 10), ImageSet(images[test], labels[test], 10)


def digits(config: DigitsConfig) -> tuple[ImageSet, ImageSet]:
    """The training and the held-out part."""
    return _digits(config.held_out, config.size)


@dataclass(frozen=True)
class Source:
    """A registered data set: its dataclass config and the function that reads its two parts."""

    config: type
    load: Callable[[Any], tuple[ImageSet, ImageSet]]


SOURCES = {"digits": Source(DigitsConfig, digits)}


def balanced(labels: Tensor, count: int) -> Tensor:
    """Indices of the first `count` items spread evenly over the classes, class by class, in the set's order."""
    classes = labels.unique()
    each, extra = divmod(count, len(classes))
    parts = [(labels == c).nonzero()[:, 0][: each + (i < extra)] for i, c in enumerate(classes)]
    return torch.cat(parts)
