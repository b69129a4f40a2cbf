"""Likelihood: the variational bound of a discrete VP process, and the exact value by the probability-flow ODE."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffbench.diffusion.process import Grid, Point, Predict, Prediction, mean_square
from diffbench.diffusion.schedules import Tables, Variance, at


class Bound(NamedTuple):
    """The variational bound in bits per dimension; columns run from the noisiest step to the least noisy."""

    total: Tensor
    """(B,) sum of all terms and the prior."""
    prior: Tensor
    """(B,) KL divergence of the noisiest step from the standard normal."""
    terms: Tensor
    """(B, T) one term per step."""
    x0_error: Tensor
    """(B, T) mean squared error of the predicted image."""
    eps_error: Tensor
    """(B, T) mean squared error of the noise that the predicted image implies."""


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
    """Compute the bound on -log p(x0), term by term (Ho et al. 2020, Eq. 5; Nichol & Dhariwal 2021, §3).

    Args:
        predict: (x_t, t) -> Prediction.
        x0: (B, C, H, W) images on the 256 levels v / 127.5 - 1.
        tables: the (respaced) process.
        noise: column k of the terms -> standard normal noise shaped like x0.
        variance: variance of the reverse steps.
        clip: whether the predicted image is clamped to [-1, 1].
    """
    terms, x0_errors, eps_errors = [], [], []
    fixed = tables.log_variances(variance)
    for k, i in enumerate(reversed(range(len(tables)))):
        eps, bar = noise(k), tables.alphas_cumprod
        alpha, sigma = at(bar.sqrt(), i, x0), at((1 - bar).sqrt(), i, x0)
        x_t = alpha * x0 + sigma * eps
        prediction = predict(x_t, tables.time[i].expand(len(x0)))
        if clip:
            prediction = prediction._replace(x0=prediction.x0.clamp(-1, 1))
        learned = variance == "learned_range"
        log_variance = tables.learned_log_variance(i, prediction.variance) if learned else at(fixed, i, x0)
        terms.append(bound_term(tables, i, x0, x_t, prediction, log_variance))
        x0_errors.append(mean_square(prediction.x0 - x0))
        eps_errors.append(mean_square((x_t - alpha * prediction.x0) / sigma - eps))
    prior, stacked = prior_term(tables, x0), torch.stack(terms, dim=1)
    return Bound(stacked.sum(1) + prior, prior, stacked, torch.stack(x0_errors, dim=1), torch.stack(eps_errors, dim=1))


def bound_term(
    tables: Tables, i: int | Tensor, x0: Tensor, x_t: Tensor, prediction: Prediction, log_variance: Tensor
) -> Tensor:
    """Compute the terms L_i of the variational bound in bits per dimension, (B,) (Ho et al. 2020, Eq. 5).

    Step 0 gives the negative log-likelihood of the 8-bit image, any other the KL from the posterior to the model.

    Args:
        tables: the (respaced) process.
        i: the step, or (B,) one per sample.
        x0: (B, C, H, W) images on the 256 levels v / 127.5 - 1.
        x_t: (B, C, H, W) the images with the noise of step i.
        prediction: the network's prediction at x_t.
        log_variance: log-variance of the model's step, broadcastable over x_t.
    """
    mean = tables.posterior_mean(i, prediction.x0, x_t)
    posterior = at(tables.posterior_log_variance_clipped, i, x_t)
    divergence = normal_kl(tables.posterior_mean(i, x0, x_t), posterior, mean, log_variance)
    decoder = -discrete_log_likelihood(x0, mean, 0.5 * log_variance)
    first = torch.as_tensor(i, device=x_t.device) == 0
    nats = torch.where(first, decoder.flatten(1).mean(1), divergence.flatten(1).mean(1))
    return nats / math.log(2)


def prior_term(tables: Tables, x0: Tensor) -> Tensor:
    """Return the KL divergence from q(x_T | x_0) to a standard normal in bits per dimension, (B,)."""
    bar = tables.alphas_cumprod[-1]
    mean, log_variance = bar.sqrt().to(x0.dtype) * x0, (1 - bar).log().to(x0.dtype)
    zero = torch.zeros((), dtype=x0.dtype, device=x0.device)
    return normal_kl(mean, log_variance, zero, zero).flatten(1).mean(1) / math.log(2)


def normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Return the elementwise KL divergence, in nats, from one normal distribution to another."""
    spread = (log_variance - other_log_variance).exp()
    shift = (mean - other_mean).square() * (-other_log_variance).exp()
    return 0.5 * (other_log_variance - log_variance + spread + shift - 1)


def discrete_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the elementwise log-probability, in nats, of 8-bit levels under a normal (Ho et al. 2020, Eq. 13).

    A level gets the mass within 1/255 of it; the lowest and the highest also get the tails.
    """
    half, inverse = 1 / 255, (-log_std).exp()
    below = _normal_cdf((x - mean - half) * inverse)
    above = _normal_cdf((x - mean + half) * inverse)
    mass = torch.where(x > 0.999, torch.ones_like(above), above) - torch.where(x < -0.999, 0, below)
    return mass.clamp(min=1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    # The tanh approximation (Page 1977), with which published bounds are computed.
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh())


@torch.no_grad()
def exact_log_likelihood(predict: Predict, x0: Tensor, grid: Grid, probe: Tensor) -> Tensor:
    """Compute log p(x0) in nats, (B,), by the probability-flow ODE from image to noise (Song et al. 2021, §4.3).

    The log-volume changes by the integral of the divergence of dx/ds, estimated without bias by Hutchinson's
    probe^T (d rate / dx) probe (FFJORD, Grathwohl et al. 2019). Integration uses Heun's method on the grid's points.

    Args:
        predict: (x_t, t) -> Prediction, differentiable in x_t.
        x0: (B, C, H, W) images. The result is a density, so add dequantisation noise to 8-bit images.
        grid: grid of the process; use many steps, since the integrator is only of order 2.
        probe: shaped like x0, mean 0 and variance 1, such as random signs; one per image, fixed along the path.
    """
    outward = grid.reversed()
    alpha = outward[0].alpha  # x at the first point is alpha x0: rescale its density to that of x0
    x, log_volume = alpha.to(x0.dtype) * x0, x0[0].numel() * float(alpha.log()) + x0.new_zeros(len(x0))
    rate, divergence = _rate_and_divergence(predict, x, outward[0], probe)
    for k in range(len(outward)):
        there, size = outward[k + 1], (outward.points.s[k + 1] - outward.points.s[k]).to(x.dtype)
        rate_there, divergence_there = _rate_and_divergence(predict, x + size * rate, there, probe)
        x = x + 0.5 * size * (rate + rate_there)
        log_volume = log_volume + 0.5 * size * (divergence + divergence_there)
        if k + 1 < len(outward):
            rate, divergence = _rate_and_divergence(predict, x, there, probe)
    normal = -0.5 * (x / outward.scale).square() - math.log(outward.scale) - 0.5 * math.log(2 * math.pi)
    return normal.flatten(1).sum(1) + log_volume


def _rate_and_divergence(predict: Predict, x: Tensor, point: Point, probe: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        rate = point.rate(predict(x, point.time.expand(len(x))))
        (product,) = torch.autograd.grad((rate * probe).sum(), x)
    return rate.detach(), (product * probe).flatten(1).sum(1)
