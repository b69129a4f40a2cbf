"""The EDM process (Karras et al. 2022): x_t = x_0 + sigma eps, and a network made easy to train by its scaling.

Its time is sigma itself. The denoised image is D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) with network F.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffbench.diffusion.process import Grid, Point, Prediction, Process, per_sample, step_count
from diffbench.diffusion.timesteps import normal_quantiles


@dataclass
class EDMConfig:
    """EDM (Karras et al. 2022, Table 1)."""

    sigma_data: float | None = None
    """Standard deviation of the data; null is 0.5, that of pixels in [-1, 1], or 1 for latents, which are scaled."""
    p_mean: float = -1.2
    """Mean of ln(sigma) in training."""
    p_std: float = 1.2
    """Standard deviation of ln(sigma) in training."""
    sigma_min: float = 0.002
    """Least noise level in sampling."""
    sigma_max: float = 80.0
    """Largest noise level in sampling."""
    rho: float = 7.0
    """Density of the sampling levels at little noise; 1 spaces them evenly."""

    def __post_init__(self) -> None:
        for name in ("sigma_data", "p_std", "rho"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"process.{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"process.sigma_min must lie between 0 and process.sigma_max={self.sigma_max}, got {self.sigma_min}"
            )


class EDM(Process):
    """The process of an `EDMConfig`. Times are noise levels sigma."""

    name = "edm"

    def __init__(self, config: EDMConfig) -> None:
        self.config, self.sigma_data = config, 0.5 if config.sigma_data is None else config.sigma_data

    def noising(self) -> tuple[Any, ...]:
        """Noise levels, and the scale of the network's input."""
        return self.name, self.sigma_data

    def time(self, u: Tensor) -> Tensor:
        """Log-normal noise levels (B,) float64 for u (B,) uniform in (0, 1) (Karras et al. 2022, Table 1)."""
        return normal_quantiles(u, self.config.p_mean, self.config.p_std).exp()

    def log_snr(self, t: Tensor) -> Tensor:
        """-2 ln(sigma), float64."""
        return -2 * t.double().log()

    def time_at(self, log_snr: Tensor) -> Tensor:
        """exp(-log_snr / 2), float64."""
        return (-0.5 * log_snr.double()).exp()

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """1 and sigma, shaped to broadcast over `like`."""
        sigma = per_sample(t, like)
        return torch.ones_like(sigma), sigma

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """c_in x = x / sqrt(sigma^2 + sigma_data^2) and c_noise = ln(sigma) / 4."""
        return x_t / per_sample(self._total(t), x_t), (t.double().log() / 4).to(x_t.dtype)

    def convert(self, out: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """The denoised image D, and the noise (x - D) / sigma written without their difference."""
        sigma, total, data = t.double(), self._total(t), self.sigma_data
        x0 = per_sample((data / total) ** 2, x_t) * x_t + per_sample(sigma * data / total, x_t) * out
        eps = per_sample(sigma / total**2, x_t) * x_t - per_sample(data / total, x_t) * out
        return Prediction(x0, eps)

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """(x_0 - c_skip x) / c_out, (B, C, H, W).

        The loss, its squared error, is (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 |D - x_0|^2, weighted by
        1 / c_out^2.
        """
        total, data = self._total(t), self.sigma_data
        return per_sample(t.double() / (data * total), x0) * x0 - per_sample(data / total, x0) * eps

    def grid(self, steps: int | str) -> Grid:
        """Noise levels evenly spread in sigma^(1 / rho) from sigma_max to sigma_min, then 0 (Eq. 5)."""
        count, c = step_count(steps), self.config
        ends = c.sigma_max ** (1 / c.rho), c.sigma_min ** (1 / c.rho)
        ramp = torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
        sigma = torch.cat([(ends[0] + ramp * (ends[1] - ends[0])) ** c.rho, torch.zeros(1, dtype=torch.float64)])
        one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
        return Grid(Point(sigma, sigma, one, sigma, zero, one), scale=c.sigma_max)

    def _total(self, t: Tensor) -> Tensor:
        return (t.double() ** 2 + self.sigma_data**2).sqrt()
