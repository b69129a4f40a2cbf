"""What loaders and data sets of other people give: images with or without labels, as batches and as sets in memory."""

from collections.abc import Mapping, Sized
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from diffbench.core.pixels import from_uint8, to_uint8
from diffbench.data.latents import LatentSet
from diffbench.data.sets import ImageSet

Pair = tuple[Any, Any]


def unpack(batch: Any) -> dict[str, Any]:
    """A batch as training reads it.

    Args:
        batch: images, (images, labels), or a mapping with `image` (or `x0`) and perhaps `label` and `position`. Images
            are (B, C, H, W), float in [-1, 1] or uint8; latents are float of any range.

    Returns:
        x0 (B, C, H, W) float; label (B,) int64, or (B, labels) float weights, or None; and what else the mapping held.

    Raises:
        ValueError: if it is something else.
    """
    found = dict(batch) if isinstance(batch, Mapping) else dict(zip(("image", "label"), _parts(batch), strict=False))
    x0, label = found.pop("image", None) if "x0" not in found else found["x0"], found.get("label")
    if not isinstance(x0, Tensor) or x0.ndim != 4 or not (x0.is_floating_point() or x0.dtype == torch.uint8):
        shown = f"{x0.dtype} {tuple(x0.shape)}" if isinstance(x0, Tensor) else type(x0).__name__
        raise ValueError(
            "a batch must be images, (images, labels) or a mapping with `image` and `label`, its images float in -1..1"
            f" or uint8 of shape (B, C, H, W); got {shown}"
        )
    if isinstance(label, Tensor) and not label.is_floating_point():
        label = label.long()
    return {**found, "x0": from_uint8(x0) if x0.dtype == torch.uint8 else x0, "label": label}


def unscaled(images: Tensor) -> str | None:
    """What is wrong with the range of float images (of pixels, or of latents), or None: [-1, 1] has negative values."""
    low, high = float(images.min()), float(images.max())
    if low < 0 or low == high:
        return None
    return f"images lie in {low:.3g}..{high:.3g}: give uint8, or float in -1..1, as 2 * x - 1 makes of 0..1"


def image_set(data: ImageSet | Dataset[Any]) -> ImageSet:
    """A data set's images in memory, as uint8.

    Args:
        data: its items are images, (image, label), or mappings with `image` and `label`. An image is one of Pillow's or
            a tensor (C, H, W), uint8 or float in [-1, 1], which is rounded to 256 levels; all have one size. Its
            `classes` are the names of the classes, if it has them. What it draws at random is drawn once.

    Raises:
        ValueError: if items are something else.
    """
    if isinstance(data, ImageSet):
        return data
    images, labels = _columns(data, "image")
    stacked = torch.stack([_tensor(image) for image in images])
    if stacked.is_floating_point():
        if wrong := unscaled(stacked):
            raise ValueError(wrong)
        stacked = to_uint8(stacked)
    return ImageSet(stacked, **_labelled(data, labels))


def latent_set(data: LatentSet | Dataset[Any]) -> LatentSet:
    """A data set's latents in memory, about unit variance, (C, H, W) float each; otherwise as `image_set`."""
    if isinstance(data, LatentSet):
        return data
    latents, labels = _columns(data, "latent")
    mean = torch.stack([torch.as_tensor(z) for z in latents])
    return LatentSet(mean, torch.full_like(mean, -torch.inf), **_labelled(data, labels))


def _columns(data: Dataset[Any], name: str) -> tuple[list[Any], list[Any]]:
    items = [_item(data[i], name) for i in range(len(cast(Sized, data)))]
    if not items:
        raise ValueError(f"{type(data).__name__} is empty")
    images, labels = zip(*items, strict=True)
    return list(images), list(labels)


def _item(item: Any, name: str) -> Pair:
    if isinstance(item, Mapping):
        return item[name], item.get("label")
    parts = _parts(item)
    return parts[0], parts[1] if len(parts) > 1 else None


def _parts(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def _tensor(image: Any) -> Tensor:
    if isinstance(image, Image.Image):
        pixels = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy())
    if not isinstance(image, Tensor) or image.ndim != 3:
        raise ValueError(f"an image must be one of Pillow's or a tensor (C, H, W), got {type(image).__name__}")
    return image


def _labelled(data: Any, labels: list[Any]) -> dict[str, Any]:
    """Labels, classes and name of a set; without labels, all are 0 of no class."""
    name = type(data).__name__
    if labels[0] is None:
        return {"labels": torch.zeros(len(labels), dtype=torch.int64), "num_classes": 0, "name": name}
    numbers = torch.tensor([int(label) for label in labels])
    names = tuple(map(str, getattr(data, "classes", ())))
    classes = max(len(names), int(numbers.max()) + 1)
    return {
        "labels": numbers,
        "num_classes": classes,
        "name": name,
        "class_names": names if len(names) == classes else (),
    }
