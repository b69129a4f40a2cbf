"""In-memory data sets of images, as the rest of the package sees them; their common keys and their description."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from diffbench.core.errors import check_at_least
from diffbench.core.pixels import from_uint8

if TYPE_CHECKING:
    from diffbench.metrics.base import Rule


@dataclass
class DataConfig:
    """The keys shared by all data sets."""

    num_workers: int = field(default=0, kw_only=True)
    """DataLoader processes; 0 loads in the training process, which is fastest for data in memory."""

    def __post_init__(self) -> None:
        check_at_least(self, "data", num_workers=0)


@dataclass
class PlantedConfig(DataConfig):
    """The keys shared by data sets into which classes can be planted."""

    planted: dict[str, list[str]] = field(default_factory=dict, kw_only=True)
    """Classes to add after the data's own, name -> classes to copy images from: {copy of 3: [3], 0 or 1: [0, 1]}.
    The images are copied in memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, parts in self.planted.items():
            if not parts or len(set(parts)) < len(parts):
                raise ValueError(f"data.planted.{name}: must list different classes, such as [0, 1], got {parts}")


class InMemory:
    """Base class of image and latent sets, whose rows are in memory or in memory maps.

    Attributes:
        FIELDS: fields with a row for each image -> their names in a batch; a field may be None.
        labels: (N,) int64 classes.
        digest: the fingerprint, if already known.
    """

    FIELDS: ClassVar[dict[str, str]]
    labels: Tensor
    digest: str | None

    @property
    def arrays(self) -> dict[str, Tensor]:
        """The arrays of all fields that are not None, labels last."""
        found = {field: getattr(self, field) for field in (*self.FIELDS, "labels")}
        return {field: array for field, array in found.items() if array is not None}

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Return the first 16 hexadecimal digits of a hash of all rows, labels included."""
        if self.digest is None:
            object.__setattr__(self, "digest", digest_of(array.numpy() for array in self.arrays.values()))
        assert self.digest is not None
        return self.digest

    def gather(self, index: Tensor) -> dict[str, Tensor]:
        """Return the batch of the images with indices `index` (B,)."""
        names = self.FIELDS | {"labels": "label"}
        return {names[field]: take_rows(array, index) for field, array in self.arrays.items()}

    def to(self, device: torch.device | str) -> Self:
        return self._each(lambda array: array.to(device), self.digest)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def first(self, count: int) -> Self:
        """Return the first `count` images, or all if there are fewer."""
        return self._each(lambda array: array[:count])

    def balanced_subset(self, count: int) -> Self:
        """Return at most `count` images, spread evenly over the classes."""
        if count >= len(self):
            return self
        index = balanced(self.labels, count)
        return self._each(lambda array: take_rows(array, index))

    def _each(self, change: Callable[[Tensor], Tensor], digest: str | None = None) -> Self:
        changed: dict[str, Any] = {field: change(array) for field, array in self.arrays.items()}
        return replace(self, digest=digest, **changed)  # type: ignore[type-var]


def digest_of(arrays: Iterable[np.ndarray]) -> str:
    """Return the first 16 hexadecimal digits of a hash of the bytes of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data.cast("B"))
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ImageSet(InMemory):
    """Images (N, C, H, W) uint8, possibly a memory map, and labels (N,) int64 in 0..num_classes-1.

    Attributes:
        num_classes: 0 for images without labels, whose `labels` are all 0.
        name: name of the data set; a lossily compressed copy never has the original's name.
        class_names: by label; empty if the classes have no names.
        formats: file format -> number of images in it; empty if they did not come from files.
        origin: which part of the data set this is, in words.
        base: the set without planted classes, if it has some; extractors are made for that.
        sizes: "HEIGHTxWIDTH" in the file -> number of images; empty if they did not come from files.
        rule: rule that decides whether an image solves the task of its label, if the data set has tasks.
    """

    FIELDS = {"images": "image"}  # noqa: RUF012

    images: Tensor
    labels: Tensor
    num_classes: int
    name: str = "images"
    class_names: tuple[str, ...] = ()
    digest: str | None = None
    formats: dict[str, int] = field(default_factory=dict)
    origin: str = ""
    base: "ImageSet | None" = None
    sizes: dict[str, int] = field(default_factory=dict)
    rule: "Rule | None" = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"images must be uint8 (N, C, H, W) in 0..255, got {self.images.dtype} {tuple(self.images.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def clean(self, index: Tensor) -> Tensor:
        """Return the validation targets of the images `index` (B,): pixels (B, C, H, W), float32 in [-1, 1]."""
        return from_uint8(take_rows(self.images, index))


def describe(train: ImageSet, held_out: ImageSet) -> str:
    """Describe a data set in one line: its parts, and its classes with names and numbers of images."""
    counts = train.labels.bincount(minlength=train.num_classes).tolist()
    channels, height, width = train.shape
    parts = (len(train), train.origin), (len(held_out), held_out.origin)
    return f"{train.name}, {channels}x{height}x{width}: {describe_parts(*parts, counts, train.class_names)}"


def describe_parts(
    train: tuple[int, str], held_out: tuple[int, str], counts: Sequence[int], names: Sequence[str], most: int = 20
) -> str:
    """Describe a data set from the (size, origin) of its parts and the number of training images of each class."""
    parts = [
        f"{size:,} images {use}" + f" ({origin})" * bool(origin)
        for (size, origin), use in ((train, "to train on"), (held_out, "held out"))
    ]
    classes = f"{len(counts):,} class{'es' * (len(counts) > 1)}" if names or len(counts) > 1 else "no classes"
    if names:
        each = [f"{name} {count:,}" for name, count in zip(names, counts, strict=True)]
        if len(each) > most:
            each = [*each[: most // 2], f"... {each[-1]} ({min(counts):,} to {max(counts):,} images each)"]
        classes += f": {', '.join(each)}"
    return f"{', '.join(parts)}; {classes}"


def describe_sizes(data: ImageSet) -> str | None:
    """Describe in one line the sizes of images in their files and what was done to them; None if unknown."""
    if not data.sizes:
        return None
    _, height, width = data.shape
    sizes = np.array([size.split("x") for size in data.sizes], np.int64)
    counts, (high, wide) = np.array(list(data.sizes.values())), sizes.T
    if len(sizes) == 1:
        seen = f"all {high[0]}x{wide[0]}"
    else:
        spans = (" to ".join(map(str, np.unique([sides.min(), sides.max()]))) for sides in (high, wide))
        common = max(data.sizes, key=lambda size: data.sizes[size])
        seen = "{} high and {} wide, most often {}".format(*spans, common)
    if data.sizes.keys() == {f"{height}x{width}"}:
        return f"{seen}, used as they are"
    scale = np.maximum(height / high, width / wide)
    lost = 1 - height * width / (high * scale * wide * scale)
    line = f"{seen}; resized to {height}x{width}"
    if cropped := counts[lost > 0.005].sum():
        line += f", {cropped:,} of {counts.sum():,} cropped at the centre (up to {lost.max():.0%} of an image)"
    shorter = np.sort(np.repeat(sizes.min(1), np.minimum(counts, 1000)))
    side, hints = min(height, width), []
    if shorter[len(shorter) // 2] >= 2 * side:
        hints.append(f"data.image_size={2 * side} keeps more detail")
    ratio = np.average(high / wide, weights=counts)
    alike = counts[abs(high / wide / ratio - 1) < 0.05].sum() / counts.sum()
    other = 8 * round(side * max(ratio, 1 / ratio) / 8)
    if height == width and alike > 0.8 and abs(ratio - 1) > 0.1 and other > side:
        sides = f"{other},{side}" if ratio > 1 else f"{side},{other}"
        hints.append(f"data.image_size=[{sides}] crops less")
    return "; ".join([line, *hints])


def take_rows(array: Tensor, index: Tensor) -> Tensor:
    """Copy the rows array[index]; on the CPU by NumPy, which is several times as fast as indexing by torch."""
    if array.is_cpu:
        return torch.from_numpy(array.numpy().take(index.numpy(), axis=0))
    return array.index_select(0, index)


def balanced(labels: Tensor, count: int) -> Tensor:
    """Return the indices of the first `count` items spread evenly over the classes, sorted by class, then position."""
    classes = labels.unique()
    each, extra = divmod(count, len(classes))
    parts = [(labels == c).nonzero()[:, 0][: each + (i < extra)] for i, c in enumerate(classes)]
    return torch.cat(parts)
