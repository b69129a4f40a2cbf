"""The discrete variance-preserving process: noising, what the network predicts, the loss, and the way back.

x_t = alpha_t x_0 + sigma_t eps with alpha_t^2 = prod(1 - beta), sigma_t^2 = 1 - alpha_t^2. A process is no
nn.Module: its tables stay float64 and out of checkpoints. It draws no random numbers: callers pass u and eps.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffbench.diffusion.schedules import SCHEDULES, Tables


class Prediction(NamedTuple):
    """What a network's output says about x_t: the clean image and the noise in it, both (B, C, H, W)."""

    x0: Tensor
    eps: Tensor


@dataclass
class VPConfig:
    """Discrete VP diffusion (DDPM, Ho et al. 2020; improved DDPM, Nichol & Dhariwal 2021)."""

    steps: int = 1000
    """T, the number of noise levels."""
    schedule: Literal["linear", "cosine"] = "linear"
    prediction: Literal["eps", "x0", "v"] = "eps"
    """What the network puts out: the noise, the image, or v = alpha eps - sigma x0 (Salimans & Ho 2022)."""

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"process.steps must be at least 2, got {self.steps}")
        if self.schedule == "linear" and self.steps <= 20:
            raise ValueError(f"process.steps must exceed 20 with process.schedule=linear, got {self.steps}")


class DiscreteVP:
    """The process of a `VPConfig`. Times are step numbers 0..T-1, 0 the least noisy; networks see floats."""

    def __init__(self, config: VPConfig) -> None:
        self.config = config
        self.tables = Tables.from_betas(SCHEDULES[config.schedule](config.steps))
        bar = self.tables.alphas_cumprod
        self._log_snr = (bar / (1 - bar)).log()
        self._on: dict[torch.device, Tensor] = {torch.device("cpu"): self._log_snr}

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at times t (B,), float64; linear between steps."""
        table = self._on.setdefault(t.device, self._log_snr.to(t.device))
        if not t.is_floating_point():
            return table[t]
        low = t.floor().long().clamp(0, len(table) - 2)
        return torch.lerp(table[low], table[low + 1], t.double() - low)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The (fractional) time, float64, at which the process has these log-SNRs; inverse of `log_snr`.

        Raises:
            ValueError: where the process never reaches the level.
        """
        table = self._log_snr.to(log_snr.device)
        if bool(((log_snr > table[0]) | (log_snr < table[-1])).any()):
            raise ValueError(
                f"log-SNR must lie in {table[-1]:.2f} to {table[0]:.2f} for this process, got {log_snr.tolist()}"
            )
        falling = table.flip(0)
        i = torch.searchsorted(falling, log_snr.double()).clamp(1, len(table) - 1)
        fraction = (log_snr - falling[i - 1]) / (falling[i] - falling[i - 1])
        return len(table) - 1 - (i - 1 + fraction)

    def time(self, u: Tensor) -> Tensor:
        """Training times (B,) int64, uniform over the steps for u (B,) uniform in (0, 1)."""
        return (u * self.config.steps).long().clamp(max=self.config.steps - 1)

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at times t (B,), in the dtype of `like` and shaped to broadcast over it."""
        log_snr = self.log_snr(t).reshape(-1, *[1] * (like.ndim - 1))
        return log_snr.sigmoid().sqrt().to(like.dtype), (-log_snr).sigmoid().sqrt().to(like.dtype)

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t of images x0 and noise eps (B, C, H, W) at times t (B,)."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network should put out, (B, C, H, W)."""
        if self.config.prediction == "v":
            alpha, sigma = self.alpha_sigma(t, x0)
            return alpha * eps - sigma * x0
        return eps if self.config.prediction == "eps" else x0

    def convert(self, out: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """A network's output (B, C, H, W) at x_t and times t (B,) as image and noise."""
        alpha, sigma = self.alpha_sigma(t, x_t)
        if self.config.prediction == "eps":
            return Prediction((x_t - sigma * out) / alpha, out)
        if self.config.prediction == "x0":
            return Prediction(out, (x_t - alpha * out) / sigma)
        return Prediction(alpha * x_t - sigma * out, sigma * x_t + alpha * out)

    def losses(self, out: Tensor, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Mean squared error of each sample's output, (B,) (the simple loss, Ho et al. 2020, Eq. 14)."""
        return (out - self.target(x0, t, eps)).square().flatten(1).mean(1)
