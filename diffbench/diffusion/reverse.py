"""The reverse step of a discrete VP process, p(x_{t-1} | x_t), and its share of the variational bound.

A step i is an int for the whole batch or int64 (B,), one a sample. Images are (B, C, H, W) with values in [-1, 1].
"""

import math
from typing import Literal

import torch
from torch import Tensor

from diffbench.diffusion.process import Prediction
from diffbench.diffusion.schedules import Tables, at

Variance = Literal["fixed_small", "fixed_large", "learned_range"]


def posterior_mean(tables: Tables, i: int | Tensor, x0: Tensor, x_t: Tensor) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x_0) at step i (Ho et al. 2020, Eq. 7)."""
    return at(tables.posterior_mean_coef1, i, x_t) * x0 + at(tables.posterior_mean_coef2, i, x_t) * x_t


def log_variances(tables: Tables, variance: str) -> Tensor:
    """(T,) log-variances of the reverse steps: the posterior's ("fixed_small") or the betas ("fixed_large")."""
    small = tables.posterior_log_variance_clipped
    if variance == "fixed_small" or len(tables) == 1:
        return small
    return torch.cat([small[:1], tables.log_betas[1:]])


def learned_log_variance(tables: Tables, i: int | Tensor, prediction: Prediction) -> Tensor:
    """Log-variance of step i (B, C, H, W) between its bounds (Nichol & Dhariwal 2021, Eq. 15).

    Raises:
        ValueError: if the network predicts none.
    """
    share = prediction.variance
    if share is None:
        raise ValueError("variance=learned_range needs a network that was trained to predict its variance")
    small, large = at(tables.posterior_log_variance_clipped, i, share), at(tables.log_betas, i, share)
    return share * large + (1 - share) * small


def bound_term(
    tables: Tables, i: int | Tensor, x0: Tensor, x_t: Tensor, prediction: Prediction, log_variance: Tensor
) -> Tensor:
    """The terms L_i of the variational bound in bits per dimension, (B,) (Ho et al. 2020, Eq. 5).

    At step 0 the likelihood of the 8-bit image, elsewhere the divergence from the posterior to the model's step.

    Args:
        tables: the (respaced) process.
        i: the step, or (B,) one a sample.
        x0: (B, C, H, W) images on the 256 levels v / 127.5 - 1.
        x_t: (B, C, H, W) the same with the noise of step i.
        prediction: what the network says about x_t.
        log_variance: of the model's step, of a shape that broadcasts over x_t.
    """
    mean = posterior_mean(tables, i, prediction.x0, x_t)
    posterior = at(tables.posterior_log_variance_clipped, i, x_t)
    divergence = normal_kl(posterior_mean(tables, i, x0, x_t), posterior, mean, log_variance)
    decoder = -discrete_log_likelihood(x0, mean, 0.5 * log_variance)
    first = torch.as_tensor(i, device=x_t.device) == 0
    nats = torch.where(first, decoder.flatten(1).mean(1), divergence.flatten(1).mean(1))
    return nats / math.log(2)


def prior_term(tables: Tables, x0: Tensor) -> Tensor:
    """The divergence from q(x_T | x_0) to a standard normal in bits per dimension, (B,)."""
    bar = tables.alphas_cumprod[-1]
    mean, log_variance = bar.sqrt().to(x0.dtype) * x0, (1 - bar).log().to(x0.dtype)
    zero = torch.zeros((), dtype=x0.dtype, device=x0.device)
    return normal_kl(mean, log_variance, zero, zero).flatten(1).mean(1) / math.log(2)


def normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL divergence in nats, elementwise, from a normal distribution to another one."""
    spread = (log_variance - other_log_variance).exp()
    shift = (mean - other_mean).square() * (-other_log_variance).exp()
    return 0.5 * (other_log_variance - log_variance + spread + shift - 1)


def discrete_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability in nats, elementwise, of 8-bit levels under a normal distribution (Ho et al. 2020, Eq. 13).

    A level takes the mass within 1/255 of it; the lowest and the highest take the tails.
    """
    half, inverse = 1 / 255, (-log_std).exp()
    below = _normal_cdf((x - mean - half) * inverse)
    above = _normal_cdf((x - mean + half) * inverse)
    mass = torch.where(x > 0.999, torch.ones_like(above), above) - torch.where(x < -0.999, 0, below)
    return mass.clamp(min=1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    # The tanh approximation (Page 1977): published bounds are computed with it.
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh())
