"""Likelihood: the variational bound of a discrete VP process, and the exact one through the probability-flow ODE."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffbench.diffusion.process import Grid, Point, Predict, mean_square
from diffbench.diffusion.reverse import Variance, bound_term, learned_log_variance, log_variances, prior_term
from diffbench.diffusion.schedules import Tables, at


class Bound(NamedTuple):
    """The variational bound in bits per dimension, its terms from the noisiest step (column 0) to the least noisy."""

    total: Tensor
    """(B,) sum of all terms and the prior."""
    prior: Tensor
    """(B,) divergence of the noisiest step from the standard normal."""
    terms: Tensor
    """(B, T)."""
    x0_error: Tensor
    """(B, T) mean squared error of the predicted image."""
    eps_error: Tensor
    """(B, T) mean squared error of the noise that this image leaves."""


@torch.no_grad()
def variational_bound(
    predict: Predict,
    x0: Tensor,
    tables: Tables,
    noise: Callable[[int], Tensor],
    *,
    variance: Variance = "fixed_large",
    clip: bool = True,
) -> Bound:
    """The bound on -log p(x0), term by term (Ho et al. 2020, Eq. 5; Nichol & Dhariwal 2021, §3).

    Args:
        predict: (x_t, t) -> Prediction.
        x0: (B, C, H, W) images on the 256 levels v / 127.5 - 1.
        tables: the (respaced) process.
        noise: column k of the terms -> standard normal like x0.
        variance: of the reverse steps.
        clip: whether the predicted image is clamped to [-1, 1].
    """
    terms, x0_errors, eps_errors = [], [], []
    fixed = log_variances(tables, variance)
    for k, i in enumerate(reversed(range(len(tables)))):
        eps, bar = noise(k), tables.alphas_cumprod
        alpha, sigma = at(bar.sqrt(), i, x0), at((1 - bar).sqrt(), i, x0)
        x_t = alpha * x0 + sigma * eps
        prediction = predict(x_t, tables.time[i].expand(len(x0)))
        if clip:
            prediction = prediction._replace(x0=prediction.x0.clamp(-1, 1))
        learned = variance == "learned_range"
        log_variance = learned_log_variance(tables, i, prediction) if learned else at(fixed, i, x0)
        terms.append(bound_term(tables, i, x0, x_t, prediction, log_variance))
        x0_errors.append(mean_square(prediction.x0 - x0))
        eps_errors.append(mean_square((x_t - alpha * prediction.x0) / sigma - eps))
    prior, stacked = prior_term(tables, x0), torch.stack(terms, dim=1)
    return Bound(stacked.sum(1) + prior, prior, stacked, torch.stack(x0_errors, dim=1), torch.stack(eps_errors, dim=1))


@torch.no_grad()
def exact_log_likelihood(predict: Predict, x0: Tensor, grid: Grid, probe: Tensor) -> Tensor:
    """log p(x0) in nats, (B,), by the probability-flow ODE from image to noise (Song et al. 2021, §4.3).

    The change of volume along it is the integral of the rate's divergence, estimated without bias by Hutchinson's
    probe^T (d rate / dx) probe (FFJORD, Grathwohl et al. 2019). Heun's method, on the grid's points.

    Args:
        predict: (x_t, t) -> Prediction, differentiable in x_t.
        x0: (B, C, H, W) images; a density is meant, so 8-bit images need their dequantising noise.
        grid: of the process; many steps, as order 2 is all there is.
        probe: like x0, of mean 0 and variance 1, such as random signs; one per image, kept along the path.
    """
    walk = grid.reversed()
    alpha = walk[0].alpha  # the density of x at the first point, taken to the image's scale
    x, log_volume = alpha.to(x0.dtype) * x0, x0[0].numel() * float(alpha.log()) + x0.new_zeros(len(x0))
    rate, divergence = _rate_and_divergence(predict, x, walk[0], probe)
    for k in range(len(walk)):
        there, size = walk[k + 1], (walk.points.s[k + 1] - walk.points.s[k]).to(x.dtype)
        rate_there, divergence_there = _rate_and_divergence(predict, x + size * rate, there, probe)
        x = x + 0.5 * size * (rate + rate_there)
        log_volume = log_volume + 0.5 * size * (divergence + divergence_there)
        if k + 1 < len(walk):
            rate, divergence = _rate_and_divergence(predict, x, there, probe)
    normal = -0.5 * (x / walk.scale).square() - math.log(walk.scale) - 0.5 * math.log(2 * math.pi)
    return normal.flatten(1).sum(1) + log_volume


def _rate_and_divergence(predict: Predict, x: Tensor, point: Point, probe: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        rate = point.rate(predict(x, point.time.expand(len(x))))
        (product,) = torch.autograd.grad((rate * probe).sum(), x)
    return rate.detach(), (product * probe).flatten(1).sum(1)
