"""Denoisers: networks that know nothing of schedules, losses, guidance or data. Each is registered by name here."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diffbench.denoisers.diffit import DiffiT, DiffiTConfig
from diffbench.denoisers.dit import DIT_PRESETS, DiT, DiTConfig
from diffbench.denoisers.unet import UNet, UNetConfig


@dataclass(frozen=True)
class Entry:
    """A registered denoiser: its dataclass config, its class, and one line for `diffbench list`."""

    config: type
    build: type[nn.Module]
    summary: str
    presets: dict[str, Any] = field(default_factory=dict)
    """Published sizes by name, for `denoiser.preset` and `diffbench list`."""


DENOISERS = {
    "unet": Entry(UNetConfig, UNet, "U-Net with residual blocks and attention (ADM)"),
    "dit": Entry(DiTConfig, DiT, "Vision Transformer with adaLN-Zero (DiT)", DIT_PRESETS),
    "diffit": Entry(DiffiTConfig, DiffiT, "U-shaped transformer with time-dependent self-attention (DiffiT)"),
}


def build(name: str, config: Any, **shape: Any) -> nn.Module:
    """Builds a registered denoiser; `shape` is image_size, channels, num_classes, null_class, learn_sigma."""
    return DENOISERS[name].build(config, **shape)


__all__ = ["DENOISERS", "DiT", "DiTConfig", "DiffiT", "DiffiTConfig", "UNet", "UNetConfig", "build"]
