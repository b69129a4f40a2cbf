"""Logging of a run, over images seen, to metrics.jsonl (float64, read by all reports), trackers and the terminal."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffbench.config.kinds import BaseConfig
from diffbench.config.load import to_dict, to_yaml
from diffbench.core import distributed
from diffbench.core.errors import UserError
from diffbench.core.files import room_for
from diffbench.core.progress import span
from diffbench.core.tensors import read_state
from diffbench.evaluation import records
from diffbench.evaluation.curves import NAME as CURVES
from diffbench.evaluation.curves import Band, read_curves
from diffbench.metrics.registry import metric_of
from diffbench.training.clock import Clock, Ordered, at_step_end
from diffbench.training.module import TrainingModule
from diffbench.training.tensorboard_log import TensorBoardLog
from diffbench.training.wandb_log import WandbLog

METRICS, TRAINING = "metrics.jsonl", "training"
MARKS = (0.2, 0.5)
"""Fractions of training at which a run is compared with its reference curves."""
MEASURED_S, LEAST_PRINTED_S = 3.0, 30.0
"""Seconds to measure before estimating the remaining time, and the shortest remaining time worth printing."""


def check_log(folder: Path, checkpoint: Path) -> None:
    """Raise UserError if metrics.jsonl is shorter than it was at a checkpoint; call before anything is written."""
    expected = read_state(checkpoint, "meta").get("callbacks", {}).get("RunLogger", {}).get("bytes", 0)
    path = folder / METRICS
    size = path.stat().st_size if path.exists() else 0
    if size < expected:
        raise UserError(f"{path}: {size} bytes, shorter than at the checkpoint ({expected} bytes); restore it")


def mark_between(before: int, now: int, total: int) -> float | None:
    """Return the first of `MARKS` that training passed between `before` and `now` images, or None."""
    return next((mark for mark in MARKS if before < mark * total <= now), None)


def verdict(lines: Sequence[Mapping[str, Any]], bands: Mapping[str, Band]) -> list[str]:
    """Return a warning for each metric whose latest value is outside its band, or one line if all are inside.

    Args:
        lines: the lines of metrics.jsonl so far.
        bands: metric -> its reference band.
    """
    inside: list[str] = []
    outside: list[str] = []
    for name, band in bands.items():
        found = next(((line["images"], line[name]) for line in reversed(lines) if name in line), None)
        ends = band.at(found[0]) if found else None
        if found is None or ends is None:
            continue
        text = f"{metric_of(name).title} {found[1]:.4g}, band {ends[0]:.4g} to {ends[1]:.4g}"
        (inside if ends[0] <= found[1] <= ends[1] else outside).append(text)
    at = f"at {lines[-1]['images']:,} images" if lines else ""
    if outside:
        return [f"warning: {at}: {text}: something is wrong; see docs/health.md" for text in outside]
    return [f"{at}: like healthy runs: {'; '.join(inside)}"] if inside else []


class RunLogger(Ordered):
    """Callback that logs every number exactly once, even if the run is killed and resumed.

    A checkpoint stores the length of metrics.jsonl; resuming truncates the file there, and TensorBoard drops later
    points. Only rank 0 writes, with losses averaged over all ranks.

    Args:
        every: images between two logged training losses.
        hparams: entries of TensorBoard's hparams tab.
        loggers: "tensorboard", "wandb", both or none.
    """

    place = 3

    def __init__(
        self,
        folder: Path,
        every: int,
        config: BaseConfig,
        hparams: dict[str, str | float] | None = None,
        loggers: Sequence[str] = ("tensorboard",),
    ) -> None:
        self.loggers, self.hparams = loggers, hparams or {}
        self.path, self.folder = folder / METRICS, folder
        self.every, self.config = every, config
        self._logs: list[TensorBoardLog | WandbLog] = []
        self.levels: Sequence[float] = ()
        """Noise levels (log-SNR) that validation records; each gets a chart."""
        self.clock = Clock()
        self.images = self._total = 0
        self._losses: list[Tensor] = []  # not in the sum yet, because reading a loss waits for the device
        self._loss: Tensor | None = None  # sum and number of the finite losses since the last logged one
        self._seconds, self._logged_images = 0.0, 0
        self._resumed = False
        self._bar: tqdm[Any] | None = None
        self._last = -1
        self._bands = read_curves(folder / CURVES)
        self._first_step: tuple[int, float] | None = None  # images and seconds after the first step
        self._estimated = False

    def record(self, values: dict[str, float]) -> None:
        if distributed.rank():
            return
        line = json.dumps({"images": self.images, **values}) + "\n"
        with room_for(self.path, len(line)), self.path.open("a") as file:
            file.write(line)
        for log in self._logs:
            log.record(values, self.images)

    def show_image(self, tag: str, image: np.ndarray) -> None:
        """Show an image (H, W, 3) uint8 in TensorBoard and W&B, if they are on."""
        for log in self._logs:
            log.show_image(tag, image, self.images)

    @contextlib.contextmanager
    def paused(self, stage: str) -> Iterator[None]:
        """Pause the training clock inside the block, and label the progress bar with `stage`."""
        with self.clock.paused():
            if self._bar is not None:
                self._bar.set_description(stage)
            yield
            if self._bar is not None:
                self._bar.set_description(TRAINING)

    def say(self, text: str) -> None:
        """Print a line on rank 0, above the progress bar if there is one."""
        if distributed.rank() == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        pl_module.logs_steps = False
        self.images, self._total = pl_module.images_seen, trainer.max_steps * pl_module.batch_size
        self._logged_images, self._seconds = self.images, self.clock.seconds
        if distributed.rank() == 0:
            self._open_logs()
        self.clock.start()

    def _open_logs(self) -> None:
        if self.path.exists() and not self._resumed:
            self.path.unlink()  # left by a session that ended before its first checkpoint
        if "tensorboard" in self.loggers:
            at = self.images if self._resumed else None
            text = to_yaml(self.config)
            self._logs.append(TensorBoardLog(self.folder, at, text, self.hparams, self.levels, self._bands))
        if "wandb" in self.loggers:
            self._logs.append(WandbLog(self.folder, to_dict(self.config)))
        if sys.stdout.isatty():
            self._bar = tqdm(
                desc=TRAINING, total=self._total, initial=self.images, unit="img", unit_scale=True, dynamic_ncols=True
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.append(outputs["loss"] * trainer.accumulate_grad_batches)
        if not at_step_end(trainer, batch_idx):
            return
        assert isinstance(pl_module, TrainingModule)
        if self._bar is not None:
            self._bar.update(pl_module.images_seen - self.images)
        self.images = pl_module.images_seen
        self._estimate_time()
        if pl_module.is_due(self.every) or trainer.global_step == trainer.max_steps:
            self._log_training(trainer, pl_module)

    def _estimate_time(self) -> None:
        """Print the remaining training time once; the first step is not measured, since it may include compilation."""
        images, before = self._first_step = self._first_step or (self.images, self.clock.seconds)
        spent = self.clock.seconds - before
        if self._estimated or self.images == images or spent < MEASURED_S:
            return
        self._estimated, each, left = True, spent / (self.images - images), self._total - self.images
        if left * each >= LEAST_PRINTED_S:
            size = 10 ** max(2, len(str(int(600 / each))) - 1)  # round down to one significant digit
            self.say(
                f"time: {left:,} images at about {1 / each:,.0f} images/s here, {span(left * each)} of training"
                f" (trainer.max_images={max(100, int(600 / each // size * size)):_} takes ten minutes)"
            )

    def _log_training(self, trainer: L.Trainer, module: TrainingModule) -> None:
        self._sum_losses()
        assert self._loss is not None
        total, count = self._loss.tolist()
        loss, self._loss = total / count if count else math.nan, None
        before = self._logged_images
        rate = (self.images - before) / max(1e-9, self.clock.seconds - self._seconds)
        self._logged_images, self._seconds = self.images, self.clock.seconds
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        values = {"train/loss": loss, "train/grad_norm": float(module.grad_norm), "train/lr": lr}
        values["train/skipped_steps"] = module.skipped_steps
        values["perf/images_per_s"] = rate
        if torch.cuda.is_available():
            values["perf/peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self.record({name: value for name, value in values.items() if math.isfinite(value)})
        mark = mark_between(before, self.images, self._total)
        if self._bands and mark and not distributed.rank():
            for line in verdict(records.metrics(self.folder), self._bands):
                self.say(line)
        left = self._total - self.images
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}")
            return
        percent = 100 * self.images // self._total
        if percent // 5 != self._last or not left:  # a line every 5%
            self._last = percent // 5
            eta = left / rate if rate else 0.0
            self.say(f"{percent:3d}%  images {self.images:>9,}  loss {loss:.4f}  {rate:,.0f} images/s  ETA {eta:.0f} s")

    def _sum_losses(self) -> None:
        """Add pending losses to the sum one by one, in a fixed order; with several ranks, average it over them."""
        if self._losses:
            losses, self._losses = torch.stack(self._losses).double(), []
            total, count = (0.0, 0.0) if self._loss is None else self._loss.tolist()
            for loss in losses.tolist():
                if math.isfinite(loss):  # a skipped step must not turn the mean into NaN
                    total, count = total + loss, count + 1
            self._loss = losses.new_tensor([total, count])
        if self._loss is not None and distributed.world_size() > 1:
            self._loss = distributed.all_reduce_sum(self._loss) / distributed.world_size()

    def state_dict(self) -> dict[str, Any]:
        self._sum_losses()
        size = 0
        if distributed.rank() == 0 and self.path.exists():
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())
            size = self.path.stat().st_size
        for log in self._logs:
            log.flush()
        return {"bytes": size, "loss": self._loss, "seconds": self.clock.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = True
        self._loss = state_dict["loss"]
        self.clock.before = state_dict["seconds"]
        if not distributed.rank() and self.path.exists():
            os.truncate(self.path, state_dict["bytes"])

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.clock.stop()
        if self._bar is not None:
            self._bar.close()
        for log in self._logs:
            log.close()
