"""The discrete variance-preserving process (DDPM): noising, predictions, losses, and respacing for samplers.

x_t = alpha_t x_0 + sigma_t eps with alpha_t^2 = prod(1 - beta), sigma_t^2 = 1 - alpha_t^2. Times are step numbers
0..T-1, 0 the least noisy.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from diffbench.diffusion.likelihood import bound_term
from diffbench.diffusion.objective import ObjectiveConfig, Space
from diffbench.diffusion.process import Grid, Point, Prediction, Process
from diffbench.diffusion.schedules import SCHEDULES, Tables, Variance, at, zero_terminal_snr

# Replaces a log-SNR of minus infinity, which cannot be interpolated; its sigmoid is exactly 0 in float64.
NO_SIGNAL = -1000.0


@dataclass
class VPConfig(ObjectiveConfig):
    """Config of discrete VP diffusion (DDPM, Ho et al. 2020; improved DDPM, Nichol & Dhariwal 2021)."""

    steps: int = 1000
    """T, the number of noise levels."""
    schedule: Literal["linear", "cosine", "scaled_linear", "given"] = "linear"
    prediction: Space = "eps"
    """The network's output: the noise, the image, or v = alpha eps - sigma x0 (velocity is the same here)."""
    variance: Variance = "fixed_large"
    """Variance of the reverse steps in the loss; `learned_range` needs a network with twice the output channels."""
    loss: Literal["mse", "hybrid", "rescaled_hybrid", "kl", "rescaled_kl"] = "mse"
    """`hybrid` adds the step's term of the variational bound, which trains only the variance, to the MSE;
    `rescaled_hybrid` scales it by T / 1000. `kl` is that term alone; `rescaled_kl`, T times it, estimates the bound."""
    zero_terminal_snr: bool = False
    """Whether to rescale the schedule so that no signal is left at the last step (Lin et al. 2024)."""
    betas: list[float] = field(default_factory=list)
    """The betas of schedule `given`, one per step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 2:
            raise ValueError(f"process.steps: must be at least 2, got {self.steps}")
        if self.schedule == "linear" and self.steps <= 20:  # the last beta, 20 / steps, would reach 1
            raise ValueError(f"process.steps: must be above 20 with the linear schedule, got {self.steps}")
        if self.schedule == "scaled_linear" and self.steps <= 12:
            raise ValueError(f"process.steps: must be above 12 with the scaled_linear schedule, got {self.steps}")
        if len(self.betas) != (self.steps if self.schedule == "given" else 0):
            raise ValueError(
                f"process.betas: must have process.steps={self.steps} values with schedule given and none with any "
                f"other, got {len(self.betas)} with schedule {self.schedule}"
            )
        if self.zero_terminal_snr and "eps" in (self.prediction, self.loss_space):
            key = "prediction" if self.prediction == "eps" else "loss_space"
            raise ValueError(
                f"process.{key}: eps says nothing about the image where no signal is left;"
                " with process.zero_terminal_snr=true choose v or x0"
            )
        learned, hybrid = self.variance == "learned_range", self.loss.endswith("hybrid")
        if learned and self.loss == "mse":
            raise ValueError("process.loss: mse would leave a learned variance untrained; choose hybrid")
        if hybrid and not learned:
            raise ValueError(f"process.loss: {self.loss} trains a learned variance; set process.variance=learned_range")
        if self.variance == "fixed_small" and not self.loss.endswith("kl"):
            raise ValueError(
                f"process.variance: fixed_small is for process.loss=kl, not {self.loss}; the sampler's variance is"
                " sample.variance"
            )
        if self.loss.endswith("kl") and (self.loss_space is not None or self.weighting != "none"):
            raise ValueError(
                f"process.loss: {self.loss} weights the noise levels itself; leave process.loss_space at null and"
                " process.weighting at none, or choose mse or a hybrid"
            )


class DiscreteVP(Process):
    """The process that a `VPConfig` describes."""

    name = "vp"

    def __init__(self, config: VPConfig | None = None) -> None:
        config = config or VPConfig()
        self.config, self.learn_sigma = config, config.variance == "learned_range"
        given = config.schedule == "given"
        betas = torch.tensor(config.betas, dtype=torch.float64) if given else SCHEDULES[config.schedule](config.steps)
        self.tables = Tables.from_betas(zero_terminal_snr(betas) if config.zero_terminal_snr else betas)
        bar = self.tables.alphas_cumprod
        self._log_snr = (bar / (1 - bar)).log().clamp(min=NO_SIGNAL)
        self._on: dict[torch.device, tuple[Tensor, Tables]] = {torch.device("cpu"): (self._log_snr, self.tables)}

    def noising_key(self) -> tuple[Any, ...]:
        """Return the name and the betas; neither the prediction nor the loss changes the noise."""
        return self.name, tuple(self.tables.betas.tolist())

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2) at times t (B,), float64, interpolated linearly between steps."""
        table = self._cached(t.device)[0]
        if not t.is_floating_point():
            return table[t]
        low = t.floor().long().clamp(0, len(table) - 2)
        return torch.lerp(table[low], table[low + 1], t.double() - low)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """Return the (fractional) times, float64, with these log-SNRs; inverse of `log_snr`.

        Raises:
            ValueError: if the process never reaches one of them.
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

    def training_time_at(self, log_snr: Tensor) -> Tensor:
        """Return the steps (B,) int64 nearest to these log-SNRs."""
        return self.time_at(log_snr.clamp(float(self._log_snr[-1]), float(self._log_snr[0]))).round().long()

    def uniform_time(self, u: Tensor) -> Tensor:
        """Map u (B,), uniform in (0, 1), to uniformly distributed steps (B,) int64."""
        return (u * self.config.steps).long().clamp(max=self.config.steps - 1)

    def path(self, t: Tensor) -> Point:
        """Return alpha and sigma with their derivatives in the angle arccos(alpha), which make the velocity equal v."""
        log_snr = self.log_snr(t)
        alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        return Point(t, torch.atan2(sigma, alpha), alpha, sigma, alpha_rate=-sigma, sigma_rate=alpha)

    def convert(self, out: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Convert a network's output (B, C or 2C, H, W) at x_t and times t (B,) to image, noise and variance."""
        out, variance = self._split(out, x_t)
        return super().convert(out, x_t, t)._replace(variance=variance)

    def losses(self, out: Tensor, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return each sample's loss (B,), given the network's output at add_noise(x0, t, eps).

        The MSE is the simple loss of Ho et al. 2020, Eq. 14, the hybrid that of Nichol & Dhariwal 2021, Eq. 16.
        """
        if self.config.loss.endswith("kl"):
            scale = self.config.steps if self.config.loss == "rescaled_kl" else 1.0
            return self._bound(out, x0, t, eps) * scale
        mean, share = self._split(out, x0)
        loss = super().losses(mean, x0, t, eps)
        if share is None:
            return loss
        variance_only = torch.cat([mean.detach(), out[:, mean.shape[1] :]], dim=1)
        scale = self.config.steps / 1000 if self.config.loss == "rescaled_hybrid" else 1.0
        return loss + self._bound(variance_only, x0, t, eps) * scale

    def respaced(self, steps: int | str) -> Tables:
        """Return the tables of a sampler with this many steps, see `space_timesteps`.

        Raises:
            ValueError: if the noisiest step kept still shows the image, so that pure noise is no valid start.
        """
        tables, total = self.tables.respaced(steps), self.config.steps
        if (first := int(tables.time[-1])) < 0.75 * (total - 1):
            raise ValueError(
                f"sampling would begin at step {first} of {total - 1}, where the image still shows through the noise;"
                " take at least 2 steps, in the last section too, or at least ddim4"
            )
        return tables

    def grid(self, steps: int | str) -> Grid:
        """Return the respaced steps from last to first, then the image; s is the angle arccos(alpha)."""
        tables = self.respaced(steps)
        bar = torch.cat([tables.alphas_cumprod.flip(0), torch.ones(1, dtype=torch.float64)])
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        time = torch.cat([tables.time.flip(0), tables.time[:1]])
        return Grid(Point(time, torch.atan2(sigma, alpha), alpha, sigma, alpha_rate=-sigma, sigma_rate=alpha))

    def _bound(self, out: Tensor, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        tables = self._cached(t.device)[1]
        x_t = self.add_noise(x0, t, eps)
        prediction = self.convert(out, x_t, t)
        if self.config.variance == "learned_range":
            log_variance = tables.learned_log_variance(t, prediction.variance)
        else:
            log_variance = at(tables.log_variances(self.config.variance), t, x_t)
        return bound_term(tables, t, x0, x_t, prediction, log_variance)

    def _split(self, out: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
        learned = self.learn_sigma
        if out.shape[1] != like.shape[1] * (1 + learned):
            raise ValueError(
                f"process.variance={self.config.variance} needs a network of {like.shape[1] * (1 + learned)} output "
                f"channels for {like.shape[1]} image channels, got {out.shape[1]}"
            )
        if not learned:
            return out, None
        # Tables are looked up in this dtype; in bfloat16 the two bounds of the log-variance would mostly coincide.
        mean, variance = out.to(like.dtype).chunk(2, dim=1)
        return mean, (variance + 1) / 2

    def _cached(self, device: torch.device) -> tuple[Tensor, Tables]:
        if device not in self._on:
            self._on[device] = (self._log_snr.to(device), self.tables.to(device))
        return self._on[device]
