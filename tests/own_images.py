"""Small images of one's own, for tests."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


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
    images = [{"bytes": png(pixels(n)), "path": None} for n in numbers]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"img": pa.array(images, kind), **columns}), path)
    return path
