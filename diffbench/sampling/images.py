"""Images for the eye: grids as PNG, JPEG, WebP or GIF, and how samples come about, as a strip or an animation."""

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
"""Suffix -> how Pillow saves an image under it."""


def new_files(
    out: str | None, default: Path, endings: Sequence[str] = (), formats: Sequence[str] = tuple(FORMATS)
) -> list[Path]:
    """The files that a command writes, its image and those beside it, none of which exists yet.

    Args:
        out: the image's file, if the user names one.
        default: its file otherwise; a number is added where it or a file beside it is there already.
        endings: of the files beside it, in place of its suffix.
        formats: suffixes that the image may have.

    Returns:
        The image's file, and one for each ending.

    Raises:
        ValueError: if a file that the user named exists, or names no format.
    """
    first = Path(out) if out else default
    if first.suffix.lower() not in formats:
        raise ValueError(f"out: {first}: its suffix names no format; choose from {', '.join(formats)}")
    for number in itertools.count(1):
        stem = first.stem if number == 1 else f"{first.stem}-{number}"
        files = [first.with_name(stem + ending) for ending in (first.suffix, *endings)]
        taken = [path for path in files if path.exists()]
        if not taken:
            break
        if out:
            raise ValueError(f"out: {taken[0]} exists already; choose another name")
    return files


def class_columns(num_classes: int) -> int:
    """Columns of a grid of samples: one for each of the first 16 classes; eight where there is only one, or none."""
    return min(num_classes, 16) if num_classes > 1 else 8


def grid(images: Tensor, columns: int, scale: int = 1, captions: Sequence[str] | None = None) -> np.ndarray:
    """Images (N, C, H, W) uint8, one or three channels, as rows of `columns` with a thin border.

    Args:
        images: of any count; the last row is filled up with grey.
        scale: pixels a side that each pixel is enlarged to.
        captions: a text above each image. Where they are the same in all rows, they stand above the first one alone.

    Returns:
        (rows * H', columns * W', 3) uint8, with the captions' height besides.
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
    """Texts above the cells of a row, each made smaller, then cut, to fit its cell: (16, columns * width, 3) uint8."""
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
    """A `grid` of images (N, C, H, W) uint8, small ones enlarged for the eye to about 64 pixels a side."""
    return grid(images, columns, max(1, 64 // max(images.shape[-2:])), captions)


def save_image(image: np.ndarray, path: Path) -> None:
    """Write an (H, W, 3) uint8 image atomically, in the format that the suffix names, one of `FORMATS`."""
    with atomic(path) as file:
        Image.fromarray(image).save(file, **FORMATS[path.suffix.lower()])


def save_grid(images: Tensor, columns: int, path: Path, captions: Sequence[str] | None = None) -> None:
    save_image(enlarged(images, columns, captions), path)


def save_npz(samples: Tensor, labels: Tensor, path: Path) -> None:
    """Write samples (N, C, H, W) as `arr_0` and their labels (N,) as `arr_1`.

    Images are (N, H, W, C) uint8 in the file, as ADM's evaluator reads them; other samples as they are, float32.
    """
    arranged = samples.permute(0, 2, 3, 1) if samples.dtype == torch.uint8 else samples
    with atomic(path) as file:
        np.savez(file, arranged.numpy(), labels.numpy())


class Trajectory:
    """A sampler's callback that keeps x_t and the predicted image at each step, of the first few samples.

    Args:
        images: what the denoiser works on to images uint8, `Sampler.images`.
        count: how many samples are kept, of the first batch.
    """

    def __init__(self, images: Callable[[Tensor], Tensor] = to_uint8, count: int = 4) -> None:
        self.images, self.count = images, count
        self.noisy: list[Tensor] = []
        self.predicted: list[Tensor] = []

    def __call__(self, step: int, x: Tensor, x0: Tensor) -> None:
        if step == len(self.noisy):  # a batch that did not fit into memory begins again at 0
            x, x0 = x[: self.count], x0[: self.count]
            size = x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1)
            self.noisy.append((x / size).detach())
            self.predicted.append(x0.detach())

    def strip(self, columns: int = 10) -> np.ndarray:
        """Evenly chosen steps from left to right, with the last; for each sample x_t above the predicted image.

        Returns:
            (rows * H', columns * W', 3) uint8.
        """
        shown = self._frames(columns)
        cells = rearrange(shown, "step kind n c h w -> (n kind step) c h w")
        return grid(cells, len(shown), scale=max(1, 40 // cells.shape[-1]))

    def save_gif(self, path: Path, seconds: float = 4.0, most: int = 60) -> None:
        """Write an animation of at most `most` steps, x_t on the left and the predicted image on the right.

        The end stays for a second.
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
        """Evenly chosen steps, x_t and the predicted image: (step, 2, n, C, H, W) uint8 on the CPU."""
        chosen = np.unique(np.linspace(0, len(self.noisy) - 1, most).round().astype(int))
        pairs = [torch.stack([self.images(self.noisy[i]), self.images(self.predicted[i])]) for i in chosen]
        return torch.stack(pairs).cpu()
