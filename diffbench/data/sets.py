"""What a data set of images is to the rest of the package."""

import hashlib
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffbench.core.pixels import from_uint8


@dataclass(frozen=True)
class ImageSet:
    """Images (N, C, H, W) uint8, possibly a memory map, and labels (N,) int64 in 0..num_classes-1.

    Attributes:
        num_classes: 0 for images without labels, whose `labels` are all 0.
        name: of the data set; a copy compressed with loss never has the original's name.
        class_names: by label; empty where the classes have no names.
        digest: the fingerprint, where it is known already.
        extractor: the feature extractor that suits these images.
        formats: file format -> number of images that came in it; empty where they did not come from files.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    name: str = "images"
    class_names: tuple[str, ...] = ()
    digest: str | None = None
    extractor: str = "efficientnet-lite0"
    formats: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of a hash of all pixels and labels."""
        if self.digest is not None:
            return self.digest
        digest = hashlib.sha256(self.images.contiguous().numpy().data.cast("B"))
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:16]

    def gather(self, index: Tensor) -> dict[str, Tensor]:
        """The batch of the images with numbers `index` (B,)."""
        return {"image": rows(self.images, index), "label": rows(self.labels, index)}

    def clean(self, index: Tensor) -> Tensor:
        """What validation restores of the images `index` (B,): (B, C, H, W) float32 in [-1, 1]."""
        return from_uint8(rows(self.images, index))

    def to(self, device: torch.device) -> "ImageSet":
        """The set on a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes of images and labels."""
        return self.images.nbytes + self.labels.nbytes

    def first(self, count: int) -> "ImageSet":
        """The first `count` images, or all if there are fewer."""
        return replace(self, images=self.images[:count], labels=self.labels[:count], digest=None)

    def spread(self, count: int) -> "ImageSet":
        """At most `count` images, spread evenly over the classes."""
        if count >= len(self):
            return self
        index = balanced(self.labels, count)
        return replace(self, images=rows(self.images, index), labels=self.labels[index], digest=None)


def rows(array: Tensor, index: Tensor) -> Tensor:
    """array[index], as a copy of entire rows: by NumPy on the CPU, several times as fast as indexing by torch."""
    if array.is_cpu:
        return torch.from_numpy(array.numpy().take(index.numpy(), axis=0))
    return array.index_select(0, index)


def balanced(labels: Tensor, count: int) -> Tensor:
    """Indices of the first `count` items spread evenly over the classes, class by class, in the set's order."""
    classes = labels.unique()
    each, extra = divmod(count, len(classes))
    parts = [(labels == c).nonzero()[:, 0][: each + (i < extra)] for i, c in enumerate(classes)]
    return torch.cat(parts)
