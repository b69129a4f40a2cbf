"""The settings of training, sampling and evaluation. Apart from the code that they configure, which needs Lightning,
so that a config is checked without waiting for it."""

import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal


@dataclass
class OptimizerConfig:
    """Optimizer and learning rate; the rate follows the number of images seen."""

    name: Literal["adamw", "adam"] = "adamw"
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    ramp_images: int = 0
    """Images over which the rate rises linearly from zero."""
    decay_images: int | None = None
    """Images at which a cosine decay, begun after the ramp, ends; null keeps the rate constant."""
    final_lr: float = 0.01
    """The rate after the decay, as a share of `lr`."""
    clip_norm: float | None = None
    """Largest norm of the gradient; null for no clipping."""

    def __post_init__(self) -> None:
        _positive("optimizer", self, "lr")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"optimizer.betas: must be two numbers in [0, 1), got {self.betas}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"optimizer.clip_norm: must be positive or null, got {self.clip_norm}")
        for name in ("ramp_images", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name}: must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"optimizer.final_lr: must lie in 0 to 1, got {self.final_lr}")
        if self.decay_images is not None and self.decay_images <= self.ramp_images:
            raise ValueError(
                f"optimizer.decay_images: {self.decay_images} must exceed optimizer.ramp_images={self.ramp_images};"
                " allowed: null for a constant rate"
            )


@dataclass
class EMAConfig:
    """Exponential moving averages of the weights; the first one validates and samples unless told otherwise."""

    decays: list[float] = field(default_factory=lambda: [0.9999])
    """One average for each decay per optimizer step, in (0, 1)."""
    warmup: bool = True
    """At update n the decay is at most (1 + n) / (10 + n)."""

    def __post_init__(self) -> None:
        if not self.decays or not all(0 < d < 1 for d in self.decays) or len(set(self.decays)) < len(self.decays):
            raise ValueError(f"ema.decays: must be different numbers between 0 and 1, got {self.decays}")


@dataclass
class TrainerConfig:
    """Length, batch and cadence; all intervals are in images and rounded up to whole steps."""

    max_images: int = 1_000_000
    """Images to see in all; a longer run extends a finished one."""
    batch_size: int = 128
    """Images of one optimizer step, over all devices."""
    accumulate: int = 1
    """Micro-batches that make up a step."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null class, for classifier-free guidance."""
    log_images: int = 12_800
    validate_images: int = 128_000
    checkpoint_images: int = 128_000
    sample_images: int = 256_000
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    precision: Literal["32-true", "bf16-mixed", "64-true"] = "32-true"
    deterministic: bool = False
    channels_last: bool = True
    """Keeps convolutions in channels-last order: about a tenth faster, the same to rounding."""

    def __post_init__(self) -> None:
        names = ("max_images", "batch_size", "accumulate")
        _positive("trainer", self, *names, *(f.name for f in fields(self) if f.name.endswith("_images")))
        if self.batch_size % self.accumulate:
            raise ValueError(f"trainer.accumulate: {self.accumulate} must divide trainer.batch_size={self.batch_size}")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"trainer.label_dropout: must lie in [0, 1), got {self.label_dropout}")


@dataclass
class ValidationConfig:
    """Squared error of the denoised image on held-out images with fixed noise."""

    log_snr: list[float] = field(default_factory=lambda: [-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0])
    """Noise levels, log(alpha^2 / sigma^2)."""

    def __post_init__(self) -> None:
        if not self.log_snr:
            raise ValueError("validation.log_snr: must name at least one level")


@dataclass
class SampleConfig:
    """How samples are drawn, in training and after it."""

    sampler: Literal["ddpm", "ddim"] = "ddpm"
    steps: str = "250"
    """Steps of the sampler: a number, ddimN, or a list of sections like 10,15,20."""
    guidance: float = 1.0
    """Weight of classifier-free guidance where samples are guided; 1 is none."""
    eta: float = 0.0
    """Noise of DDIM, 0 to 1; DDPM takes none."""
    variance: Literal["fixed_small", "fixed_large"] = "fixed_large"
    """Variance of DDPM's steps; a process with a learned variance uses that instead."""
    clip: bool = True
    """Clamp the predicted image to [-1, 1] at each step."""
    batch_size: int = 500

    def __post_init__(self) -> None:
        _positive("sample", self, "batch_size")
        if not re.fullmatch(r"ddim\d+|\d+( *, *\d+)*", self.steps):
            raise ValueError(f"sample.steps: must be like 250, ddim25 or 10,15,20, got {self.steps!r}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"sample.eta: must lie in 0 to 1, got {self.eta}")
        if self.eta and self.sampler == "ddpm":
            raise ValueError("sample.eta: belongs to sample.sampler=ddim; with ddpm leave it at 0")
        if self.guidance < 0:
            raise ValueError(f"sample.guidance: must be at least 0, got {self.guidance}")


@dataclass
class EvaluateConfig:
    """Scores of generated samples against real images."""

    count: int = 500
    """Samples, spread evenly over the classes, and as many real training images to compare with."""
    extractor: Literal["digits-cnn"] = "digits-cnn"

    def __post_init__(self) -> None:
        if self.count < 20:
            raise ValueError(f"evaluate.count: must be at least 20, got {self.count}")


def _positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{section}.{name}: must be positive, got {getattr(config, name)}")
