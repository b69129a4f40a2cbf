"""Denoisers: networks that know nothing of schedules, losses, guidance or data. Each is registered by name here."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diffbench.denoisers import presets
from diffbench.denoisers.ddpmpp import DDPMpp, DDPMppConfig
from diffbench.denoisers.diffit import DiffiT, DiffiTConfig
from diffbench.denoisers.diffit_latent import DiffiTLatent, DiffiTLatentConfig
from diffbench.denoisers.dit import DiT, DiTConfig
from diffbench.denoisers.pretrained.convert import from_reference
from diffbench.denoisers.unet import UNet, UNetConfig


@dataclass(frozen=True)
class Entry:
    """A registered denoiser: its dataclass config, its class, and one line for `diffbench list`."""

    config: type
    build: type[nn.Module]
    summary: str
    presets: dict[str, Any] = field(default_factory=dict)
    """Published sizes by name, for `denoiser.preset`; `presets.sizes` counts them."""
    width: str = ""
    """The key that widens the network, a number or a list that grows in proportion; by it studies match sizes."""
    depth: str = ""
    """The key that deepens it."""


def _configs(table: dict[str, presets.Preset]) -> dict[str, Any]:
    return {name: preset.config for name, preset in table.items()}


DENOISERS = {
    "unet": Entry(
        UNetConfig,
        UNet,
        "U-Net with residual blocks and attention (ADM)",
        _configs(presets.ADM),
        "model_channels",
        "num_res_blocks",
    ),
    "dit": Entry(
        DiTConfig, DiT, "Vision Transformer with adaLN-Zero (DiT)", _configs(presets.DIT), "hidden_size", "depth"
    ),
    "diffit": Entry(
        DiffiTConfig,
        DiffiT,
        "U-shaped transformer with time-dependent self-attention (DiffiT)",
        _configs(presets.DIFFIT),
        "channels",
        "blocks",
    ),
    "diffit-latent": Entry(
        DiffiTLatentConfig,
        DiffiTLatent,
        "Vision Transformer with time-dependent self-attention (DiffiT for latents)",
        _configs(presets.DIFFIT_LATENT),
        "hidden_size",
        "depth",
    ),
    "ddpmpp": Entry(
        DDPMppConfig,
        DDPMpp,
        "U-Net as EDM trains it (DDPM++)",
        _configs(presets.DDPMPP),
        "model_channels",
        "num_blocks",
    ),
}


def build(name: str, config: Any, **shape: Any) -> nn.Module:
    """Builds a registered denoiser; `shape` is image_size, channels, num_classes, null_class, learn_sigma."""
    return DENOISERS[name].build(config, **shape)


__all__ = [
    "DENOISERS",
    "DDPMpp",
    "DDPMppConfig",
    "DiT",
    "DiTConfig",
    "DiffiT",
    "DiffiTConfig",
    "DiffiTLatent",
    "DiffiTLatentConfig",
    "UNet",
    "UNetConfig",
    "build",
    "from_reference",
]
