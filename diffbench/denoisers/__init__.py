"""Denoiser networks, by name in `DENOISERS`; they know nothing of noise schedules, losses, guidance or data."""

from diffbench.denoisers.ddpmpp import DDPMpp, DDPMppConfig
from diffbench.denoisers.diffit import DiffiT, DiffiTConfig
from diffbench.denoisers.diffit_latent import DiffiTLatent, DiffiTLatentConfig
from diffbench.denoisers.dit import DiT, DiTConfig
from diffbench.denoisers.pretrained.convert import from_reference
from diffbench.denoisers.registry import DENOISERS, PRESETS, build, from_preset
from diffbench.denoisers.segformer import SegFormer, SegFormerConfig
from diffbench.denoisers.unet import UNet, UNetConfig
from diffbench.denoisers.uvit import UViT, UViTConfig

__all__ = [
    "DENOISERS",
    "PRESETS",
    "DDPMpp",
    "DDPMppConfig",
    "DiT",
    "DiTConfig",
    "DiffiT",
    "DiffiTConfig",
    "DiffiTLatent",
    "DiffiTLatentConfig",
    "SegFormer",
    "SegFormerConfig",
    "UNet",
    "UNetConfig",
    "UViT",
    "UViTConfig",
    "build",
    "from_preset",
    "from_reference",
]
