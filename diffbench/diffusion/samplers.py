"""Samplers as free functions: `predict` says what a noisy image holds, `noise(step)` is the only randomness.

Each takes
    predict: (x_t (B, C, H, W), t (B,) times of the network) -> Prediction; see guidance.py for ways to wrap it.
    x: (B, C, H, W) starting noise, standard normal.
    tables: the (respaced) process, its steps walked from the last to the first.
    noise: step number k = 0, 1, ... in order of execution -> standard normal like x; asked only where it is used.
    clip: whether the predicted image is clamped to [-1, 1].
    callback: called after each step with (k, x, predicted x0).
and returns the sample, (B, C, H, W).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from diffbench.diffusion.process import Prediction
from diffbench.diffusion.schedules import Tables

Predict = Callable[[Tensor, Tensor], Prediction]
Noise = Callable[[int], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]


def ddpm(
    predict: Predict,
    x: Tensor,
    tables: Tables,
    noise: Noise,
    *,
    variance: Literal["fixed_small", "fixed_large"] = "fixed_large",
    clip: bool = True,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, Algorithm 2) with the posterior variance (small) or beta (large)."""
    log_variance = log_variances(tables, variance)
    for k, i in enumerate(reversed(range(len(tables)))):
        prediction = _predict(predict, x, tables, i, clip)
        x = posterior_mean(tables, i, prediction.x0, x)
        if i:
            x = x + _constant((0.5 * log_variance[i]).exp(), x) * noise(k)
        if callback:
            callback(k, x, prediction.x0)
    return x


def ddim(
    predict: Predict,
    x: Tensor,
    tables: Tables,
    noise: Noise,
    *,
    eta: float = 0.0,
    clip: bool = True,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, Eq. 12 and 16): deterministic with eta 0, as noisy as DDPM's small variance with 1."""
    for k, i in enumerate(reversed(range(len(tables)))):
        prediction = _predict(predict, x, tables, i, clip)
        bar, previous = tables.alphas_cumprod[i], tables.alphas_cumprod_prev[i]
        eps = _noise_in(x, prediction.x0, bar) if clip else prediction.eps
        sigma = eta * ((1 - previous) / (1 - bar) * (1 - bar / previous)).sqrt()
        x = _constant(previous.sqrt(), x) * prediction.x0
        x = x + _constant((1 - previous - sigma**2).clamp(min=0).sqrt(), x) * eps
        if i and eta:
            x = x + _constant(sigma, x) * noise(k)
        if callback:
            callback(k, x, prediction.x0)
    return x


def posterior_mean(tables: Tables, i: int, x0: Tensor, x_t: Tensor) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x_0) at step i (Ho et al. 2020, Eq. 7)."""
    return _constant(tables.posterior_mean_coef1[i], x_t) * x0 + _constant(tables.posterior_mean_coef2[i], x_t) * x_t


def log_variances(tables: Tables, variance: str) -> Tensor:
    """(T,) log-variances of the reverse steps: the posterior's ("fixed_small") or the betas ("fixed_large")."""
    small = tables.posterior_log_variance_clipped
    if variance == "fixed_small" or len(tables) == 1:
        return small
    return torch.cat([small[:1], tables.betas[1:].log()])


def _predict(predict: Predict, x: Tensor, tables: Tables, i: int, clip: bool) -> Prediction:
    prediction = predict(x, tables.time[i].expand(len(x)))
    return prediction._replace(x0=prediction.x0.clamp(-1, 1)) if clip else prediction


def _noise_in(x: Tensor, x0: Tensor, bar: Tensor) -> Tensor:
    return (_constant(bar.rsqrt(), x) * x - x0) / _constant((1 / bar - 1).sqrt(), x)


def _constant(value: Tensor, like: Tensor) -> Tensor:
    """A float64 table entry as a 0-d tensor in the sample's dtype, without a synchronisation."""
    return value.to(like.dtype)
