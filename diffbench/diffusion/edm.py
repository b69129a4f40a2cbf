"""The EDM process (Karras et al. 2022): x_t = x_0 + sigma eps, with a preconditioned network.

Time is sigma itself. The denoised image is D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) with network F.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffbench.diffusion.objective import ObjectiveConfig
from diffbench.diffusion.process import Grid, Point, Process, per_sample, step_count


@dataclass(kw_only=True)
class EDMConfig(ObjectiveConfig):
    """Config of EDM (Karras et al. 2022, Table 1)."""

    prediction: Literal["edm", "x0", "eps", "v", "velocity"] = "edm"
    """The network's output: F of the preconditioning, or directly the image, the noise (velocity is the same here), or
    v. The input is scaled in every case."""
    times: Literal["uniform", "log_normal", "logit_normal"] = "log_normal"
    sigma_min: float = 0.002
    """Smallest noise level in sampling."""
    sigma_max: float = 80.0
    """Largest noise level in sampling."""
    rho: float = 7.0
    """Exponent of the sampling grid: higher puts more levels at low noise; 1 spaces them evenly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho <= 0:
            raise ValueError(f"process.rho: must be positive, got {self.rho}")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"process.sigma_min: must lie between 0 and process.sigma_max={self.sigma_max}, got {self.sigma_min}"
            )


class EDM(Process):
    """The process that an `EDMConfig` describes. Times are noise levels sigma."""

    name = "edm"

    def __init__(self, config: EDMConfig | None = None) -> None:
        self.config = config or EDMConfig()

    def noising_key(self) -> tuple[Any, ...]:
        """Return the name and sigma_data, which sets the scale of the network's input."""
        return self.name, self.sigma_data

    def uniform_time(self, u: Tensor) -> Tensor:
        """Return noise levels (B,) float64, log-uniform from sigma_min to sigma_max."""
        low, high = math.log(self.config.sigma_min), math.log(self.config.sigma_max)
        return (low + (high - low) * u.double()).exp()

    def log_snr(self, t: Tensor) -> Tensor:
        """Return -2 ln(sigma), float64."""
        return -2 * t.double().log()

    def time_at(self, log_snr: Tensor) -> Tensor:
        """Return sigma = exp(-log_snr / 2), float64."""
        return (-0.5 * log_snr.double()).exp()

    def path(self, t: Tensor) -> Point:
        """Return alpha = 1 and sigma with their derivatives with respect to sigma."""
        t = t.double()
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return Point(t, t, one, t, zero, one)

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return c_in x = x / sqrt(sigma^2 + sigma_data^2) and c_noise = ln(sigma) / 4."""
        return x_t / per_sample(self.path(t).total(self.sigma_data), x_t), (t.double().log() / 4).to(x_t.dtype)

    def noise_level(self, time: Tensor) -> Tensor:
        """Return sigma = exp(4 c_noise), float64."""
        return (4 * time.double()).exp()

    def grid(self, steps: int | str) -> Grid:
        """Return noise levels evenly spaced in sigma^(1 / rho) from sigma_max to sigma_min, then 0 (Eq. 5)."""
        count, c = step_count(steps), self.config
        ends = c.sigma_max ** (1 / c.rho), c.sigma_min ** (1 / c.rho)
        ramp = torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
        sigma = torch.cat([(ends[0] + ramp * (ends[1] - ends[0])) ** c.rho, torch.zeros(1, dtype=torch.float64)])
        return Grid(self.path(sigma), scale=c.sigma_max)
