"""The denoisers by name: adding one takes its file and its row here."""

from dataclasses import dataclass
from typing import Any

from diffbench.denoisers import ddpmpp, diffit, diffit_latent, dit, segformer, unet, uvit
from diffbench.denoisers.base import Denoiser, Preset


@dataclass(frozen=True)
class Entry:
    """A registered denoiser."""

    config: type
    """Its dataclass: the keys of the section `denoiser`."""
    build: type[Denoiser]
    summary: str
    """One line for `diffbench list`."""
    width: str
    """The key that widens the network, a number or a list that grows in proportion; studies match sizes by it."""
    depth: str
    """The key that deepens it."""
    presets: dict[str, Preset]
    """Published sizes by name, for `denoiser.preset`."""


DENOISERS = {
    "unet": Entry(
        unet.UNetConfig,
        unet.UNet,
        "U-Net with residual blocks and attention (ADM)",
        "model_channels",
        "num_res_blocks",
        unet.PRESETS,
    ),
    "dit": Entry(
        dit.DiTConfig, dit.DiT, "Vision Transformer with adaLN-Zero (DiT)", "hidden_size", "depth", dit.PRESETS
    ),
    "diffit": Entry(
        diffit.DiffiTConfig,
        diffit.DiffiT,
        "U-shaped transformer with time-dependent self-attention (DiffiT)",
        "channels",
        "blocks",
        diffit.PRESETS,
    ),
    "diffit-latent": Entry(
        diffit_latent.DiffiTLatentConfig,
        diffit_latent.DiffiTLatent,
        "Vision Transformer with time-dependent self-attention (DiffiT for latents)",
        "hidden_size",
        "depth",
        diffit_latent.PRESETS,
    ),
    "ddpmpp": Entry(
        ddpmpp.DDPMppConfig,
        ddpmpp.DDPMpp,
        "U-Net as EDM trains it (DDPM++)",
        "model_channels",
        "num_blocks",
        ddpmpp.PRESETS,
    ),
    "uvit": Entry(
        uvit.UViTConfig,
        uvit.UViT,
        "Vision Transformer with long skips, time and class as tokens (U-ViT)",
        "hidden_size",
        "depth",
        uvit.PRESETS,
    ),
    "segformer": Entry(
        segformer.SegFormerConfig,
        segformer.SegFormer,
        "Mix Transformer with an all-MLP decoder, conditioned here (SegFormer)",
        "hidden_sizes",
        "depths",
        segformer.PRESETS,
    ),
}

PRESETS = {name: preset for entry in DENOISERS.values() for name, preset in entry.presets.items()}


def build(name: str, config: Any, **shape: Any) -> Denoiser:
    """Build a registered denoiser; `shape` is image_size, channels, num_classes, null_class, learn_sigma."""
    return DENOISERS[name].build(config, **shape)
