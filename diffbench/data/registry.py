"""Registry of data sets by name; a new one takes a file with its config and loader, and a row here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from diffbench.core.errors import check_at_least
from diffbench.data.digits import DigitsConfig, digits
from diffbench.data.images import CIFAR10Config, cifar10, images
from diffbench.data.places import ImagesConfig
from diffbench.data.sets import DataConfig, ImageSet
from diffbench.data.shapes import ShapesConfig, shapes


@dataclass
class NoneConfig(DataConfig):
    """Image shape and class count only, for imported networks without a data set: no training, no scoring."""

    channels: int = 3
    image_size: int = 32
    """Side of an image in pixels, or of a latent."""
    num_classes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, "data", channels=1, image_size=1, num_classes=0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image, known before any is loaded."""
        return self.channels, self.image_size, self.image_size


def no_images(config: NoneConfig) -> tuple[ImageSet, ImageSet]:
    """Return two empty parts of the shape in the config."""
    images = torch.empty(0, config.channels, config.image_size, config.image_size, dtype=torch.uint8)
    part = ImageSet(images, torch.empty(0, dtype=torch.int64), config.num_classes)
    return part, part


@dataclass(frozen=True)
class Source:
    """A data set: its config dataclass, which knows the image shape, and the function that loads its two parts.

    The parts provide the rest, such as the classes and their names.
    """

    config: type
    load: Callable[[Any], tuple[ImageSet, ImageSet]]
    extractors: tuple[str, ...] = ("efficientnet-lite0", "random-cnn")
    """Feature extractors that suit the images, for configs that name none; the first installed one is used."""


SOURCES = {
    "digits": Source(DigitsConfig, digits, ("digits-cnn",)),
    "shapes": Source(ShapesConfig, shapes, ("random-cnn",)),
    "images": Source(ImagesConfig, images),
    "cifar10": Source(CIFAR10Config, cifar10),
    "none": Source(NoneConfig, no_images),
}
