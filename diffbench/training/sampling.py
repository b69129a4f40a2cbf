"""Samples from a trained denoiser: sample i's noise is a function of (seed, i), whatever the batch or device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from diffbench.core import keyed
from diffbench.core.files import atomic
from diffbench.core.pixels import to_uint8
from diffbench.diffusion import DiscreteVP, Tables, classifier_free, ddim, ddpm, predictor
from diffbench.diffusion.samplers import Predict
from diffbench.training.clock import at_step_end, due
from diffbench.training.ema import EMA
from diffbench.training.log import RunLog
from diffbench.training.module import DiffusionModule
from diffbench.training.settings import SampleConfig


@torch.no_grad()
def generate(
    denoiser: nn.Module,
    process: DiscreteVP,
    config: SampleConfig,
    labels: Tensor,
    shape: tuple[int, ...],
    *,
    guidance: float | None = None,
    null_label: int | None = None,
    seed: int = 0,
    first: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Images of the given labels.

    Args:
        denoiser: network (x, t, y) -> output, on its device.
        process: the process that it was trained under.
        config: sampler, steps and the rest.
        labels: (N,) classes.
        shape: (C, H, W).
        guidance: weight instead of `config.guidance`.
        null_label: the network's null class, needed where the weight is not 1.
        seed: with a sample's number it fixes its noise.
        first: number of the first sample.
        progress: called with the number of images done after each batch.

    Returns:
        (N, C, H, W) uint8 on the CPU.

    Raises:
        ValueError: where guidance is asked of a network without a null class, or a label is out of range.
        RuntimeError: where the network put out non-finite values.
    """
    weight = config.guidance if guidance is None else guidance
    if weight != 1 and null_label is None:
        raise ValueError(f"guidance {weight} needs a network with a null class; this one was trained without")
    parameter = next(denoiser.parameters())
    tables = process.tables.respaced(config.steps)
    training = denoiser.training
    denoiser.eval()
    predict = predictor(process, denoiser)

    images = []
    for index in torch.arange(first, first + len(labels)).split(config.batch_size):
        position = index.to(parameter.device)
        y = labels[index - first].to(parameter.device)

        def noise(step: int, position: Tensor = position) -> Tensor:
            return keyed.normal(keyed.key(seed, "sample", step), position, shape).to(parameter.dtype)

        guided = classifier_free(predict, y, null_label or 0, weight)
        images.append(to_uint8(_walk(guided, noise, tables, config, process)).cpu())
        if progress:
            progress(int(index[-1]) + 1 - first)
    denoiser.train(training)
    return torch.cat(images)


def _walk(
    predict: Predict, noise: Callable[[int], Tensor], tables: Tables, config: SampleConfig, process: DiscreteVP
) -> Tensor:
    start = noise(-1)
    if config.sampler == "ddim":
        x = ddim(predict, start, tables, noise, eta=config.eta, clip=config.clip)
    else:
        learned = process.config.variance == "learned_range"
        variance = process.config.variance if learned else config.variance
        x = ddpm(predict, start, tables, noise, variance=variance, clip=config.clip)
    if not bool(x.isfinite().all()):
        raise RuntimeError(f"the {config.sampler} sampler ended in non-finite values")
    return x


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


def save_png(picture: np.ndarray, path: Path) -> None:
    """Writes an (H, W, 3) uint8 picture atomically."""
    with atomic(path) as file:
        Image.fromarray(picture).save(file, format="PNG")


def save_grid(images: Tensor, columns: int, path: Path) -> None:
    """Writes images (N, C, H, W) uint8 as a PNG, small ones enlarged for the eye."""
    save_png(grid(images, columns, scale=max(1, 40 // images.shape[-1])), path)


def class_columns(num_classes: int, rows: int) -> Tensor:
    """Labels of a grid whose columns are the classes: 0..n-1 again and again; zeros where there are none."""
    classes = max(1, min(num_classes, 10))
    return torch.arange(classes).repeat(rows)


class SampleGrid(L.Callback):
    """A grid of samples of the averaged weights, fixed noise and labels, every `every` images; PNG and TensorBoard."""

    def __init__(
        self,
        run_log: RunLog,
        ema: EMA,
        config: SampleConfig,
        shape: tuple[int, ...],
        num_classes: int,
        every: int,
    ) -> None:
        self.run_log, self.ema, self.config, self.shape, self.every = run_log, ema, config, shape, every
        self.labels = class_columns(num_classes, rows=4)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_step_end(trainer, batch_idx) or not due(trainer.global_step, self.run_log.batch_size, self.every):
            return
        assert isinstance(pl_module, DiffusionModule)
        with self.run_log.clock.paused(), self.ema.applied():
            images = generate(
                pl_module.denoiser,
                pl_module.process,
                self.config,
                self.labels,
                self.shape,
                null_label=pl_module.null_label,
            )
        columns = len(self.labels) // 4
        save_grid(images, columns, self.run_log.folder / "samples" / f"images-{self.run_log.images:09d}.png")
        self.run_log.writer.add_image("samples/ema", grid(images, columns), self.run_log.images, dataformats="HWC")
