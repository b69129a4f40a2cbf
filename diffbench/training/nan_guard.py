"""Skipping and counting of steps whose loss or gradient is not finite; too many in a row end training."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from diffbench.core import tensors
from diffbench.core.errors import UserError
from diffbench.training.clock import Ordered, at_step_end
from diffbench.training.fsdp import full_tensor


class Outcome:
    """Whether an optimizer step was skipped, decided on the device; the host reads it a step later and never waits.

    Args:
        skipped: device flag: whether the weights and the optimizer state were left unchanged.
        diverged: device flag: whether the step counts as divergence; None for the same as `skipped`.
    """

    def __init__(self, skipped: Tensor, diverged: Tensor | None = None) -> None:
        self.on_host = not skipped.is_cuda
        self._flags = [flag.to("cpu", non_blocking=True) for flag in (skipped, diverged) if flag is not None]  # pinned
        self._event = torch.cuda.Event() if skipped.is_cuda else None
        if self._event is not None:
            self._event.record()

    def _read(self, flag: int) -> bool:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return bool(self._flags[flag])

    @property
    def skipped(self) -> bool:
        return self._read(0)

    @property
    def diverged(self) -> bool:
        """Whether the skipped step counts as divergence; it does not while fp16's loss scale is still being found."""
        return self._read(-1)


def decide(trainer: L.Trainer, optimizer: Optimizer, loss: Tensor, norm: Tensor) -> Outcome:
    """Make the optimizer skip its step if a loss or the gradient is not finite on any rank; return the outcome.

    On a GPU, a fused optimizer reads the decision on the device and the host does not wait; any other optimizer (Muon,
    or on a CPU) gets no gradients. `loss` is the sum of the step's losses, `norm` that of the unscaled gradient.
    """

    def anywhere_infinite(value: Tensor) -> Tensor:
        return trainer.strategy.reduce((~value.isfinite()).float(), reduce_op="max")

    skipped, scaler = anywhere_infinite(loss + norm), scaler_of(trainer)
    if scaler is None:
        if not skipped.is_cpu and all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = skipped  # type: ignore[attr-defined]
        elif skipped:
            optimizer.zero_grad(set_to_none=True)
        return Outcome(skipped)
    for found in scaler._found_inf_per_device(optimizer).values():
        found.copy_(skipped)
    scale = scaler._get_scale_async()
    assert scale is not None
    return Outcome(skipped, torch.maximum(anywhere_infinite(loss), skipped * (scale < 1)))


def scaler_of(trainer: L.Trainer) -> GradScaler | None:
    """Return the gradient scaler of fp16 training, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


class NonFiniteGuard(Ordered):
    """Callback that counts skipped steps; after `most` divergent ones in a row it saves the batch and ends training."""

    place = 1

    def __init__(self, folder: Path, every: int, most: int) -> None:
        self.folder, self.every, self.most = folder, every, most
        self.skipped = self.row = 0
        self._parts: list[dict[str, Any]] = []
        self._open: tuple[L.Trainer, int, int, list[dict[str, Any]], Outcome] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.skipped_steps = self.skipped  # type: ignore[assignment]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module: Any = pl_module
        self._parts.append(module.batch)
        if not at_step_end(trainer, batch_idx):
            return
        step, outcome = trainer.global_step, module.outcome
        assert isinstance(outcome, Outcome)
        self._open, self._parts = (trainer, step, module.images_seen, self._parts, outcome), []
        if outcome.on_host or step == trainer.max_steps or module.is_due(self.every):
            self.settle()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self.settle()

    def settle(self) -> None:
        """Count the last step if it is still pending; UserError if that makes too many divergent ones in a row."""
        if self._open is None:
            return
        (trainer, step, images, parts, outcome), self._open = self._open, None
        self.skipped += outcome.skipped
        self.row = self.row + outcome.diverged if outcome.skipped else 0
        trainer.lightning_module.skipped_steps = self.skipped  # type: ignore[assignment]
        if self.row >= self.most:
            raise UserError(self._save(trainer.global_rank, step, images, parts, trainer.lightning_module))

    def _save(self, rank: int, step: int, images: int, parts: list[dict[str, Any]], module: Any) -> str:
        path = self.folder / f"nonfinite-{images:09d}{f'-rank{rank}' if rank else ''}.safetensors"
        names = [name for name, value in parts[0].items() if isinstance(value, Tensor)]
        batch = {name: torch.cat([part[name] for part in parts]) for name in names}
        weights = {f"network.{name}": full_tensor(tensor) for name, tensor in module.network.state_dict().items()}
        facts = {"step": step, "images": images, "seed": module.seed, "micro_batches": len(parts)}
        tensors.write(path, batch | weights, {name: str(value) for name, value in facts.items()})
        levels = ""
        if "time" in batch:
            t = batch["time"].double()
            snr = module.process.log_snr(t)
            levels = f", times {t.min():.4g} to {t.max():.4g}, log-SNR {snr.min():.2f} to {snr.max():.2f}"
        return (
            f"{self.folder}: loss or gradient of {self.row} steps in a row was not finite, last at step {step:,}"
            f" ({images:,} images{levels}); lower optimizer.lr, set optimizer.grad_clip_norm or another"
            f" trainer.precision; batch and weights are saved in {path}"
        )

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        return {"skipped": self.skipped, "row": self.row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.row = state_dict["skipped"], state_dict["row"]
