"""Flow matching (Lipman et al. 2023; SiT, Ma et al. 2024): the network predicts the velocity along a path.

x_t = alpha_t x_0 + sigma_t eps where time runs from 0, all noise, to 1, the image x_0.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffbench.diffusion.process import Grid, Point, Prediction, Process, per_sample, step_count
from diffbench.diffusion.timesteps import normal_quantiles


@dataclass
class FlowConfig:
    """Flow matching as in SiT (Ma et al. 2024)."""

    path: Literal["linear", "gvp"] = "linear"
    """`linear`: alpha = t, sigma = 1 - t. `gvp`: sin(pi t / 2) and cos(pi t / 2), whose variances add up to one."""
    times: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of training times; logit-normal as in Esser et al. 2024."""
    logit_mean: float = 0.0
    """Mean of the logit of logit-normal times; above 0 they lie nearer to the image."""
    logit_std: float = 1.0
    """Standard deviation of the logit of logit-normal times."""

    def __post_init__(self) -> None:
        if self.logit_std <= 0:
            raise ValueError(f"process.logit_std must be positive, got {self.logit_std}")


class Flow(Process):
    """The process of a `FlowConfig`. Times are 0 (noise) to 1 (image); the network sees them as they are."""

    name = "flow"

    def __init__(self, config: FlowConfig) -> None:
        self.config = config

    def noising(self) -> tuple[Any, ...]:
        """The path."""
        return self.name, self.config.path

    def time(self, u: Tensor) -> Tensor:
        """Training times (B,) float64 for u (B,) uniform in (0, 1)."""
        if self.config.times == "uniform":
            return u.double()
        return normal_quantiles(u, self.config.logit_mean, self.config.logit_std).sigmoid()

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), float64; infinite at the ends."""
        point = self.path(t)
        return 2 * (point.alpha.log() - point.sigma.log())

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The times, float64, with these log-SNRs; inverse of `log_snr`."""
        half = 0.5 * log_snr.double()
        return half.sigmoid() if self.config.path == "linear" else half.exp().atan() * (2 / math.pi)

    def path(self, t: Tensor) -> Point:
        """alpha, sigma and their derivatives at times t, float64."""
        t = t.double()
        if self.config.path == "linear":
            return Point(t, t, t, 1 - t, torch.ones_like(t), -torch.ones_like(t))
        # sin at 1 - t rather than cos at t: both ends are then exact.
        angle, rest = t * (math.pi / 2), (1 - t) * (math.pi / 2)
        alpha, sigma = angle.sin(), rest.sin()
        return Point(t, t, alpha, sigma, sigma * (math.pi / 2), -alpha * (math.pi / 2))

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at times t (B,), shaped to broadcast over `like`."""
        point = self.path(t)
        return per_sample(point.alpha, like), per_sample(point.sigma, like)

    def convert(self, out: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Image and noise, from x = alpha x_0 + sigma eps and the velocity alpha' x_0 + sigma' eps.

        Of an output with twice the channels the first half is the velocity (SiT keeps DiT's doubled last layer).
        """
        velocity, p = out[:, : x_t.shape[1]], self.path(t)
        scale = p.alpha * p.sigma_rate - p.sigma * p.alpha_rate
        x0 = per_sample(p.sigma_rate / scale, x_t) * x_t - per_sample(p.sigma / scale, x_t) * velocity
        eps = per_sample(p.alpha / scale, x_t) * velocity - per_sample(p.alpha_rate / scale, x_t) * x_t
        return Prediction(x0, eps)

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The velocity alpha' x_0 + sigma' eps, (B, C, H, W)."""
        p = self.path(t)
        return per_sample(p.alpha_rate, x0) * x0 + per_sample(p.sigma_rate, x0) * eps

    def grid(self, steps: int | str) -> Grid:
        """Times evenly spread from 0 to 1."""
        return Grid(self.path(torch.linspace(0, 1, step_count(steps) + 1, dtype=torch.float64)), open_end=False)

    def sde_grid(self, steps: int | str, last: float = 0.04) -> Grid:
        """Times evenly spread from 0 to 1 - last, then 1: the SDE ends with one step of that size without noise.

        Args:
            steps: of all, the last included; at least 2.
            last: size of the last step.
        """
        if not 0 < last < 1:
            raise ValueError(f"the last step must lie between 0 and 1, got {last}")
        even = torch.linspace(0, 1 - last, step_count(steps, least=2), dtype=torch.float64)
        return Grid(self.path(torch.cat([even, torch.ones(1, dtype=torch.float64)])), open_end=False)
