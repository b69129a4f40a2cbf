"""Conversion of batches and data sets from other code, with or without labels, to diffbench's own."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from diffbench.core.pixels import from_uint8, to_uint8
from diffbench.data.latents import LatentSet
from diffbench.data.sets import ImageSet
from diffbench.data.transforms import is_grey, with_channels

IMAGE_NAMES = ("image", "img", "images", "pixel_values")
LABEL_NAMES = ("label", "labels", "class", "target", "fine_label")
"""Names of columns and entries, likeliest first."""
if TYPE_CHECKING:
    AnyDataset = Dataset[Any]
else:
    AnyDataset = Dataset  # jsonargparse, and so LightningCLI, accepts no subclass for Dataset[Any]


def unpack(batch: Any) -> dict[str, Any]:
    """Convert a batch to the dictionary that training reads.

    Args:
        batch: images, (images, labels), or a mapping with `image` and optionally `label` and `position` (or `x0`, or
            others of IMAGE_NAMES and LABEL_NAMES). Images are (B, C, H, W), float in [-1, 1] or uint8; latents are
            float of any range.

    Returns:
        x0 (B, C, H, W) float; label (B,) int64, or (B, labels) float weights, or None; and the rest of the mapping.

    Raises:
        ValueError: if the batch is anything else.
    """
    x0, label, rest = _take_apart(batch, ("x0", *IMAGE_NAMES))
    if not isinstance(x0, Tensor) or x0.ndim != 4 or not (x0.is_floating_point() or x0.dtype == torch.uint8):
        got = _kind(x0) if not isinstance(batch, Mapping) or x0 is not None else f"only {', '.join(map(str, batch))}"
        raise ValueError(
            "a batch must be images, (images, labels) or a mapping with `image` and `label`, with images float in -1..1"
            f" or uint8 of shape (B, C, H, W); got {got}"
        )
    if label is not None:
        if not isinstance(label, Tensor) or label.ndim != 1 + label.is_floating_point() or len(label) != len(x0):
            raise ValueError(
                f"labels must be whole numbers ({len(x0)},), or float weights ({len(x0)}, labels); got {_kind(label)}"
            )
        label = label if label.is_floating_point() else label.long()
    return {**rest, "x0": from_uint8(x0) if x0.dtype == torch.uint8 else x0, "label": label}


def _take_apart(item: Any, names: Sequence[str]) -> tuple[Any, Any, dict[str, Any]]:
    """Return the value of an item or batch under one of `names`, its label, and the rest; None for what it lacks."""
    parts = item if isinstance(item, tuple | list) else (item,)
    rest = dict(item) if isinstance(item, Mapping) else dict(zip((names[0], LABEL_NAMES[0]), parts, strict=False))
    value, label = (next((rest.pop(n) for n in of if n in rest), None) for of in (names, LABEL_NAMES))
    return value, label, rest


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def range_error(images: Tensor, pixels: bool = False) -> str | None:
    """Return a message about the wrong range of float images, or None; images in [-1, 1] have negative values.

    Latents may exceed that range; images known to be `pixels` may exceed it by one level of 256.
    """
    low, high = float(images.min()), float(images.max())
    message = f"images lie in {low:.3g}..{high:.3g}: give uint8, or float in -1..1"
    if not (low < 0 or low == high):
        return f"{message} (2 * x - 1 converts 0..1)"
    return message if pixels and max(-low, high) > 1 + 1 / 127.5 else None


def image_set(data: ImageSet | AnyDataset) -> ImageSet:
    """Read a data set's images into memory as uint8.

    Args:
        data: its items are images, (image, label), or mappings with `image` and `label` (or others of IMAGE_NAMES and
            LABEL_NAMES). An image is a Pillow image or a tensor (C, H, W), uint8 or float in [-1, 1], which is rounded
            to 256 levels; all have one size. Class names are its `classes`, or those of its features, as Hugging Face
            data sets have them. Random transforms are drawn only once; an iterable data set must be finite.

    Raises:
        ValueError: if the items are anything else.
    """
    if isinstance(data, ImageSet):
        return data
    images, labels = _columns(data, IMAGE_NAMES)
    stacked = _stacked([_tensor(image) for image in images], "images")
    if stacked.is_floating_point():
        if wrong := range_error(stacked, pixels=True):
            raise ValueError(wrong)
        stacked = to_uint8(stacked)
    return ImageSet(stacked, **_labelled(data, labels))


def latent_set(data: LatentSet | AnyDataset) -> LatentSet:
    """Read a data set's latents into memory, (C, H, W) float each, of about unit variance; otherwise as `image_set`."""
    if isinstance(data, LatentSet):
        return data
    latents, labels = _columns(data, ("latent", "latents"))
    mean = _stacked([torch.as_tensor(z) for z in latents], "latents")
    mean = mean.float() if mean.dtype == torch.bfloat16 else mean  # NumPy has no bfloat16
    return LatentSet(mean, torch.full_like(mean, -torch.inf), **_labelled(data, labels))


def _columns(data: Any, names: Sequence[str]) -> tuple[list[Any], list[Any]]:
    numbered = hasattr(data, "__len__") and not isinstance(data, IterableDataset)
    items = [data[i] for i in range(len(data))] if numbered else list(data)
    if not items:
        raise ValueError(f"{type(data).__name__} is empty")
    values, labels, _ = zip(*(_take_apart(item, names) for item in items), strict=True)
    if values[0] is None:
        got = f"it has {', '.join(items[0])}" if isinstance(items[0], Mapping) else f"got {items[0]!r:.40}"
        raise ValueError(f"an item must have one of {', '.join(names)}; {got}")
    return list(values), list(labels)


def _stacked(tensors: list[Tensor], what: str) -> Tensor:
    if len(shapes := list(dict.fromkeys(tuple(t.shape) for t in tensors))) > 1:
        raise ValueError(f"{what} must have one shape; got {shapes[0]} and {shapes[1]}")
    return torch.stack(tensors)


def _tensor(image: Any) -> Tensor:
    if isinstance(image, Image.Image):
        pixels = np.asarray(with_channels(image, 1 if is_grey(image) else 3))
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy())
    if not isinstance(image, Tensor) or image.ndim != 3:
        raise ValueError(f"an image must be one of Pillow's or a tensor (C, H, W), got {type(image).__name__}")
    return image


def _labelled(data: Any, labels: list[Any]) -> dict[str, Any]:
    """Return the labels, classes and name of a data set; without labels, all are 0 and there are no classes."""
    name = type(data).__name__
    if all(label is None for label in labels):
        return {"labels": torch.zeros(len(labels), dtype=torch.int64), "num_classes": 0, "name": name}
    numbers = torch.tensor([_whole_number(label) for label in labels])
    names = _class_names(data)
    classes = max(len(names), int(numbers.max()) + 1)
    return {
        "labels": numbers,
        "num_classes": classes,
        "name": name,
        "class_names": names if len(names) == classes else (),
    }


def _whole_number(label: Any) -> int:
    try:
        if int(label) == float(label):
            return int(label)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise ValueError(f"labels must be whole numbers, or all None; got {label!r:.40}")


def _class_names(data: Any) -> tuple[str, ...]:
    """Return the class names of a data set, or of the one that it is a subset of; empty if there are none."""
    features = getattr(data, "features", None)
    columns = [features[name] for name in LABEL_NAMES if name in features] if isinstance(features, Mapping) else []
    names = getattr(data, "classes", None)
    if names is None or not len(names):
        names = next((c.names for c in columns if hasattr(c, "names")), None)
    if names is None and hasattr(data, "dataset"):  # torch.utils.data.Subset
        return _class_names(data.dataset)
    return () if names is None else tuple(map(str, names))
