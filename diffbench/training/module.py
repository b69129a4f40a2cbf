"""The LightningModule behind every kind of training: one network, its optimizer, and steps that are not finite."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffbench.config.sections import OptimizerConfig
from diffbench.core import rng
from diffbench.training.fsdp import full_tensor, match_strides, shard
from diffbench.training.nan_guard import Outcome, decide, scaler_of
from diffbench.training.optimizers import build_optimizer


class TrainingModule(L.LightningModule):
    """Trains one network; a subclass adds its `training_step`.

    Args:
        network: what is trained, averaged and exported.
        optimizer: settings.
        seed: of the run; with a sample's position it fixes all its random numbers.
        batch_size: images of an optimizer step, to measure the learning rate in images.

    Attributes:
        grad_norm: of the last step, before clipping.
        outcome: whether the last step was taken.
        skipped_steps: how many were not, as `NonFiniteGuard` counts them.
        times: of the last micro-batch, (B,), where the subclass noises images.
    """

    def __init__(self, network: nn.Module, optimizer: OptimizerConfig, seed: int, batch_size: int) -> None:
        super().__init__()
        self.network, self.settings, self.seed, self.batch_size = network, optimizer, seed, batch_size
        self.grad_norm = torch.zeros(())
        self.outcome: Outcome | None = None
        self.skipped_steps = 0
        self.times: Tensor | None = None
        self._loss: Tensor | None = None

    def configure_model(self) -> None:
        """Shards the network over the ranks where trainer.strategy says so."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self.network, self.trainer.strategy.device_mesh["data_parallel"])

    def on_train_start(self) -> None:
        """Fits a restored optimizer state to the weights' memory layout."""
        for optimizer in self.trainer.optimizers:
            match_strides(optimizer)

    def seed_dropout(self, batch: dict[str, Any]) -> None:
        """Seeds the default generator, from which only network dropout draws, by the batch's first position."""
        position = batch["position"]
        first = batch["first"] if "first" in batch else int(position[0])
        seed = rng.key(self.seed, "dropout", first)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.2 ms, to note where it was called
        if not position.is_cpu:
            torch.get_device_module(position.device).manual_seed(seed)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, and the learning rate as a function of images seen, stepped once an optimizer step."""
        s = self.settings
        optimizer = build_optimizer(s, self.network)
        schedule = LambdaLR(optimizer, lambda step: lr_factor(s, (step + 1) * self.batch_size))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_backward(self, loss: Tensor) -> None:
        """Sums the step's losses on the device: not finite if one of them is not."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Keeps the gradient's norm for the log, clips where the settings say so, skips a step that is not finite."""
        scaler = scaler_of(self.trainer)
        if scaler is not None:
            scaler.unscale_(optimizer)
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        if self.settings.grad_clip_norm is not None:
            nn.utils.clip_grads_with_norm_(weights, self.settings.grad_clip_norm, norm)
        self.grad_norm = full_tensor(norm)
        assert self._loss is not None
        self.outcome, self._loss = decide(self.trainer, optimizer, self._loss, self.grad_norm), None


def lr_factor(settings: OptimizerConfig, images: int) -> float:
    """Share of the full learning rate once `images` are seen: linear warm-up, then constant or a cosine decay."""
    ramp, end = settings.warmup_images, settings.decay_images
    rise = min(1.0, images / ramp) if ramp else 1.0
    if end is None:
        return rise
    progress = min(1.0, max(0.0, (images - ramp) / (end - ramp)))
    return rise * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def decayed_early(settings: OptimizerConfig, images: int, most: int) -> str | None:
    """A warning where images are trained on after the learning rate has decayed, or None.

    Args:
        settings: of the optimizer.
        images: seen already.
        most: that will have been seen at the end.
    """
    end = settings.decay_images
    if end is None or most <= end or images >= most:
        return None
    s = settings
    return (
        f"warning: the learning rate has decayed at optimizer.decay_images={end:,}: images {max(images, end) + 1:,} to"
        f" {most:,} get {s.lr * s.final_lr:g}, {100 * s.final_lr:g}% of optimizer.lr={s.lr:g}. A run of {most:,} images"
        f" whose rate decays over all of them ends elsewhere: tag=NAME optimizer.decay_images={most}"
    )
