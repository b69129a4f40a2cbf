"""Image files to look at: grids as PNG, JPEG, WebP or GIF, and sampling trajectories as strips or animations."""

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from diffbench.core.files import atomic
from diffbench.core.pixels import to_uint8

FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95},
    ".jpeg": {"format": "JPEG", "quality": 95},
    ".webp": {"format": "WEBP", "lossless": True},
    ".gif": {"format": "GIF"},
}
"""Suffix -> Pillow's options for saving an image."""


def new_files(
    out: str | None, default: Path, endings: Sequence[str] = (), formats: Sequence[str] = tuple(FORMATS)
) -> list[Path]:
    """Return the files that a command writes, an image and its companions, none of which exists yet.

    Args:
        out: the image file, if the user names one.
        default: the image file otherwise; a number is appended if it or a companion already exists.
        endings: endings of the companions, which replace the image's suffix.
        formats: suffixes allowed for the image.

    Returns:
        The image file, and one file for each ending.

    Raises:
        ValueError: if a file that the user named exists, or its suffix is not an allowed format.
    """
    first = Path(out) if out else default
    if first.suffix.lower() not in formats:
        raise ValueError(f"out: {first}: its suffix is not an image format; choose from {', '.join(formats)}")
    for number in itertools.count(1):
        stem = first.stem if number == 1 else f"{first.stem}-{number}"
        files = [first.with_name(stem + ending) for ending in (first.suffix, *endings)]
        taken = [path for path in files if path.exists()]
        if not taken:
            break
        if out:
            raise ValueError(f"out: {taken[0]} already exists; choose another name")
    return files


def class_columns(num_classes: int) -> int:
    """Return the columns of a grid of samples: one per class, at most 16, or eight for fewer than two classes."""
    return min(num_classes, 16) if num_classes > 1 else 8


def grid(images: Tensor, columns: int, scale: int = 1, captions: Sequence[str] | None = None) -> np.ndarray:
    """Arrange images (N, C, H, W) uint8, with one or three channels, in rows of `columns` with a thin border.

    Args:
        images: any number; the last row is padded with grey.
        scale: factor by which each side is enlarged.
        captions: a text above each image. If all rows have the same captions, only the first row shows them.

    Returns:
        (rows * H', columns * W', 3) uint8, plus the height of the captions.
    """
    rgb = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    rgb = rgb.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    rgb = nn.functional.pad(rgb, (2, 2, 2, 2), value=128)
    missing = -len(rgb) % columns
    rgb = torch.cat([rgb, rgb.new_full((missing, *rgb.shape[1:]), 128)])
    rows = rearrange(rgb, "(r k) c h w -> r h (k w) c", k=columns).numpy()
    if captions is None:
        return np.concatenate(rows)
    lines = [list(captions[i : i + columns]) for i in range(0, len(captions), columns)]
    repeated = all(line == lines[0][: len(line)] for line in lines)
    parts: list[np.ndarray] = []
    for i, row in enumerate(rows):
        parts += [row] if repeated and i else [_caption_line(lines[i], rgb.shape[-1], columns), row]
    return np.concatenate(parts)


CAPTION_HEIGHT = 16


def _caption_line(texts: Sequence[str], width: int, columns: int) -> np.ndarray:
    """Draw the captions of a row, each shrunk and then truncated to fit its cell: (16, columns * width, 3) uint8."""
    line = Image.new("RGB", (columns * width, CAPTION_HEIGHT), "white")
    draw = ImageDraw.Draw(line)
    for i, text in enumerate(texts):
        font, shown = _font(11), text
        for size in (11, 10, 9, 8):
            font = _font(size)
            if font.getlength(text) <= width - 2:
                break
        while len(shown) > 1 and font.getlength(shown) > width - 2:
            shown = shown.removesuffix("…")[:-1] + "…"
        draw.text((i * width + width / 2, CAPTION_HEIGHT / 2), shown, "black", font, anchor="mm")
    return np.asarray(line)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def enlarged(images: Tensor, columns: int, captions: Sequence[str] | None = None) -> np.ndarray:
    """Return a `grid` of images (N, C, H, W) uint8, with small images enlarged to about 64 pixels per side."""
    return grid(images, columns, max(1, 64 // max(images.shape[-2:])), captions)


def save_image(image: np.ndarray, path: Path) -> None:
    """Write an (H, W, 3) uint8 image atomically, in the format of the suffix, one of `FORMATS`."""
    with atomic(path) as file:
        Image.fromarray(image).save(file, **FORMATS[path.suffix.lower()])


def save_grid(images: Tensor, columns: int, path: Path, captions: Sequence[str] | None = None) -> None:
    save_image(enlarged(images, columns, captions), path)


def save_npz(samples: Tensor, labels: Tensor, path: Path) -> None:
    """Write samples (N, C, H, W) as `arr_0` and their labels (N,) as `arr_1`.

    Images are stored as (N, H, W, C) uint8, as the ADM evaluator reads them; other samples unchanged, as float32.
    """
    arranged = samples.permute(0, 2, 3, 1) if samples.dtype == torch.uint8 else samples
    with atomic(path) as file:
        np.savez(file, arranged.numpy(), labels.numpy())


class Trajectory:
    """A sampler callback that records x_t and the predicted image at each step, for the first few samples.

    Args:
        images: maps the denoiser's space to uint8 images, such as `Sampler.images`.
        count: number of samples to record, from the first batch.
    """

    def __init__(self, images: Callable[[Tensor], Tensor] = to_uint8, count: int = 4) -> None:
        self.images, self.count = images, count
        self.noisy: list[Tensor] = []
        self.predicted: list[Tensor] = []

    def __call__(self, step: int, x: Tensor, x0: Tensor) -> None:
        if step == len(self.noisy):  # a batch that ran out of memory is drawn again from step 0: skip repeated steps
            x, x0 = x[: self.count], x0[: self.count]
            size = x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1)
            self.noisy.append((x / size).detach())
            self.predicted.append(x0.detach())

    def strip(self, columns: int = 10) -> np.ndarray:
        """Draw evenly spaced steps from left to right, including the last; per sample, x_t above the predicted image.

        Returns:
            (rows * H', columns * W', 3) uint8.
        """
        shown = self._frames(columns)
        cells = rearrange(shown, "step kind n c h w -> (n kind step) c h w")
        return grid(cells, len(shown), scale=max(1, 40 // cells.shape[-1]))

    def save_gif(self, path: Path, seconds: float = 4.0, most: int = 60) -> None:
        """Write an animation of at most `most` steps, x_t on the left and the predicted image on the right.

        The last frame stays for one second.
        """
        frames = []
        for both in self._frames(most):
            cells = rearrange(both, "kind n c h w -> (n kind) c h w")
            frames.append(Image.fromarray(grid(cells, 2, scale=max(1, 64 // cells.shape[-1]))))
        each = max(20, int(1000 * seconds / len(frames)))
        duration = [each] * (len(frames) - 1) + [1000]
        with atomic(path) as file:
            frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)

    def _frames(self, most: int) -> Tensor:
        """Return x_t and the predicted image at evenly spaced steps: (step, 2, n, C, H, W) uint8 on the CPU."""
        chosen = np.unique(np.linspace(0, len(self.noisy) - 1, most).round().astype(int))
        pairs = [torch.stack([self.images(self.noisy[i]), self.images(self.predicted[i])]) for i in chosen]
        return torch.stack(pairs).cpu()
