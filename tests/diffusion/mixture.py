"""Data whose best denoiser and density are known in closed form at every noise level: a mixture of Gaussians."""

import math

import torch
from torch import Tensor

from diffbench.diffusion import Predict, Prediction, Process


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Draw standard normal noise in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Mixture:
    """Three round Gaussians in the pixels of small images, so that pixels depend on each other; float64.

    Args:
        shape: (C, H, W) of an image.
        spread: standard deviation of the centres.
    """

    def __init__(self, shape: tuple[int, int, int] = (1, 1, 2), spread: float = 0.6) -> None:
        self.shape, self.size = shape, math.prod(shape)
        generator = torch.Generator().manual_seed(1)
        self.centres = spread * torch.randn(3, self.size, dtype=torch.float64, generator=generator)
        self.shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        self.stds = torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64)
        self.mean = self.shares @ self.centres
        away = self.centres - self.mean
        self.covariance = (away.T * self.shares) @ away + torch.eye(self.size) * (self.shares @ self.stds**2)

    def draw(self, count: int, seed: int = 0) -> Tensor:
        """Draw (count, C, H, W) samples."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.shares, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.size, dtype=torch.float64, generator=generator)
        return (self.centres[which] + self.stds[which, None] * noise).reshape(count, *self.shape)

    def log_density(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """Return the (B,) log-density in nats of images or noisy images (B, C, H, W)."""
        logs, _, _ = self._parts(x.flatten(1), x.new_tensor([alpha]), x.new_tensor([sigma]))
        return logs.logsumexp(1) - 0.5 * self.size * math.log(2 * math.pi)

    def denoiser(self, process: Process) -> Predict:
        """Return the exact E[x0 | x_t] and E[eps | x_t] under a process, finite at both ends of its path."""

        def predict(x: Tensor, t: Tensor) -> Prediction:
            alpha, sigma = (part.flatten() for part in process.alpha_sigma(t, x))
            logs, away, variance = self._parts(x.flatten(1), alpha, sigma)
            weights = logs.softmax(1) / variance
            # sum_k r_k (x - alpha c_k) / variance_k, and the same weighted by the variance of component k
            pull = (weights[..., None] * away).sum(1)
            kept = ((weights * self.stds.to(x.dtype) ** 2)[..., None] * away).sum(1)
            x0 = logs.softmax(1) @ self.centres.to(x.dtype) + alpha[:, None] * kept
            return Prediction(x0.reshape(x.shape), (sigma[:, None] * pull).reshape(x.shape))

        return predict

    def log_shares(self, process: Process, x: Tensor, t: Tensor) -> Tensor:
        """Return the (B, 3) log-probabilities that x_t comes from each Gaussian: the exact noisy-image classifier."""
        alpha, sigma = (part.flatten() for part in process.alpha_sigma(t, x))
        return self._parts(x.flatten(1), alpha, sigma)[0].log_softmax(1)

    def only(self, component: int) -> "Mixture":
        """Return one of the Gaussians alone."""
        alone = Mixture(self.shape)
        alone.centres, alone.stds = self.centres[[component]], self.stds[[component]]
        alone.shares = torch.ones(1, dtype=torch.float64)
        return alone

    def _parts(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log(share x density) up to a constant (B, K), x - alpha c_k (B, K, D) and variances (B, K)."""
        away = x[:, None] - alpha[:, None, None] * self.centres.to(x.dtype)
        variance = (alpha[:, None] * self.stds.to(x.dtype)) ** 2 + sigma[:, None] ** 2
        distance = away.square().sum(2) / variance
        logs = self.shares.to(x.dtype).log() - 0.5 * (distance + self.size * variance.log())
        return logs, away, variance
