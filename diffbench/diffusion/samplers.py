"""Samplers as free functions, and the samplers that suit each process. Randomness comes only from `noise(step)`.

Every sampler takes
    predict: (x_t (B, C, H, W), t (B,) times of the process) -> Prediction; guidance.py has wrappers for it.
    x: (B, C, H, W) the starting point: standard normal noise, or `grid.start` of it.
    tables, grid or path: the noise levels to visit, from pure noise to the image.
    noise: step k = 0, 1, ... in order of execution -> standard normal noise like x; called only when it is used.
    clip: whether the predicted image is clamped to [-1, 1].
    callback: called after each step with (k, x, predicted x0).
and returns the sample, (B, C, H, W).
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from diffbench.diffusion.process import Grid, Point, Predict, Prediction, per_sample
from diffbench.diffusion.schedules import Tables, Variance

Noise = Callable[[int], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]


class StepLimitError(RuntimeError):
    """Raised when an adaptive sampler does not reach the end within its step limit."""


def ddpm(
    predict: Predict,
    x: Tensor,
    tables: Tables,
    noise: Noise,
    *,
    variance: Variance = "fixed_large",
    clip: bool = True,
    callback: Callback | None = None,
) -> Tensor:
    """Sample by ancestral sampling through the steps of a discrete process (Ho et al. 2020, Algorithm 2).

    Args:
        variance: variance of a step: the posterior's (small), beta (large), or one between the two that the network
            predicts (Nichol & Dhariwal 2021).

    Raises:
        ValueError: if the variance is "learned_range" and the network predicts none.
    """
    fixed = tables.log_variances(variance)
    for k, i in enumerate(reversed(range(len(tables)))):
        prediction = _predict_step(predict, x, tables, i, clip)
        x = tables.posterior_mean(i, prediction.x0, x)
        if i:
            if variance == "learned_range":
                std = (0.5 * tables.learned_log_variance(i, prediction.variance)).exp()
            else:
                std = (0.5 * fixed[i]).exp().to(x.dtype)
            x = x + std * noise(k)
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
    """Sample by DDIM (Song et al. 2021, Eq. 12 and 16): deterministic for eta 0, as noisy as fixed_small DDPM for 1."""
    for k, i in enumerate(reversed(range(len(tables)))):
        prediction = _predict_step(predict, x, tables, i, clip)
        bar, previous = tables.alphas_cumprod[i], tables.alphas_cumprod_prev[i]
        eps = _noise_in(x, prediction.x0, bar) if clip else prediction.eps
        sigma = eta * ((1 - previous) / (1 - bar) * (1 - bar / previous)).sqrt()
        x = previous.sqrt().to(x.dtype) * prediction.x0
        x = x + (1 - previous - sigma**2).clamp(min=0).sqrt().to(x.dtype) * eps
        if i and eta:
            x = x + sigma.to(x.dtype) * noise(k)
        if callback:
            callback(k, x, prediction.x0)
    return x


def euler(
    predict: Predict, x: Tensor, grid: Grid, noise: Noise, *, clip: bool = False, callback: Callback | None = None
) -> Tensor:
    """Sample by Euler's method, order 1; on a linear flow and on EDM's levels its steps are those of DDIM."""
    for k in range(len(grid)):
        here, there = grid[k], grid[k + 1]
        prediction = _predict_at(predict, x, here, clip)
        x = x + _size(here, there, x) * here.rate(prediction)
        if callback:
            callback(k, x, prediction.x0)
    return x


def heun(
    predict: Predict,
    x: Tensor,
    grid: Grid,
    noise: Noise,
    *,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    clip: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Sample by Heun's method, order 2 (Karras et al. 2022, Algorithms 1 and 2); the step to an open end is Euler's.

    Args:
        s_churn: amount of noise to add and remove again, spread over all steps; a step raises sigma by at most a
            factor of sqrt(2).
        s_min: smallest sigma at which noise is added.
        s_max: largest sigma at which noise is added.
        s_noise: standard deviation of the noise added.

    Raises:
        ValueError: if s_churn is set for a process that scales the image.
    """
    if s_churn and bool((grid.points.alpha != 1).any()):
        raise ValueError("s_churn needs the edm process, which adds noise to an image of constant scale")
    factor = 1 + min(s_churn / len(grid), math.sqrt(2) - 1)
    for k in range(len(grid)):
        here, there = grid[k], grid[k + 1]
        if s_churn and s_min <= here.sigma <= s_max:
            level = here.sigma * factor
            x = x + (level**2 - here.sigma**2).sqrt().to(x.dtype) * s_noise * noise(k)
            here = here._replace(time=level, s=level, sigma=level)
        prediction = _predict_at(predict, x, here, clip)
        rate, size = here.rate(prediction), _size(here, there, x)
        ahead = x + size * rate
        if k + 1 < len(grid) or not grid.open_end:
            rate = 0.5 * (rate + there.rate(_predict_at(predict, ahead, there, clip)))
            ahead = x + size * rate
        x = ahead
        if callback:
            callback(k, x, prediction.x0)
    return x


def dpm_solver(
    predict: Predict, x: Tensor, grid: Grid, noise: Noise, *, clip: bool = False, callback: Callback | None = None
) -> Tensor:
    """Sample by DPM-Solver++(2M), order 2 with one network call per step (Lu et al. 2022b, Algorithm 2).

    It is a multistep method in log(alpha / sigma). The first step, and a step to zero noise, are DDIM's, of order 1.
    """
    half_log_snr = (grid.points.alpha.log() - grid.points.sigma.log()).tolist()
    previous = None
    for k in range(len(grid)):
        here, there = grid[k], grid[k + 1]
        prediction = _predict_at(predict, x, here, clip)
        x0 = prediction.x0
        if previous is not None and there.sigma > 0:
            h, h_previous = half_log_snr[k + 1] - half_log_snr[k], half_log_snr[k] - half_log_snr[k - 1]
            x0 = x0 + (0.5 * h / h_previous) * (x0 - previous)
        shrink = there.sigma / here.sigma
        x = shrink.to(x.dtype) * x + (there.alpha - here.alpha * shrink).to(x.dtype) * x0
        previous = prediction.x0
        if callback:
            callback(k, x, prediction.x0)
    return x


def euler_maruyama(
    predict: Predict,
    x: Tensor,
    grid: Grid,
    noise: Noise,
    *,
    diffusion: Literal["sigma", "constant"] = "sigma",
    strength: float = 1.0,
    last: Literal["mean", "tweedie", "euler"] = "mean",
    clip: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Sample the reverse SDE of a flow, dx = (velocity + D score) dt + sqrt(2 D) dW (Ma et al. 2024, §2, w = 2 D).

    In the limit of small steps every D gives the same distribution; steps larger than about 2 sigma^2 / D amplify the
    noise. The last step adds no noise.

    Args:
        diffusion: whether D is strength times sigma, or strength alone ("constant").
        strength: 0 is the ODE.
        last: the last step, of size h, follows the SDE's drift ("mean", which leaves noise of h D / sigma), jumps to
            the predicted image ("tweedie"), or follows the velocity alone ("euler").
    """
    for k in range(len(grid)):
        here, there = grid[k], grid[k + 1]
        prediction = _predict_at(predict, x, here, clip)
        drift, size = here.rate(prediction), _size(here, there, x)
        amount = strength * (here.sigma if diffusion == "sigma" else here.sigma.new_ones(()))
        final = k + 1 == len(grid)
        if not final or last == "mean":
            # The score is -eps / sigma.
            drift = drift - (amount / here.sigma).to(x.dtype) * prediction.eps
        x = prediction.x0 if final and last == "tweedie" else x + size * drift
        if not final and strength:
            x = x + (2 * amount * (there.s - here.s)).sqrt().to(x.dtype) * noise(k)
        if callback:
            callback(k, x, prediction.x0)
    return x


# Dormand & Prince 1980: each stage's time, its weights of the earlier rates, and the weights of order 5 minus those of
# order 4. The last stage is the first of the next step.
_TIMES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def dopri5(
    predict: Predict,
    x: Tensor,
    path: Callable[[Tensor], Point],
    noise: Noise,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    limit: int = 1000,
    callback: Callback | None = None,
) -> Tensor:
    """Sample the probability-flow ODE by the adaptive Dormand-Prince method of order 5.

    Each sample has its own step sizes, so that no image depends on its neighbours in the batch.

    Args:
        path: s (B,) in 0 to 1 -> the point at s, such as `Flow.path`.
        noise: never called.
        rtol: error allowed per step, root mean square over a sample, relative to its values.
        atol: the same, absolute.
        limit: maximum number of steps, including rejected ones.

    Raises:
        StepLimitError: if the end is not reached within `limit` steps.
    """
    s = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    step = torch.full_like(s, 0.05)
    first, _ = _rate(predict, x, path(s))
    for k in range(limit):
        h = torch.minimum(step, 1 - s)
        rates, ahead, x0 = [first], x, x
        for time, weights in zip(_TIMES[1:], _STAGES[1:], strict=True):
            ahead = x + per_sample(h, x) * _combine(weights, rates)
            rate, x0 = _rate(predict, ahead, path(s + time * h))
            rates.append(rate)
        error = per_sample(h, x) * _combine(_ERROR, rates) / (atol + rtol * torch.maximum(x.abs(), ahead.abs()))
        size = error.double().square().flatten(1).mean(1).sqrt()
        accepted = size <= 1
        mask = accepted.reshape(-1, *[1] * (x.ndim - 1))
        x, first = torch.where(mask, ahead, x), torch.where(mask, rates[-1], first)
        s = torch.where(accepted, torch.where(h == 1 - s, 1.0, s + h), s)
        step = h * (0.9 * size**-0.2).clamp(0.2, 10)
        x = torch.where(size.isnan().reshape(mask.shape), torch.nan, x)  # no further step could be accepted
        if callback:
            callback(k, x, x0)
        if bool((s == 1).all() | size.isnan().any()):
            return x
    raise StepLimitError(f"dopri5 reached {s.min():.3f} of 1 in {limit} steps; loosen rtol={rtol}")


def _rate(predict: Predict, x: Tensor, point: Point) -> tuple[Tensor, Tensor]:
    prediction = predict(x, point.time)
    rate = per_sample(point.alpha_rate, x) * prediction.x0 + per_sample(point.sigma_rate, x) * prediction.eps
    return rate, prediction.x0


def _combine(weights: tuple[float, ...], rates: list[Tensor]) -> Tensor:
    total = torch.zeros_like(rates[0])
    for weight, rate in zip(weights, rates, strict=True):
        if weight:
            total = total.add(rate, alpha=weight)
    return total


def _predict_step(predict: Predict, x: Tensor, tables: Tables, i: int, clip: bool) -> Prediction:
    """Return the prediction at step i of the tables, its image clamped if `clip`."""
    prediction = predict(x, tables.time[i].expand(len(x)))
    return prediction._replace(x0=prediction.x0.clamp(-1, 1)) if clip else prediction


def _noise_in(x: Tensor, x0: Tensor, bar: Tensor) -> Tensor:
    """Return the noise in x if its image is x0."""
    if bar == 0:  # zero terminal SNR: x is all noise
        return x
    return (bar.rsqrt().to(x.dtype) * x - x0) / (1 / bar - 1).sqrt().to(x.dtype)


def _predict_at(predict: Predict, x: Tensor, point: Point, clip: bool) -> Prediction:
    """Return the prediction at a point of a grid; if `clip`, clamp the image and recompute the noise from it."""
    prediction = predict(x, point.time.expand(len(x)))
    if not clip or point.sigma == 0:
        return prediction
    x0 = prediction.x0.clamp(-1, 1)
    eps = (x - point.alpha.to(x.dtype) * x0) / point.sigma.to(x.dtype)
    return prediction._replace(x0=x0, eps=eps)


def _size(here: Point, there: Point, like: Tensor) -> Tensor:
    """Return the step in s as a 0-d CPU tensor in the sample's dtype, which needs no synchronisation and no copy."""
    return (there.s - here.s).to(like.dtype)


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (ddpm, ddim, euler, heun, dpm_solver, euler_maruyama, dopri5)
}

PAIRS = {
    "vp": ("ddpm", "ddim", "euler", "heun", "dpm_solver"),
    "edm": ("heun", "euler", "dpm_solver"),
    "flow": ("euler", "heun", "dopri5", "euler_maruyama"),
}
"""Process -> the samplers that suit it, the default first."""

_REASONS = {
    "ddpm": "it goes back through the discrete steps of vp",
    "ddim": "it goes back through the discrete steps of vp, as euler does in continuous time",
    "dpm_solver": "its steps in log-SNR are infinite at the ends of a flow",
    "dopri5": "it needs the rate at the path's very end, which only a flow has",
    "euler_maruyama": "it solves the SDE of a flow",
}


def check_pair(process: str, sampler: str) -> None:
    """Check that a sampler suits a process.

    Raises:
        ValueError: if it does not, with the reason and the samplers that do; or if either name is unknown.
    """
    if process not in PAIRS:
        raise ValueError(f"no process {process!r}; choose from {', '.join(PAIRS)}")
    if sampler in PAIRS[process]:
        return
    reason = f"does not suit the {process} process: {_REASONS[sampler]}" if sampler in SAMPLERS else "is unknown"
    raise ValueError(f"sampler {sampler} {reason}; choose from {', '.join(PAIRS[process])}")
