"""A grid of samples at intervals in training."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from diffbench.config.sample_sections import SampleConfig
from diffbench.core import collectives as together
from diffbench.sampling.images import grid, save_grid
from diffbench.sampling.sampler import Sampler
from diffbench.sampling.trajectory import Trajectory
from diffbench.training.clock import at_step_end, due
from diffbench.training.ema import EMA
from diffbench.training.logger import RunLog


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
        sampler: Sampler,
        config: SampleConfig,
        num_classes: int,
        every: int,
    ) -> None:
        self.run_log, self.ema, self.sampler, self.config, self.every = run_log, ema, sampler, config, every
        self.labels = class_columns(num_classes, rows=4)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_step_end(trainer, batch_idx) or not due(trainer.global_step, self.run_log.batch_size, self.every):
            return
        trajectory = Trajectory(self.sampler.images)
        with self.run_log.clock.paused(), self.ema.applied():
            images = self.sampler.on_all_ranks(self.labels, self.config, callback=trajectory)
        if together.rank():
            return
        columns = len(self.labels) // 4
        save_grid(images, columns, self.run_log.folder / "samples" / f"images-{self.run_log.images:09d}.png")
        self.run_log.writer.add_image("samples/ema", grid(images, columns), self.run_log.images, dataformats="HWC")
        self.run_log.writer.add_image("samples/steps", trajectory.strip(), self.run_log.images, dataformats="HWC")
