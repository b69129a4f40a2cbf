"""Diffusion: schedules, process, samplers, guidance. Nothing here draws random numbers."""

from diffbench.diffusion.guidance import classifier_free
from diffbench.diffusion.process import DiscreteVP, Prediction, VPConfig
from diffbench.diffusion.samplers import ddim, ddpm
from diffbench.diffusion.schedules import Tables, space_timesteps

__all__ = [
    "DiscreteVP",
    "Prediction",
    "Tables",
    "VPConfig",
    "classifier_free",
    "ddim",
    "ddpm",
    "space_timesteps",
]
