"""Noise schedules of the discrete variance-preserving process as float64 tables, and their respacing."""

import itertools
import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor


def linear_betas(steps: int) -> Tensor:
    """Return betas that rise linearly from 1e-4 to 0.02 at 1,000 steps (Ho et al. 2020), scaled by 1000 / steps."""
    scale = 1000 / steps
    return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)


def cosine_betas(steps: int, max_beta: float = 0.999) -> Tensor:
    """Return betas with alphas_cumprod = cos^2((t + 0.008) / 1.008 pi / 2) (Nichol & Dhariwal 2021, Eq. 17)."""

    def signal(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    ratios = [signal((i + 1) / steps) / signal(i / steps) for i in range(steps)]
    return torch.tensor([min(1 - r, max_beta) for r in ratios], dtype=torch.float64)


def scaled_linear_betas(steps: int) -> Tensor:
    """Return betas linear in sqrt(beta), 8.5e-4 to 0.012 at 1,000 steps (latent diffusion, Rombach et al. 2022)."""
    scale = 1000 / steps
    return torch.linspace((scale * 8.5e-4) ** 0.5, (scale * 0.012) ** 0.5, steps, dtype=torch.float64).square()


Variance = Literal["fixed_small", "fixed_large", "learned_range"]
"""Variance of a reverse step: the posterior's, beta, or one between the two that the network predicts."""

SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas, "scaled_linear": scaled_linear_betas}


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Rescale betas (T,) so that no signal is left at the last step (Lin et al. 2024, Algorithm 1).

    sqrt(alphas_cumprod) is shifted to end at 0 and scaled to keep its first value.
    """
    root = (1 - betas.double()).cumprod(0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    bar = root.square()
    return torch.cat([1 - bar[:1], 1 - bar[1:] / bar[:-1]])


@dataclass(frozen=True)
class Tables:
    """Per-step constants of a discrete VP process, each (T,) float64; step 0 is the least noisy.

    `time[i]` is the time that the network sees at step i, a step of the process before respacing.
    """

    time: Tensor
    betas: Tensor
    log_betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor

    @staticmethod
    def from_betas(betas: Tensor, time: Tensor | None = None) -> "Tables":
        """Make the tables of betas (T,) in (0, 1] (Ho et al. 2020, Eq. 4 and 7).

        Raises:
            ValueError: if a beta lies outside (0, 1].
        """
        betas = betas.double()
        if not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError(f"betas must lie in (0, 1], got {betas.min():.3g} to {betas.max():.3g}")
        alphas = 1 - betas
        bar = alphas.cumprod(0)
        prev = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
        variance = betas * (1 - prev) / (1 - bar)
        # The first posterior variance is zero, so its log is taken from the second step instead.
        clipped = torch.cat([variance[1:2], variance[1:]]) if len(betas) > 1 else betas
        return Tables(
            time=torch.arange(len(betas)) if time is None else time,
            betas=betas,
            log_betas=betas.log(),
            alphas_cumprod=bar,
            alphas_cumprod_prev=prev,
            posterior_variance=variance,
            posterior_log_variance_clipped=clipped.log(),
            posterior_mean_coef1=betas * prev.sqrt() / (1 - bar),
            posterior_mean_coef2=(1 - prev) * alphas.sqrt() / (1 - bar),
        )

    def __len__(self) -> int:
        return len(self.betas)

    def to(self, device: torch.device | str) -> "Tables":
        """Copy the tables to a device."""
        return Tables(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def respaced(self, steps: str | int) -> "Tables":
        """Return the shorter process over the steps that `space_timesteps` keeps (Nichol & Dhariwal 2021, §4)."""
        kept = space_timesteps(len(self), steps)
        bar = self.alphas_cumprod[kept]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
        return Tables.from_betas(1 - bar / previous, self.time[kept])

    def posterior_mean(self, i: int | Tensor, x0: Tensor, x_t: Tensor) -> Tensor:
        """Return the mean of q(x_{t-1} | x_t, x_0) at step i, an int or (B,) (Ho et al. 2020, Eq. 7)."""
        return at(self.posterior_mean_coef1, i, x_t) * x0 + at(self.posterior_mean_coef2, i, x_t) * x_t

    def log_variances(self, variance: Variance) -> Tensor:
        """Return (T,) log-variances of the reverse steps: the posterior's for "fixed_small", the betas otherwise."""
        small = self.posterior_log_variance_clipped
        if variance == "fixed_small" or len(self) == 1:
            return small
        return torch.cat([small[:1], self.log_betas[1:]])

    def learned_log_variance(self, i: int | Tensor, share: Tensor | None) -> Tensor:
        """Return the log-variance (B, C, H, W) of step i between its bounds (Nichol & Dhariwal 2021, Eq. 15).

        Args:
            i: the step, an int or (B,).
            share: `Prediction.variance`.

        Raises:
            ValueError: if the network predicts no variance.
        """
        if share is None:
            raise ValueError("variance=learned_range needs a network that was trained to predict its variance")
        small, large = at(self.posterior_log_variance_clipped, i, share), at(self.log_betas, i, share)
        return share * large + (1 - share) * small


def at(table: Tensor, t: int | Tensor, like: Tensor) -> Tensor:
    """Look up a float64 table, in the dtype of `like` (B, ...): a scalar for one step, (B, 1, ...) for steps t (B,).

    The scalar stays on the table's device: a 0-d CPU tensor multiplies a GPU tensor without a copy.
    """
    if isinstance(t, int):
        return table[t].to(like.dtype)
    return table[t].to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def space_timesteps(total: int, sections: str | int) -> Tensor:
    """Choose the steps that a respaced process keeps of `total` steps.

    Args:
        total: T.
        sections: `"250"` for 250 evenly spaced steps, `"10,15,20"` for 10, 15 and 20 steps in three equal sections,
            `"ddim25"` for 25 steps with a constant integer stride from step 0 (Song et al. 2021).

    Returns:
        Ascending int64 steps.

    Raises:
        ValueError: if `sections` is malformed or asks for more steps than there are.
    """
    text = str(sections).strip()
    if text.startswith("ddim"):
        wanted = _count(text.removeprefix("ddim"), text)
        for stride in range(1, total + 1):
            if len(range(0, total, stride)) == wanted:
                return torch.arange(0, total, stride)
        raise ValueError(f"no integer stride gives exactly {wanted} of {total} steps: choose another number")
    counts = [_count(part, text) for part in text.split(",")]
    size, extra = divmod(total, len(counts))
    kept: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        length = size + (i < extra)
        if count > length:
            raise ValueError(f"cannot keep {count} of {length} steps ({text!r} of {total})")
        step = (length - 1) / (count - 1) if count > 1 else 1.0
        # Strides are summed, not multiplied, so that half-way points round as in the published code.
        kept += [start + round(position) for position in itertools.accumulate([0.0] + [step] * (count - 1))]
        start += length
    return torch.tensor(sorted(set(kept)))


def _count(part: str, text: str) -> int:
    if not part.strip().isdigit() or int(part) < 1:
        raise ValueError(f"steps must be like 250, ddim25 or 10,15,20, got {text!r}")
    return int(part)
