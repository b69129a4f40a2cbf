"""Diffusion processes, samplers, guidance and likelihood. Nothing here draws random numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffbench.diffusion.edm import EDM, EDMConfig
from diffbench.diffusion.flow import Flow, FlowConfig
from diffbench.diffusion.guidance import autoguidance, classifier_free, classifier_guidance, interval, power_cosine
from diffbench.diffusion.likelihood import exact_log_likelihood, variational_bound
from diffbench.diffusion.process import Grid, LabelledPredict, Point, Predict, Prediction, Process, predictor
from diffbench.diffusion.samplers import (
    PAIRS,
    SAMPLERS,
    StepLimitError,
    check_pair,
    ddim,
    ddpm,
    dopri5,
    dpm_solver,
    euler,
    euler_maruyama,
    heun,
)
from diffbench.diffusion.schedules import Tables, space_timesteps
from diffbench.diffusion.timesteps import LossAware, stratified
from diffbench.diffusion.vp import DiscreteVP, VPConfig


@dataclass(frozen=True)
class ProcessEntry:
    """A registered process: its config dataclass, its class, and a one-line summary for `diffbench list`."""

    config: type
    build: Callable[[Any], Process]
    summary: str


PROCESSES = {
    "vp": ProcessEntry(VPConfig, DiscreteVP, "discrete variance-preserving diffusion (DDPM, ADM, DiT)"),
    "edm": ProcessEntry(EDMConfig, EDM, "continuous noise levels with a preconditioned network (EDM)"),
    "flow": ProcessEntry(FlowConfig, Flow, "flow matching, linear or trigonometric path (SiT)"),
}

__all__ = [
    "EDM",
    "PAIRS",
    "PROCESSES",
    "SAMPLERS",
    "DiscreteVP",
    "EDMConfig",
    "Flow",
    "FlowConfig",
    "Grid",
    "LabelledPredict",
    "LossAware",
    "Point",
    "Predict",
    "Prediction",
    "Process",
    "ProcessEntry",
    "StepLimitError",
    "Tables",
    "VPConfig",
    "autoguidance",
    "check_pair",
    "classifier_free",
    "classifier_guidance",
    "ddim",
    "ddpm",
    "dopri5",
    "dpm_solver",
    "euler",
    "euler_maruyama",
    "exact_log_likelihood",
    "heun",
    "interval",
    "power_cosine",
    "predictor",
    "space_timesteps",
    "stratified",
    "variational_bound",
]
