"""The settings of training. Apart from the code that they configure, which needs Lightning, so that a config is checked
without waiting for it."""

from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch

from diffbench.denoisers.base import check_positive

AUGMENT_WIDTH = 9
"""Entries of the label that tells a network what augmentation did to an image."""


@dataclass
class OptimizerConfig:
    """Optimizer and learning rate; the rate follows the number of images seen."""

    name: Literal["adamw", "adam"] = "adamw"
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    warmup_images: int = 0
    """Images over which the rate rises linearly from zero."""
    decay_images: int | None = None
    """Images at which a cosine decay, begun after the ramp, ends; null keeps the rate constant."""
    final_lr: float = 0.01
    """The rate after the decay, as a share of `lr`."""
    grad_clip_norm: float | None = None
    """Largest norm of the gradient; null for no clipping."""

    def __post_init__(self) -> None:
        check_positive(self, "lr", section="optimizer")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"optimizer.betas: must be two numbers in [0, 1), got {self.betas}")
        if self.grad_clip_norm is not None and self.grad_clip_norm <= 0:
            raise ValueError(f"optimizer.grad_clip_norm: must be positive or null, got {self.grad_clip_norm}")
        for name in ("warmup_images", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name}: must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"optimizer.final_lr: must lie in 0 to 1, got {self.final_lr}")
        if self.decay_images is not None and self.decay_images <= self.warmup_images:
            raise ValueError(
                f"optimizer.decay_images: {self.decay_images} must exceed optimizer.warmup_images={self.warmup_images};"
                " allowed: null for a constant rate"
            )


@dataclass
class EMAConfig:
    """Exponential moving averages of the weights; the first one validates and samples unless told otherwise."""

    decays: list[float] = field(default_factory=lambda: [0.9999])
    """One average for each decay per optimizer step, in (0, 1)."""
    half_life_images: list[int] | None = None
    """The same as half-lives in images, in place of `decays` (EDM)."""
    warmup: bool = True
    """At update n the decay is at most (1 + n) / (10 + n)."""
    ramp: float | None = None
    """Instead: the half-life is at most this share of the images seen (EDM: 0.05)."""

    def in_steps(self, batch_size: int) -> "EMAConfig":
        """The same with `decays` filled in from the half-lives.

        Raises:
            ValueError: if other decays were given besides.
        """
        if self.half_life_images is None:
            return self
        decays = [round(0.5 ** (batch_size / n), 8) for n in self.half_life_images]
        if self.decays not in (EMAConfig().decays, decays):
            raise ValueError(f"ema.decays: {self.decays} stands beside ema.half_life_images; give one of the two")
        return replace(self, decays=decays)

    def __post_init__(self) -> None:
        if self.half_life_images is not None and (not self.half_life_images or min(self.half_life_images) < 1):
            raise ValueError(f"ema.half_life_images: must be numbers of at least 1, got {self.half_life_images}")
        if self.ramp is not None and not 0 < self.ramp <= 1:
            raise ValueError(f"ema.ramp: must lie in (0, 1] or be null, got {self.ramp}")
        if not self.decays or not all(0 < d < 1 for d in self.decays) or len(set(self.decays)) < len(self.decays):
            raise ValueError(f"ema.decays: must be different numbers between 0 and 1, got {self.decays}")


@dataclass
class TrainerConfig:
    """Length, batch and cadence; all intervals are in images and rounded up to whole steps."""

    max_images: int = 1_000_000
    """Images to see in all; a longer run extends a finished one."""
    batch_size: int = 128
    """Images of one optimizer step, over all devices."""
    accumulate_grad_batches: int = 1
    """Micro-batches that make up a step."""
    log_images: int = 12_800
    validate_images: int = 128_000
    checkpoint_images: int = 128_000
    sample_images: int = 256_000
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    devices: int = 1
    """Processes on each machine, each with a device of its own; they share a step's images."""
    num_nodes: int = 1
    """Machines; on several of them torchrun or srun starts the command."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes share the network: ddp (auto): each holds it whole; fsdp: each holds a part of the weights,
    the averages and the optimizer's state."""
    timeout_s: int = 1800
    """Seconds that a process waits for the others before it gives up."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "64-true"] = "auto"
    """auto: bf16-mixed for a denoiser on a CUDA GPU that knows bfloat16, else 32-true; config.yaml holds which.
    16-mixed scales the gradients, and skips steps while it looks for the scale."""
    tf32: bool = False
    """Products and convolutions of float32 on a CUDA GPU with 10 bits of mantissa; false: all 23, also where PyTorch
    would not."""
    max_skipped: int = 10
    """Steps in a row that are skipped, because a loss or gradient is no finite number, until training stops."""
    deterministic: bool = False
    channels_last: bool = True
    """Keeps convolutions in channels-last order: about a tenth faster, the same to rounding."""
    data_on_device: bool | None = None
    """Keeps the whole training part on the device; null: on a GPU with four times the room."""
    async_checkpoints: bool | None = None
    """Writes resume states while training goes on, from a copy in memory; null: on a GPU."""

    def __post_init__(self) -> None:
        names = ["max_images", "batch_size", "accumulate_grad_batches", "max_skipped"]
        names += ["devices", "num_nodes", "timeout_s"]
        names += [f.name for f in fields(self) if f.name.endswith("_images")]
        check_positive(self, *names, section="trainer")
        parts = self.accumulate_grad_batches
        if self.batch_size % parts:
            raise ValueError(
                f"trainer.accumulate_grad_batches: {parts} must divide trainer.batch_size={self.batch_size}"
            )
        if self.batch_size % (parts * self.processes):
            raise ValueError(
                f"trainer.batch_size: {self.batch_size} must be a multiple of trainer.devices={self.devices} x"
                f" trainer.num_nodes={self.num_nodes} x trainer.accumulate_grad_batches={parts}"
            )
        if self.strategy != "auto" and self.processes == 1:
            raise ValueError(
                f"trainer.strategy: {self.strategy} shares work between processes, and here is one; allowed: auto, or"
                " trainer.devices above 1"
            )
        if self.strategy == "fsdp" and self.precision not in ("auto", "32-true", "bf16-mixed"):
            raise ValueError(
                f"trainer.precision: {self.precision} does not go with trainer.strategy=fsdp; allowed: 32-true,"
                " bf16-mixed"
            )

    @property
    def processes(self) -> int:
        """Processes in all."""
        return self.devices * self.num_nodes

    @property
    def max_steps(self) -> int:
        """Optimizer steps in all."""
        return -(-self.max_images // self.batch_size)


def precision_here(settings: TrainerConfig, low: bool) -> Literal["32-true", "bf16-mixed", "16-mixed", "64-true"]:
    """What `trainer.precision` means on this machine; `low`, whether auto may take bfloat16."""
    if settings.precision != "auto":
        return settings.precision
    there = low and settings.accelerator in ("auto", "gpu") and torch.cuda.is_available()
    return "bf16-mixed" if there and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


@dataclass
class DenoiserTrainerConfig(TrainerConfig):
    """What training a denoiser has besides."""

    label_dropout: float = 0.1
    """Share of labels replaced by the null class, for classifier-free guidance."""
    time_sampling: Literal["uniform", "stratified", "loss_aware"] = "uniform"
    """How training times are drawn over the process's own distribution: one by one, spread evenly over each batch, or
    by the size of past losses (Nichol & Dhariwal 2021, §3.3), which unpairs the run from others."""
    augment: float = 0.0
    """Probability of each non-leaking change of EDM's augmentation; needs a network with an augmentation input."""
    compile: Literal["none", "block", "model"] = "none"
    """Compiles the network, or each of its blocks (less waiting): the same to rounding. Needs a C++ compiler."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy == "fsdp" and self.compile != "none":
            raise ValueError(
                f"trainer.compile: {self.compile} does not go with trainer.strategy=fsdp; allowed: none, or"
                " trainer.strategy=ddp"
            )
        if not 0 <= self.augment <= 1:
            raise ValueError(f"trainer.augment: must lie in 0 to 1, got {self.augment}")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"trainer.label_dropout: must lie in [0, 1), got {self.label_dropout}")
