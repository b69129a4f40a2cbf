"""How a sample comes about: x_t and the predicted image along the steps, as a strip or an animation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from diffbench.core.files import atomic
from diffbench.core.pixels import to_uint8
from diffbench.sampling.images import grid


class Trajectory:
    """A sampler's callback that keeps what it is shown of the first few samples.

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
            spread = x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1)
            self.noisy.append((x / spread).detach())
            self.predicted.append(x0.detach())

    def strip(self, columns: int = 10) -> np.ndarray:
        """Steps from left to right, evenly chosen, the last one too; for each sample a row of x_t above one of the
        predicted image.

        Returns:
            (rows * H', columns * W', 3) uint8.
        """
        shown = self._pictures(columns)
        cells = rearrange(shown, "step kind n c h w -> (n kind step) c h w")
        return grid(cells, len(shown), scale=max(1, 40 // cells.shape[-1]))

    def _pictures(self, frames: int) -> Tensor:
        """Evenly chosen steps, x_t and the predicted image: (step, 2, n, C, H, W) uint8 on the CPU."""
        chosen = np.unique(np.linspace(0, len(self.noisy) - 1, frames).round().astype(int))
        pairs = [torch.stack([self.images(self.noisy[i]), self.images(self.predicted[i])]) for i in chosen]
        return torch.stack(pairs).cpu()

    def save_gif(self, path: Path, seconds: float = 4.0, most: int = 60) -> None:
        """Writes an animation of at most `most` frames: x_t on the left, the predicted image on the right; the end
        stays for a second."""
        frames = []
        for both in self._pictures(most):
            cells = rearrange(both, "kind n c h w -> (n kind) c h w")
            frames.append(Image.fromarray(grid(cells, 2, scale=max(1, 64 // cells.shape[-1]))))
        each = max(20, int(1000 * seconds / len(frames)))
        with atomic(path) as file:
            frames[0].save(
                file,
                format="GIF",
                save_all=True,
                append_images=frames[1:],
                duration=[each] * (len(frames) - 1) + [1000],
                loop=0,
            )
