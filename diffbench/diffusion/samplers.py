"""Samplers of the discrete VP process as free functions: `predict` says what a noisy image holds, `noise(step)` is the
only randomness. ode.py holds those that serve every process.

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

from torch import Tensor

from diffbench.diffusion.process import Predict as Predict
from diffbench.diffusion.process import Prediction
from diffbench.diffusion.reverse import Variance, learned_log_variance, log_variances, posterior_mean
from diffbench.diffusion.schedules import Tables

Noise = Callable[[int], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]


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
    """Ancestral sampling (Ho et al. 2020, Algorithm 2) with the posterior variance (small), beta (large) or a learned
    one between the two (Nichol & Dhariwal 2021).

    Raises:
        ValueError: where the variance shall be learned and the network predicts none.
    """
    fixed = log_variances(tables, variance)
    for k, i in enumerate(reversed(range(len(tables)))):
        prediction = _predict(predict, x, tables, i, clip)
        x = posterior_mean(tables, i, prediction.x0, x)
        if i:
            if variance == "learned_range":
                std = (0.5 * learned_log_variance(tables, i, prediction)).exp()
            else:
                std = _constant((0.5 * fixed[i]).exp(), x)
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


def _predict(predict: Predict, x: Tensor, tables: Tables, i: int, clip: bool) -> Prediction:
    prediction = predict(x, tables.time[i].expand(len(x)))
    return prediction._replace(x0=prediction.x0.clamp(-1, 1)) if clip else prediction


def _noise_in(x: Tensor, x0: Tensor, bar: Tensor) -> Tensor:
    if bar == 0:  # zero terminal SNR: x is all noise
        return x
    return (_constant(bar.rsqrt(), x) * x - x0) / _constant((1 / bar - 1).sqrt(), x)


def _constant(value: Tensor, like: Tensor) -> Tensor:
    """A float64 table entry as a 0-d tensor in the sample's dtype, without a synchronisation."""
    return value.to(like.dtype)
