"""An ODE sampler that chooses its steps by itself, sample by sample: no image depends on its neighbours in a batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffbench.diffusion.ode import Callback, Noise
from diffbench.diffusion.process import Point, Predict, per_sample

# Dormand & Prince 1980: the stages' times, the weights of the rates before each, and the difference of the weights of
# order 5 from those of order 4. The last stage is the next step's first.
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
    """The probability-flow ODE by the method of Dormand and Prince, order 5, with steps that keep a tolerance.

    Args:
        predict: (x_t (B, C, H, W), t (B,) times of the process) -> Prediction.
        x: (B, C, H, W) standard normal noise.
        path: s (B,) in 0 to 1 -> the point there, `Flow.path`.
        noise: never asked; taken as every sampler takes it.
        rtol: error allowed in a step, root mean square over a sample, relative to its values.
        atol: the same, absolute.
        limit: steps at most, refused ones included.
        callback: called after each step with (k, x, predicted x0 at the step's end).

    Raises:
        RuntimeError: where the end is not reached within `limit` steps.
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
        good = size <= 1
        kept = good.reshape(-1, *[1] * (x.ndim - 1))
        x, first = torch.where(kept, ahead, x), torch.where(kept, rates[-1], first)
        s = torch.where(good, torch.where(h == 1 - s, 1.0, s + h), s)
        step = h * (0.9 * size**-0.2).clamp(0.2, 10)
        if callback:
            callback(k, x, x0)
        if bool((s == 1).all()):
            return x
    raise RuntimeError(f"dopri5 reached {s.min():.3f} of 1 in {limit} steps; loosen rtol={rtol}, or raise the limit")


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
