"""Callbacks that measure and draw every n images during training, with averaged weights and the clock paused."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from diffbench.config.sections import SampleConfig, ValidationConfig
from diffbench.core import distributed
from diffbench.data.batches import AnyDataset, image_set
from diffbench.data.coding import reconstruct, side_by_side
from diffbench.data.latents import LatentSet
from diffbench.data.sets import ImageSet
from diffbench.evaluation import validation_error as errors
from diffbench.metrics.reconstruction import psnr, ssim
from diffbench.sampling.images import Trajectory, class_columns, enlarged, save_image
from diffbench.sampling.sampler import Sampler
from diffbench.training.clock import Ordered, find, is_last
from diffbench.training.ema import EMA
from diffbench.training.logger import RunLogger
from diffbench.training.module import TrainingModule
from diffbench.training.signals import Interrupted, StopOnSignal

Images = ImageSet | LatentSet | AnyDataset
"""Images or latents in memory, or any data set of images, which will be read into memory."""


class EveryNImages(Ordered):
    """Callback that calls `act` every `every` images, with averaged weights and the training clock paused.

    Works with any trainer. With an `EMA` among its callbacks, the first average is measured, else the raw weights.
    Values and images go to the `RunLogger` if there is one, else to the trainer's loggers. A signal can interrupt an
    `act` that calls `stop.check` between batches inside `stop.interruptible`; see `StopOnSignal`.
    """

    stage = "validating"
    """Label of the progress bar while it acts."""
    place = 4
    at_end = True
    """Whether to act after the last step too, whether or not it is due."""

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"every: must be at least 1 image, got {every}")
        self.every = every

    def act(self, trainer: L.Trainer, module: Any) -> None:
        """Measure or draw; called on all ranks. May raise Interrupted, but only on all ranks at once."""
        raise NotImplementedError

    def run(self, trainer: L.Trainer, module: Any) -> None:
        with self.averaged():
            self.act(trainer, module)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that puts averaged weights into the network, if there are any."""
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not isinstance(pl_module, TrainingModule):
            kind = type(pl_module).__name__
            raise TypeError(f"{type(self).__name__} works with diffbench modules, such as DiffusionModule, got {kind}")
        self.logger, self.ema = find(trainer, RunLogger), find(trainer, EMA)
        self.stop = find(trainer, StopOnSignal) or StopOnSignal(Path(), trainer.max_steps)
        # `log_dir` is a collective call: all ranks must read it at the same time.
        self.folder = self.logger.folder if self.logger else Path(trainer.log_dir or trainer.default_root_dir)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.state_key in self.stop.pending:
            self._run(trainer, pl_module)

    def on_step_end(self, trainer: L.Trainer, module: Any) -> None:
        if module.is_due(self.every) or (self.at_end and is_last(trainer)):
            self._run(trainer, module)

    def _run(self, trainer: L.Trainer, module: Any) -> None:
        pending = [key for key in self.stop.pending if key != self.state_key]
        try:
            with contextlib.nullcontext() if self.logger is None else self.logger.paused(self.stage):
                self.run(trainer, module)
        except Interrupted:
            pending.append(self.state_key)
        self.stop.pending = pending

    def record(self, trainer: L.Trainer, module: Any, values: Mapping[str, float]) -> None:
        """Log values at the current step, where `ModelCheckpoint` and the like see them too."""
        if self.logger is not None:
            self.logger.record(dict(values))
            return
        module.log_dict(dict(values), on_step=True, on_epoch=False, logger=False)
        for logger in trainer.loggers:  # directly, because log_every_n_steps would drop most of them
            logger.log_metrics(dict(values), step=trainer.global_step)
            logger.save()

    def show(self, trainer: L.Trainer, tag: str, image: np.ndarray) -> None:
        """Show an image (H, W, 3) uint8 in TensorBoard or any other logger that accepts images."""
        if self.logger is not None:
            self.logger.show_image(tag, image)
        elif trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(tag, image, trainer.global_step, dataformats="HWC")
                elif hasattr(logger, "log_image"):
                    logger.log_image(tag, [image], step=trainer.global_step)

    def show_grid(
        self,
        trainer: L.Trainer,
        module: Any,
        images: Tensor,
        columns: int,
        captions: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        """Show images (N, C, H, W) uint8 as a grid, saved as samples/<name or "images">-<images seen>.png."""
        if distributed.rank() == 0:
            path = self.folder / "samples" / f"{name or 'images'}-{module.images_seen:09d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = enlarged(images, columns, captions)
            save_image(image, path)
            self.show(trainer, f"samples/{name or 'ema'}", image)


class ValidationError(EveryNImages):
    """Callback that records the bound and the error at each noise level, on held-out and equally many training images.

    Args:
        held_out: images or latents.
        every: training images between measurements.
        log_snr: (levels,) increasing; None for those of `ValidationConfig`.
        train: the training set; None to measure held-out images only.
    """

    def __init__(
        self, held_out: Images, every: int, log_snr: Sequence[float] | None = None, train: Images | None = None
    ) -> None:
        super().__init__(every)
        self.log_snr = ValidationConfig().log_snr if log_snr is None else log_snr
        self.sets = errors.validation_sets(_in_memory(held_out), None if train is None else _in_memory(train))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.logger is not None:
            self.logger.levels = self.log_snr

    def act(self, trainer: L.Trainer, module: Any) -> None:
        def sums() -> dict[str, Tensor]:
            return {
                part: errors.error_sums(module.network, module.process, data, self.log_snr, check=self.stop.check)
                for part, data in self.sets.items()
            }

        values: dict[str, float] = {}
        for part, found in self.stop.interruptible(sums).items():
            values |= errors.bound_metrics(part, errors.level_means(self.log_snr, found))
        self.record(trainer, module, values)


class Accuracy(EveryNImages):
    """Callback that records the accuracy of a noise-aware classifier on held-out images."""

    def __init__(self, data: ImageSet, every: int, log_snr: Sequence[float]) -> None:
        super().__init__(every)
        self.data, self.log_snr = data, log_snr

    def act(self, trainer: L.Trainer, module: Any) -> None:
        sums = self.stop.interruptible(
            lambda: errors.accuracy_sums(module.network, module.process, self.data, self.log_snr, check=self.stop.check)
        )
        self.record(trainer, module, errors.accuracy_metrics(errors.level_means(self.log_snr, sums)))


class Reconstructions(EveryNImages):
    """Callback that records PSNR and SSIM of reconstructed held-out images, and the KL divergence of their latents."""

    def __init__(self, data: ImageSet, every: int) -> None:
        super().__init__(every)
        self.images = data.images

    def act(self, trainer: L.Trainer, module: Any) -> None:
        mine = self.images[distributed.rank_slice(len(self.images))]
        found = self.stop.interruptible(lambda: reconstruct(module.network, mine, self.stop.check))
        restored, divergence = map(distributed.all_gather_rows, found)
        scores = {"val/psnr": psnr(restored, self.images), "val/ssim": ssim(restored, self.images)}
        self.record(trainer, module, scores | {"val/kl": float(divergence.double().mean())})


class ReconstructionGrid(EveryNImages):
    """Callback that draws held-out images above their reconstructions, as a PNG and in the loggers."""

    def __init__(self, data: ImageSet, every: int) -> None:
        super().__init__(every)
        self.images = data.images[:40]

    def act(self, trainer: L.Trainer, module: Any) -> None:
        self.show_grid(trainer, module, side_by_side(module.network, self.images), 10)


class SampleGrid(EveryNImages):
    """Callback that draws a grid of samples from fixed noise, one column per class, as a PNG and in the loggers.

    Args:
        every: training images between grids.
        sampler: draws the samples; None for the module's own.
        settings: sampling settings; None for `SampleConfig()`.
        class_names: column titles, by label; None for one column per class of the network, without titles.
        name: part of the file names and the logger tag, to tell several grids apart.
    """

    stage, at_end = "sampling", False

    def __init__(
        self,
        every: int,
        sampler: Sampler | None = None,
        settings: SampleConfig | None = None,
        class_names: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(every)
        self.sampler, self.settings, self.class_names = sampler, settings or SampleConfig(), class_names
        self.name = name

    def act(self, trainer: L.Trainer, module: Any) -> None:
        sampler, names = self.sampler or module.sampler(), self.class_names
        check_images(sampler)
        classes = int(getattr(module.network, "num_classes", 0)) if names is None else len(names)
        trajectory, columns = Trajectory(sampler.images), class_columns(classes)
        labels = torch.arange(columns).repeat(4) % max(1, classes)
        split = len(labels) >= distributed.world_size()  # if there are fewer, each rank draws all of them
        mine = distributed.rank_slice(len(labels)) if split else torch.arange(len(labels))
        each = max(trajectory.count, math.ceil(len(mine) / sampler.at_once))
        settings = replace(self.settings, batch_size=min(self.settings.batch_size, each))
        images = self.stop.interruptible(
            lambda: sampler(labels[mine], settings, first=int(mine[0]), callback=trajectory, check=self.stop.check)
        )
        images = distributed.all_gather_rows(images) if split else images
        captions = [names[label] for label in labels] if names else None
        self.show_grid(trainer, module, images, columns, captions, self.name)
        self.show(trainer, f"samples/{self.name + '-' if self.name else ''}steps", trajectory.strip())


def check_images(sampler: Sampler) -> None:
    """Raise ValueError if the sampler returns raw latents that are not decoded to images."""
    if sampler.raw:
        raise ValueError(f"sampler: {sampler.shape[0]} channels are not an image; give a Sampler with `decode`")


def _in_memory(data: Images) -> ImageSet | LatentSet:
    return data if isinstance(data, LatentSet) else image_set(data)
