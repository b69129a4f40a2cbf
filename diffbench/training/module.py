"""The LightningModules: what every kind of training shares, and any denoiser under any process."""

import math
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffbench.config.sections import OptimizerConfig
from diffbench.core import collectives as together
from diffbench.core import rng
from diffbench.diffusion import LossAware, Process, stratified
from diffbench.training.augment import augment
from diffbench.training.clock import at_step_end
from diffbench.training.fsdp import in_order, shard, whole
from diffbench.training.nan_guard import Outcome, decide, scaler_of


class Module(L.LightningModule):
    """One network with its optimizer: what every kind of training shares. A kind adds its `training_step`.

    Args:
        network: what is trained, averaged and exported.
        optimizer: settings.
        seed: of the run; with a sample's position it fixes all its random numbers.
        batch_size: images of an optimizer step, to measure the learning rate in images.
    """

    def __init__(self, network: nn.Module, optimizer: OptimizerConfig, seed: int, batch_size: int) -> None:
        super().__init__()
        self.network, self.settings, self.seed, self.batch_size = network, optimizer, seed, batch_size
        self.grad_norm = torch.zeros(())
        self.outcome: Outcome | None = None
        self.skipped_steps = 0
        self.times: Tensor | None = None
        self._loss: Tensor | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; without nn.Module's checks where Lightning notes the running hook, 40 times a step."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def configure_model(self) -> None:
        """Shares the network out between the ranks, where trainer.strategy says so."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self.network, self.trainer.strategy.device_mesh["data_parallel"])

    def on_train_start(self) -> None:
        """Sees that a state that was resumed from fits this layout of weights, and that no gradient is left over."""
        for optimizer in self.trainer.optimizers:
            in_order(optimizer)
            optimizer.zero_grad(set_to_none=True)

    def seed_dropout(self, batch: dict[str, Any]) -> None:
        """Network dropout is the only draw from the default generator: it follows from the first position."""
        position = batch["position"]
        first = batch["first"] if "first" in batch else int(position[0])
        seed = rng.key(self.seed, "dropout", first)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack trace for each kind of device
        if not position.is_cpu:
            torch.get_device_module(position.device).manual_seed(seed)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, and the learning rate as a function of images seen, stepped once an optimizer step."""
        s = self.settings
        kind = AdamW if s.name == "adamw" else Adam
        betas = (s.betas[0], s.betas[1])
        optimizer = kind(self.network.parameters(), lr=s.lr, betas=betas, weight_decay=s.weight_decay, fused=True)
        schedule = LambdaLR(optimizer, lambda step: lr_factor(s, (step + 1) * self.batch_size))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Keeps the gradient's norm for the log; clips where the settings say so; skips what is not finite."""
        scaler = scaler_of(self.trainer)
        if scaler is not None:
            scaler.unscale_(optimizer)
        weights = optimizer.param_groups[0]["params"]
        # What nn.utils.get_total_norm computes, without its sorting of tensors by device.
        norm = torch.linalg.vector_norm(
            torch.stack(torch._foreach_norm([p.grad for p in weights if p.grad is not None]))
        )
        self.grad_norm, most = whole(norm), self.settings.grad_clip_norm
        # On a CPU no product by one: there the norm is known, and 1e-6 is what clipping adds to it.
        if most is not None and not (self.grad_norm.is_cpu and float(self.grad_norm) <= most - 1e-6):
            nn.utils.clip_grads_with_norm_(weights, most, norm)
        assert self._loss is not None
        self.outcome, self._loss = decide(self.trainer, optimizer, self._loss, self.grad_norm), None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, and lets the gradients go: a forward pass has their memory, and they are still in the caches."""
        super().optimizer_step(*args, **kwargs)
        self.trainer.optimizers[0].zero_grad(set_to_none=True)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Nothing: there are no gradients before a step's first backward pass."""

    def on_before_backward(self, loss: Tensor) -> None:
        """Sums the step's losses, on the device: no finite number if one of them is none."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()


class DiffusionModule(Module):
    """Trains `denoiser` on the process's loss, every random number keyed by (seed, position).

    Args:
        denoiser: network (x, t, y) -> output; its label `null_label` means "no class".
        process: what is noised how, and the loss.
        optimizer: settings.
        seed: of the run.
        batch_size: images of an optimizer step.
        label_dropout: share of labels replaced by the null label.
        null_label: the null class, or None where the network has none.
        time_sampling: "uniform", "stratified" over each batch, or "loss_aware" with its history in checkpoints.
        augment: probability of each of EDM's changes, which the network is told of.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        process: Process,
        optimizer: OptimizerConfig,
        seed: int,
        batch_size: int,
        label_dropout: float = 0.0,
        null_label: int | None = None,
        time_sampling: Literal["uniform", "stratified", "loss_aware"] = "uniform",
        augment: float = 0.0,
    ) -> None:
        super().__init__(denoiser, optimizer, seed, batch_size)
        if label_dropout and null_label is None:
            raise ValueError("trainer.label_dropout needs a denoiser with a null class")
        self.process = process
        self.label_dropout, self.null_label = label_dropout, null_label
        self.time_sampling, self.augment = time_sampling, augment
        self.history = LossAware(process.config.steps) if time_sampling == "loss_aware" else None  # type: ignore[attr-defined]
        self._seen: list[tuple[int, float]] = []
        self._keys = {what: rng.key(seed, what) for what in ("noise", "time", "label")}

    @property
    def denoiser(self) -> nn.Module:
        """The network."""
        return self.network

    def draw(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a batch trains on: images (B, C, H, W), uniform numbers (B,), noise (B, C, H, W), labels (B,)."""
        x0, position, y = batch["x0"], batch["position"], batch["label"]
        u, drop = rng.uniforms((self._keys["time"], self._keys["label"]), position)
        if self.time_sampling == "stratified":
            u = stratified(u, position % self.batch_size, self.batch_size)
        eps = rng.normal(self._keys["noise"], position, tuple(x0.shape[1:]))
        if self.label_dropout:
            y = torch.where(drop < self.label_dropout, self.null_label, y)  # type: ignore[arg-type]
        dtype = next(self.network.parameters()).dtype
        return x0.to(dtype), u, eps.to(dtype), y

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The batch's mean loss."""
        x0, u, eps, y = self.draw(batch)
        told: dict[str, Tensor] = {}
        if self.augment:
            x0, told["augment"] = augment(x0, batch["position"], self.seed, self.augment)
        t, weight = (self.process.time(u), None) if self.history is None else self.history.time(u)
        self.seed_dropout(batch)
        self.times = t
        x, time = self.process.inputs(self.process.add_noise(x0, t, eps), t)
        losses = self.process.losses(self.network(x, time, y, **told), x0, t, eps)
        if self.history is None or weight is None:
            return losses.mean()
        self._remember(t, losses.detach().double(), batch_idx)
        return (losses * weight.to(losses.dtype)).mean()

    def _remember(self, t: Tensor, losses: Tensor, batch_idx: int) -> None:
        """Takes a step's losses into the history once it has all of them, in the order of the global batch."""
        assert self.history is not None
        self._seen += zip(together.rows(t).tolist(), together.rows(losses).tolist(), strict=True)
        if self._trainer is None or at_step_end(self._trainer, batch_idx):
            steps, values = zip(*self._seen, strict=True)
            self.history.update(torch.tensor(steps), torch.tensor(values, dtype=torch.float64))
            self._seen = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the history of a loss-aware run."""
        if self.history is not None:
            checkpoint["loss_history"] = self.history.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes it up again."""
        if self.history is not None:
            self.history.load_state_dict(checkpoint["loss_history"])


def lr_factor(settings: OptimizerConfig, images: int) -> float:
    """Share of the full learning rate once `images` are seen: linear ramp, then constant or a cosine decay."""
    ramp, end = settings.warmup_images, settings.decay_images
    rise = min(1.0, images / ramp) if ramp else 1.0
    if end is None:
        return rise
    progress = min(1.0, max(0.0, (images - ramp) / (end - ramp)))
    return rise * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))
