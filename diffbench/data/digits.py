"""scikit-learn's handwritten digits, which need no download."""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffbench.core import files, tensors
from diffbench.core.errors import UserError
from diffbench.data.sets import ImageSet, PlantedConfig


@dataclass
class DigitsConfig(PlantedConfig):
    """scikit-learn's handwritten digits: 1,797 real 8x8 grey images in ten classes, shipped with the package."""

    held_out: int = 360
    """Images held out for validation, spread evenly over the classes; 10 to 1,000."""
    size: int = 8
    """Side of the images in pixels; above 8, they are enlarged bilinearly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 8 <= self.size <= 512:
            raise ValueError(f"data.size: must lie in 8 to 512, got {self.size}")
        if not 10 <= self.held_out <= 1000:
            raise ValueError(f"data.held_out: must lie in 10 to 1000, got {self.held_out}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image, known before any is loaded."""
        return 1, self.size, self.size


def digits(config: DigitsConfig) -> tuple[ImageSet, ImageSet]:
    return _digits(config.held_out, config.size)


@cache
def _digits(held_out: int, size: int) -> tuple[ImageSet, ImageSet]:
    name = f"digits-{version('scikit-learn')}-{held_out}-{size}.safetensors"
    path = files.cache_folder() / name  # cached, because importing scikit-learn takes most of a second
    try:
        data = tensors.read(files.cached(path, lambda: tensors.write(path, _split(held_out, size))))[0]
    except (UserError, OSError):  # the cache is damaged or not writable
        data = _split(held_out, size)
    names = tuple("0123456789")
    train, test = (ImageSet(data[f"{p}.images"], data[f"{p}.labels"], 10, "digits", names) for p in ("train", "test"))
    return train, test


def _split(held_out: int, size: int) -> dict[str, Tensor]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    # Grey levels 0..16 become 0..255.
    pixels = (torch.from_numpy(bunch.images)[:, None] * (255 / 16)).round().to(torch.uint8)
    pixels = interpolate(pixels.float(), size=size, mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(range(len(labels)), test_size=held_out, stratify=bunch.target, random_state=0)
    parts = {"train": train, "test": test}
    return {f"{p}.{k}": v[i] for p, i in parts.items() for k, v in (("images", pixels), ("labels", labels))}
