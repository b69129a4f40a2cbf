"""Small images of one's own, for tests, and what stands in for an autoencoder."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from diffbench.data.images import images
from diffbench.data.places import ImagesConfig
from diffbench.data.sets import ImageSet


def pixels(number: int, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    """An image of its own for each number."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def png(array: np.ndarray, kind: str = "PNG") -> bytes:
    """The image as a file's bytes."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def folder(root: Path, counts: dict[str, int], **shape: int) -> Path:
    """A folder of images 0, 1, ... in sub-folders with so many each ("" for the folder itself)."""
    number = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i:03d}.png").write_bytes(png(pixels(number, **shape)))
            number += 1
    return root


def table(path: Path, numbers: list[int], **columns: list[Any]) -> Path:
    """A parquet file of images in column `img`, as the hub stores them, and other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [{"bytes": png(pixels(n)), "path": None} for n in numbers]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"img": pa.array(files, kind), **columns}), path)
    return path


def load(path: Path | str, **options: Any) -> tuple[ImageSet, ImageSet]:
    """The parts of 8x8 images at a path."""
    return images(ImagesConfig(path=str(path), **{"image_size": 8, **options}))


def numbers(data: ImageSet, count: int = 200) -> list[int]:
    """Which of `pixels` each image is."""
    known = {pixels(n).transpose(2, 0, 1).tobytes(): n for n in range(count)}
    return [known[image.numpy().tobytes()] for image in data.images]


def squares(count: int = 50, size: int = 8, classes: int = 5) -> ImageSet:
    """Images all different, the same each time, without files."""
    values = torch.arange(count * 3 * size * size) * 2654435761 % 251
    return ImageSet(values.reshape(count, 3, size, size).byte(), torch.arange(count) % classes, classes, "squares")


class Encoder:
    """Stands in for an autoencoder: the mean of 4x4 patches, and a log-variance from it."""

    def __init__(self, fingerprint: str = "f" * 64) -> None:
        self.fingerprint = fingerprint
        self.batches: list[int] = []

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.batches.append(len(x))
        mean = torch.nn.functional.avg_pool2d(x, 4)
        return mean, mean.abs() - 3
