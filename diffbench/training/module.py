"""The base LightningModule of all training: one network, its optimizer, and the handling of non-finite steps."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, is_dataclass
from functools import cached_property
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from diffbench.config.sections import OptimizerConfig
from diffbench.core import distributed, rng
from diffbench.data.batches import range_error, unpack
from diffbench.data.datamodule import PositionDataModule
from diffbench.training.fsdp import full_tensor, match_strides, shard
from diffbench.training.nan_guard import Outcome, decide, scaler_of
from diffbench.training.optimizers import build_optimizer

OptimizerLike = OptimizerConfig | Callable[[Iterable[nn.Parameter]], Optimizer] | dict[str, Any] | str
SchedulerLike = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | str
MONITORED = "val/bound"
"""Metric that ReduceLROnPlateau monitors."""


class TrainingModule(L.LightningModule):
    """Base LightningModule that trains one network; a subclass adds a `training_step` that begins with `take`.

    Args:
        network: the network to train, average and export.
        optimizer: settings, or a callable from parameters to an optimizer; None for `OptimizerConfig()`, AdamW.
        lr_scheduler: a callable from an optimizer to a scheduler, stepped after each optimizer step (ReduceLROnPlateau:
            after each validation); None for the schedule in the settings.
        lr: learning rate that overrides the optimizer's own; `Tuner.lr_find` sets it.
        seed: of the run; together with an image's position it determines all random numbers of that image.

    Attributes:
        images_seen: images trained on, over all devices and fits; stored in checkpoints.
        images_before: `images_seen` before the last optimizer step.
        grad_norm: gradient norm of the last step, before clipping.
        outcome: whether the last step was skipped.
        skipped_steps: number of skipped steps, as `NonFiniteGuard` counts them.
        batch: the last micro-batch as `take` returned it, with its times (B,) if the subclass noises images.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerLike | None = None,
        lr_scheduler: SchedulerLike | None = None,
        lr: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.lr_scheduler, self.lr, self.seed = network, lr_scheduler, lr, seed
        self.optimizer: Any = OptimizerConfig(**(optimizer or {})) if isinstance(optimizer, dict | None) else optimizer
        s = self.optimizer
        if lr_scheduler is not None and isinstance(s, OptimizerConfig) and (s.warmup_images or s.decay_images):
            raise ValueError("give either lr_scheduler or an optimizer with warmup_images or decay_images, not both")
        self.images_seen = self.images_before = self.skipped_steps = 0
        self.grad_norm = torch.zeros(())
        self.outcome: Outcome | None = None
        self.batch: dict[str, Any] = {}
        self.logs_steps = True
        self._loss: Tensor | None = None

    def configure_model(self) -> None:
        """Shard the network over the ranks if the trainer's strategy is model-parallel."""
        try:
            strategy = self.trainer.strategy
        except RuntimeError:  # no trainer: load_from_checkpoint
            return
        if isinstance(strategy, ModelParallelStrategy):
            shard(self.network, strategy.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Discard the batch size and the unfinished step of an earlier fit."""
        vars(self).pop("batch_size", None)
        self._loss = None

    @cached_property
    def batch_size(self) -> int:
        """Images per optimizer step, over all devices and micro-batches; ValueError if the loader has no batch size."""
        try:
            trainer = self.trainer
        except RuntimeError:  # no trainer: the step is called by hand
            return len(self.batch["x0"])
        if isinstance(trainer.datamodule, PositionDataModule):  # type: ignore[attr-defined]
            return trainer.datamodule.batch_size  # type: ignore[attr-defined]
        trainer.fit_loop.setup_data()
        loader: Any = trainer.train_dataloader
        places = loader, getattr(loader, "batch_sampler", None)
        size = next((n for n in (getattr(place, "batch_size", None) for place in places) if n), None)
        if size is None:
            raise ValueError(
                "warmup_images, decay_images and time_sampling need the batch size, which this loader does not expose:"
                " use lr_scheduler and uniform times, or a DataLoader with batch_size"
            )
        return int(size) * int(trainer.accumulate_grad_batches) * trainer.world_size

    def on_train_start(self) -> None:
        """Reject 16-bit weights with a ValueError, and match a restored optimizer state to the weights' strides."""
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in self.network.parameters()):
            raise ValueError("precision: times and noise need more than 16 bits; choose bf16-mixed or 16-mixed")
        for optimizer in self.trainer.optimizers:
            match_strides(optimizer)

    def take(self, batch: Any) -> dict[str, Any]:
        """Unpack a batch from any loader, give each image a position, and count the images as seen.

        Positions of a batch that carries none continue from all images seen so far, rank after rank.
        """
        found = unpack(batch)
        x0, world = found["x0"], distributed.world_size()
        if self._loss is None:  # the first micro-batch of a step
            self.images_before = self.images_seen
        if "position" not in found:
            self.check(None if self.images_seen else x0, found["label"])
            first = self.images_seen + distributed.rank() * len(x0)
            found |= {"first": first, "position": torch.arange(first, first + len(x0), device=x0.device)}
        self.images_seen += len(x0) * world
        self.batch = found
        return found

    def seed_dropout(self, batch: dict[str, Any]) -> None:
        """Seed the default generator, which only the network's dropout uses, from the batch's first position."""
        position = batch["position"]
        first = batch["first"] if "first" in batch else int(position[0])
        seed = rng.key(self.seed, "dropout", first)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed spends 0.2 ms on recording its call site
        if not position.is_cpu:
            torch.get_device_module(position.device).manual_seed(seed)

    def check(self, x0: Tensor | None, label: Tensor | None) -> None:
        """Warn if images are not scaled to [-1, 1]; raise ValueError if a label is out of the network's range."""
        if x0 is not None and (wrong := range_error(x0)):
            rank_zero_warn(wrong)
        classes = getattr(self.network, "num_classes", 0)
        if classes and label is not None and not label.is_floating_point():
            low, high = int(label.min()), int(label.max())
            if low < 0 or high >= classes:
                raise ValueError(f"labels lie in {low}..{high}, allowed are 0..{classes - 1}")

    def is_due(self, every: int) -> bool:
        """Return whether `images_seen` reached or passed a multiple of `every` in the last step."""
        return self.images_seen // every > self.images_before // every

    def configure_optimizers(self) -> Any:
        """Return the optimizer, with `lr_scheduler` or a schedule over images seen."""
        s = self.optimizer
        for name in ("optimizer", "lr_scheduler"):
            if isinstance(value := getattr(self, name), str):
                raise ValueError(
                    f"the checkpoint was trained with {name} {value}; pass {name}= to load_from_checkpoint"
                )
        optimizer = build_optimizer(s, self.network) if isinstance(s, OptimizerConfig) else s(self.network.parameters())
        if isinstance(optimizer, LBFGS):
            raise ValueError("optimizer: LBFGS needs several losses per step, each with new noise; use another")
        if self.lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
        if self.lr_scheduler is not None:
            schedule: Any = self.lr_scheduler(optimizer)  # type: ignore[operator]
            if isinstance(schedule, ReduceLROnPlateau):
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": MONITORED}}
        elif isinstance(s, OptimizerConfig):
            changes = s.warmup_images or s.decay_images
            size = self.batch_size if changes else 0
            schedule = LambdaLR(optimizer, lambda _: lr_factor(s, self.images_seen + size))
        else:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_backward(self, loss: Tensor) -> None:
        """Sum the losses of the step's micro-batches on the device; if one is not finite, neither is the sum."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient as the trainer or the settings say, store its norm, and skip the step if not finite."""
        scaler = scaler_of(self.trainer)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # Lightning leaves this to the step of a fused optimizer
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        largest = getattr(self.optimizer, "grad_clip_norm", None)
        if largest is not None and gradient_clip_val:
            raise ValueError(f"give either grad_clip_norm={largest:g} or gradient_clip_val={gradient_clip_val:g}")
        if gradient_clip_val and gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(weights, gradient_clip_val)
        elif largest := largest or gradient_clip_val:
            nn.utils.clip_grads_with_norm_(weights, largest, norm)
        self.grad_norm = full_tensor(norm)
        assert self._loss is not None
        self.outcome, self._loss = decide(self.trainer, optimizer, self._loss, self.grad_norm), None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the loss of each micro-batch, unless a `RunLogger` does the logging."""
        if self.logs_steps:
            loss = outputs["loss"] * self.trainer.accumulate_grad_batches
            self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["images_seen"] = self.images_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.images_seen = checkpoint["images_seen"]


def to_plain(value: Any) -> Any:
    """Return a setting as a checkpoint stores it: plain values unchanged, a dataclass as a dictionary, else a name."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if value is None or isinstance(value, str | int | float | list | dict):
        return value
    return getattr(value, "__qualname__", None) or str(getattr(value, "func", None) or type(value).__qualname__)


def lr_factor(settings: OptimizerConfig, images: int) -> float:
    """Return the learning rate factor after `images` images: linear warmup, then constant or a cosine decay."""
    ramp = settings.warmup_images
    rise = min(1.0, images / ramp) if ramp else 1.0
    if settings.decay is None:
        return rise
    begin, end = settings.decay
    progress = min(1.0, max(0.0, (images - begin) / (end - begin)))
    return rise * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def decay_warning(settings: OptimizerConfig, images: int, most: int) -> str | None:
    """Return a warning if a run that continues from `images` to `most` outlasts its learning-rate decay, or None."""
    s, end = settings, settings.decay[1] if settings.decay else most
    if most <= end or images >= most:
        return None
    return (
        f"warning: the learning rate has decayed at optimizer.decay_images={end:,}: images {max(images, end) + 1:,} to"
        f" {most:,} get {s.lr * s.final_lr:g}, {100 * s.final_lr:g}% of optimizer.lr={s.lr:g}. A run of {most:,} images"
        f" whose rate decays over all of them ends with different weights: tag=NAME optimizer.decay_images={most}"
    )
