"""Small custom image sets for tests, and a fake autoencoder."""

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
    """Return a random image, a different one for each number."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def png(array: np.ndarray, kind: str = "PNG") -> bytes:
    """Return the bytes of the image's file."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def folder(root: Path, counts: dict[str, int], **shape: int) -> Path:
    """Write images 0, 1, ... into sub-folders with these counts ("" for the folder itself); return the folder."""
    number = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i:03d}.png").write_bytes(png(pixels(number, **shape)))
            number += 1
    return root


def table(path: Path, numbers: list[int], **columns: list[Any]) -> Path:
    """Write a parquet file of images in column `img`, as the hub stores them, and other columns; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [{"bytes": png(pixels(n)), "path": None} for n in numbers]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"img": pa.array(files, kind), **columns}), path)
    return path


def load(path: Path | str, **options: Any) -> tuple[ImageSet, ImageSet]:
    """Load the training and held-out parts of 8x8 images at a path."""
    return images(ImagesConfig(path=str(path), **{"image_size": 8, **options}))


def numbers(data: ImageSet, count: int = 200) -> list[int]:
    """Return the numbers for which `pixels` gives these images."""
    known = {pixels(n).transpose(2, 0, 1).tobytes(): n for n in range(count)}
    return [known[image.numpy().tobytes()] for image in data.images]


def squares(count: int = 50, size: int = 8, classes: int = 5) -> ImageSet:
    """Return images that are all different and the same on every call, without files."""
    values = torch.arange(count * 3 * size * size) * 2654435761 % 251
    return ImageSet(values.reshape(count, 3, size, size).byte(), torch.arange(count) % classes, classes, "squares")


class Encoder:
    """A fake autoencoder: the mean of 4x4 patches, and a log-variance computed from it."""

    def __init__(self, fingerprint: str = "f" * 64) -> None:
        self.fingerprint = fingerprint
        self.batches: list[int] = []

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.batches.append(len(x))
        mean = torch.nn.functional.avg_pool2d(x, 4)
        return mean, mean.abs() - 3
