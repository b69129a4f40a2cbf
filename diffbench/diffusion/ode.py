"""Samplers that serve every process: solvers of the probability-flow ODE, and of the reverse SDE of a flow.

Each takes
    predict: (x_t (B, C, H, W), t (B,) times of the process) -> Prediction; see guidance.py for ways to wrap it.
    x: (B, C, H, W) the state at the grid's first point, `grid.start` of standard normal noise.
    grid: the points that are visited, from `process.grid`.
    noise: step number k = 0, 1, ... in order of execution -> standard normal like x; asked only where it is used.
    clip: whether the predicted image is clamped to [-1, 1], and the noise with it.
    callback: called after each step with (k, x, predicted x0).
and returns the sample, (B, C, H, W).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from diffbench.diffusion.process import Grid, Point, Predict, Prediction

Noise = Callable[[int], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]


def euler(
    predict: Predict,
    x: Tensor,
    grid: Grid,
    noise: Noise,
    *,
    clip: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method, order 1; on a linear flow and on EDM's levels it takes the steps of DDIM."""
    for k in range(len(grid)):
        here, there = grid[k], grid[k + 1]
        prediction = _ask(predict, x, here, clip)
        x = x + _size(here, there, x) * here.rate(prediction)
        if callback:
            callback(k, x, prediction.x0)
    return x


@dataclass(frozen=True)
class Churn:
    """Noise added before each step and taken away by it (Karras et al. 2022, Algorithm 2)."""

    amount: float
    """S_churn, spread over the steps; a step at most multiplies sigma by sqrt 2."""
    low: float = 0.0
    """S_min: the least sigma at which noise is added."""
    high: float = math.inf
    """S_max: the largest sigma at which noise is added."""
    scale: float = 1.0
    """S_noise: standard deviation of the noise added."""

    def raised(self, sigma: float, steps: int) -> float:
        """The level to which the noise of a step from sigma is raised."""
        inside = self.low <= sigma <= self.high
        return sigma * (1 + min(self.amount / steps, math.sqrt(2) - 1)) if inside else sigma


def heun(
    predict: Predict,
    x: Tensor,
    grid: Grid,
    noise: Noise,
    *,
    churn: Churn | None = None,
    clip: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method, order 2 (Karras et al. 2022, Algorithms 1 and 2); Euler's where the network cannot be asked.

    Raises:
        ValueError: if noise shall be churned in a process that scales the image.
    """
    if churn and bool((grid.points.alpha != 1).any()):
        raise ValueError("churn belongs to the edm process, whose noise is added to an image of constant scale")
    for k in range(len(grid)):
        here, there = grid[k], grid[k + 1]
        if churn:
            level = here.sigma.new_tensor(churn.raised(float(here.sigma), len(grid)))
            if level > here.sigma:
                x = x + (level**2 - here.sigma**2).sqrt().to(x.dtype) * churn.scale * noise(k)
                here = here._replace(time=level, s=level, sigma=level)
        prediction = _ask(predict, x, here, clip)
        rate, size = here.rate(prediction), _size(here, there, x)
        ahead = x + size * rate
        if k + 1 < len(grid) or not grid.open_end:
            rate = 0.5 * (rate + there.rate(_ask(predict, ahead, there, clip)))
            ahead = x + size * rate
        x = ahead
        if callback:
            callback(k, x, prediction.x0)
    return x


def dpm_solver(
    predict: Predict,
    x: Tensor,
    grid: Grid,
    noise: Noise,
    *,
    clip: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M), order 2 with one network call a step (Lu et al. 2022b, Algorithm 2).

    Multistep in log(alpha / sigma); the first step and one to where no noise is left are of order 1, those of DDIM.
    """
    half_log_snr = (grid.points.alpha.log() - grid.points.sigma.log()).tolist()
    before = None
    for k in range(len(grid)):
        here, there = grid[k], grid[k + 1]
        prediction = _ask(predict, x, here, clip)
        x0 = prediction.x0
        if before is not None and there.sigma > 0:
            h, h_before = half_log_snr[k + 1] - half_log_snr[k], half_log_snr[k] - half_log_snr[k - 1]
            x0 = x0 + (0.5 * h / h_before) * (x0 - before)
        shrink = there.sigma / here.sigma
        x = shrink.to(x.dtype) * x + (there.alpha - here.alpha * shrink).to(x.dtype) * x0
        before = prediction.x0
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
    """The reverse SDE of a flow, dx = (velocity + D score) dt + sqrt(2 D) dW (Ma et al. 2024, §2, with w = 2 D).

    Every D leads to the same distributions. The last step adds no noise.

    Args:
        diffusion: D = strength times sigma, or times 1.
        strength: 0 is the ODE.
        last: the last step follows the SDE's drift ("mean"), jumps to the predicted image ("tweedie"), or follows the
            velocity alone ("euler").
    """
    for k in range(len(grid)):
        here, there = grid[k], grid[k + 1]
        prediction = _ask(predict, x, here, clip)
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


def _ask(predict: Predict, x: Tensor, point: Point, clip: bool) -> Prediction:
    prediction = predict(x, point.time.expand(len(x)))
    if not clip or point.sigma == 0:
        return prediction
    x0 = prediction.x0.clamp(-1, 1)
    eps = (x - point.alpha.to(x.dtype) * x0) / point.sigma.to(x.dtype)
    return prediction._replace(x0=x0, eps=eps)


def _size(here: Point, there: Point, like: Tensor) -> Tensor:
    """The step in s, as a 0-d tensor in the sample's dtype: no synchronisation, no copy."""
    return (there.s - here.s).to(like.dtype)
