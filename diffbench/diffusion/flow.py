"""Flow matching (Lipman et al. 2023; SiT, Ma et al. 2024): a path from noise to image over time 0 to 1.

x_t = alpha_t x_0 + sigma_t eps, where time runs from 0 (pure noise) to 1 (the image x_0).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffbench.diffusion.objective import ObjectiveConfig, Space
from diffbench.diffusion.process import Grid, Point, Process, step_count


@dataclass(kw_only=True)
class FlowConfig(ObjectiveConfig):
    """Config of flow matching as in SiT (Ma et al. 2024)."""

    path: Literal["linear", "gvp"] = "linear"
    """`linear`: alpha = t, sigma = 1 - t. `gvp`: sin(pi t / 2) and cos(pi t / 2), whose squares add up to one."""
    prediction: Space = "velocity"
    """The network's output: the velocity alpha' x0 + sigma' eps (SiT), the image (JiT), the noise, or v."""


class Flow(Process):
    """The process that a `FlowConfig` describes. Times run from 0 (noise) to 1 (image); the network sees them as is."""

    name = "flow"
    towards_image = True

    def __init__(self, config: FlowConfig | None = None) -> None:
        self.config = config or FlowConfig()

    def noising_key(self) -> tuple[Any, ...]:
        """Return the name and the path."""
        return self.name, self.config.path

    def uniform_time(self, u: Tensor) -> Tensor:
        """Return u unchanged, as float64."""
        return u.double()

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2), float64; infinite at both ends."""
        point = self.path(t)
        return 2 * (point.alpha.log() - point.sigma.log())

    def time_at(self, log_snr: Tensor) -> Tensor:
        """Return the times, float64, with these log-SNRs; inverse of `log_snr`."""
        half = 0.5 * log_snr.double()
        return half.sigmoid() if self.config.path == "linear" else half.exp().atan() * (2 / math.pi)

    def path(self, t: Tensor) -> Point:
        """Return alpha, sigma and their derivatives at times t, float64."""
        t = t.double()
        if self.config.path == "linear":
            return Point(t, t, t, 1 - t, torch.ones_like(t), -torch.ones_like(t))
        # Take sin at 1 - t rather than cos at t: this is exact at both ends.
        angle, complement = t * (math.pi / 2), (1 - t) * (math.pi / 2)
        alpha, sigma = angle.sin(), complement.sin()
        return Point(t, t, alpha, sigma, sigma * (math.pi / 2), -alpha * (math.pi / 2))

    def grid(self, steps: int | str) -> Grid:
        """Return times evenly spaced from 0 to 1, then shifted."""
        times = torch.linspace(0, 1, step_count(steps) + 1, dtype=torch.float64)
        return Grid(self.path(self._shifted(times, self.shift)), open_end=self.config.prediction == "x0")

    def sde_grid(self, steps: int | str, last: float = 0.04) -> Grid:
        """Return times from 0 to 1 - last, evenly spaced before the shift, then 1: the SDE's last step adds no noise.

        Args:
            steps: number of steps including the last, at least 2.
            last: size of the last step.
        """
        if not 0 < last < 1:
            raise ValueError(f"the last step must lie between 0 and 1, got {last}")
        end = self._shifted(torch.tensor(1 - last, dtype=torch.float64), 1 / self.shift)
        even = torch.linspace(0, float(end), step_count(steps, least=2), dtype=torch.float64)
        times = torch.cat([self._shifted(even, self.shift), torch.ones(1, dtype=torch.float64)])
        return Grid(self.path(times), open_end=False)

    def _shifted(self, t: Tensor, shift: float) -> Tensor:
        return t if shift == 1 else self.time_at(self.log_snr(t) - 2 * math.log(shift))
