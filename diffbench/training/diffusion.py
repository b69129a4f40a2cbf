"""Training of any denoiser under any process."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffbench.config.sections import OptimizerConfig
from diffbench.core import distributed, rng
from diffbench.diffusion import LossAware, Process, stratified
from diffbench.diffusion.guidance import null_labels
from diffbench.training.augment import augment
from diffbench.training.module import TrainingModule


class DiffusionModule(TrainingModule):
    """Trains `denoiser` on the process's loss, every random number keyed by (seed, position).

    A batch holds x0 (B, C, H, W), label (B,) or weights over labels (B, labels), and position (B,), and may hold
    `first`, the first position as a number.

    Args:
        denoiser: network (x, t, y) -> output; its label `null_label` means "no class".
        process: how images are noised, and the loss.
        optimizer: settings.
        seed: of the run.
        batch_size: images of an optimizer step.
        label_dropout: share of labels replaced by the null label.
        null_label: the null class, or None where the network has none.
        time_sampling: "uniform", "stratified" over each batch, or "loss_aware" with its history in checkpoints.
        augment: probability of each of EDM's changes, which the network gets as a label.

    Raises:
        ValueError: if labels are dropped for a network without a null class.
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
        self.history = LossAware(process.config.steps) if time_sampling == "loss_aware" else None
        self._step_losses: list[tuple[int, float]] = []
        self._keys = {what: rng.key(seed, what) for what in ("noise", "time", "label")}

    def draw(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a batch trains on: images (B, C, H, W), uniform numbers (B,), noise (B, C, H, W), labels (B,)."""
        x0, position, y = batch["x0"], batch["position"], batch["label"]
        u, drop = rng.uniforms((self._keys["time"], self._keys["label"]), position)
        if self.time_sampling == "stratified":
            u = stratified(u, position % self.batch_size, self.batch_size)
        eps = rng.normal(self._keys["noise"], position, tuple(x0.shape[1:]))
        if self.label_dropout:
            dropped = drop < self.label_dropout
            null = null_labels(y, self.null_label)  # type: ignore[arg-type]
            y = torch.where(dropped[:, None] if y.ndim > 1 else dropped, null, y)
        dtype = next(self.network.parameters()).dtype
        return x0.to(dtype), u, eps.to(dtype), y

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The batch's mean loss."""
        x0, u, eps, y = self.draw(batch)
        inputs: dict[str, Tensor] = {}
        if self.augment:
            x0, inputs["augment"] = augment(x0, batch["position"], self.seed, self.augment)
        t, weight = (self.process.time(u), None) if self.history is None else self.history.time(u)
        self.seed_dropout(batch)
        self.times = t
        x, time = self.process.inputs(self.process.add_noise(x0, t, eps), t)
        losses = self.process.losses(self.network(x, time, y, **inputs), x0, t, eps)
        if self.history is None or weight is None:
            return losses.mean()
        self._remember(t, losses.detach().double())
        return (losses * weight.to(losses.dtype)).mean()

    def _remember(self, t: Tensor, losses: Tensor) -> None:
        """Takes a step's losses into the history once it has all of them, in the order of the global batch."""
        assert self.history is not None
        times, per_image = distributed.all_gather_rows(t).tolist(), distributed.all_gather_rows(losses).tolist()
        self._step_losses += zip(times, per_image, strict=True)
        if len(self._step_losses) >= self.batch_size:
            steps, values = zip(*self._step_losses, strict=True)
            self.history.update(torch.tensor(steps), torch.tensor(values, dtype=torch.float64))
            self._step_losses = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.history is not None:
            checkpoint["loss_history"] = self.history.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.history is not None:
            self.history.load_state_dict(checkpoint["loss_history"])
