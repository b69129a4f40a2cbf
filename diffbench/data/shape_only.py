"""No images at all: the shape of what a network denoises whose training data is not here."""

from dataclasses import dataclass

import torch

from diffbench.data.sets import ImageSet


@dataclass
class NoneConfig:
    """The shape of images that are not here, as of an imported network; nothing trains or is scored on them."""

    channels: int = 3
    image_size: int = 32
    """Pixels a side, or a latent's places."""
    num_classes: int = 0
    num_workers: int = 0
    """As for other data; nothing is loaded."""

    def __post_init__(self) -> None:
        for name, least in {"channels": 1, "image_size": 1, "num_classes": 0, "num_workers": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}: must be at least {least}, got {getattr(self, name)}")


def nothing(config: NoneConfig) -> tuple[ImageSet, ImageSet]:
    """Two parts without images, which know their shape and classes."""
    images = torch.empty(0, config.channels, config.image_size, config.image_size, dtype=torch.uint8)
    part = ImageSet(images, torch.empty(0, dtype=torch.int64), config.num_classes)
    return part, part
