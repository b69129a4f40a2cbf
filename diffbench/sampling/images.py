"""Images for the eye: grids as PNG, JPEG, WebP or GIF, and how samples come about, as a strip or an animation."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
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


def grid(images: Tensor, columns: int, scale: int = 1) -> np.ndarray:
    """Images (N, C, H, W) uint8, one or three channels, as rows of `columns` with a thin border.

    Returns:
        (rows * H', columns * W', 3) uint8, each pixel enlarged to `scale` pixels a side.
    """
    rgb = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    rgb = rgb.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    rgb = nn.functional.pad(rgb, (2, 2, 2, 2), value=128)
    missing = -len(rgb) % columns
    rgb = torch.cat([rgb, rgb.new_full((missing, *rgb.shape[1:]), 128)])
    return rearrange(rgb, "(r k) c h w -> (r h) (k w) c", k=columns).numpy()


def save_image(image: np.ndarray, path: Path) -> None:
    """Write an (H, W, 3) uint8 image atomically, in the format that the suffix names, one of `FORMATS`."""
    with atomic(path) as file:
        Image.fromarray(image).save(file, **FORMATS[path.suffix.lower()])


def save_grid(images: Tensor, columns: int, path: Path) -> None:
    """Write images (N, C, H, W) uint8 as a grid, small ones enlarged for the eye."""
    save_image(grid(images, columns, scale=max(1, 40 // images.shape[-1])), path)


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
        if step == len(self.noisy):  # the first batch's; a later one begins again at 0
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
