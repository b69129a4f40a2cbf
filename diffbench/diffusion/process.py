"""The interface of all processes: the path from image to noise, the loss, and the points that samplers visit.

Every process is x_t = alpha_t x_0 + sigma_t eps. Processes differ in the meaning of time, the distribution of training
times and the network's input. This module converts between prediction spaces and loss spaces for all of them. A process
is not an nn.Module: its tables stay in float64 and out of checkpoints. It draws no random numbers: callers pass u and
eps.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffbench.diffusion.objective import MAX_WEIGHT
from diffbench.diffusion.timesteps import normal_quantiles


class Prediction(NamedTuple):
    """A network's output at x_t as the clean image and the noise in it, both (B, C, H, W)."""

    x0: Tensor
    eps: Tensor
    variance: Tensor | None = None
    """Position of a learned log-variance between its bounds, from 0 (the posterior's) to 1 (log beta); the bounds
    depend on the respacing. None if the network learns no variance."""


Predict = Callable[[Tensor, Tensor], Prediction]
"""(x_t (B, C, H, W), t (B,) times of the process) -> Prediction; guidance.py has wrappers for it."""

LabelledPredict = Callable[[Tensor, Tensor, Tensor], Prediction]
"""(x_t, t, y (B,) labels) -> Prediction."""


class Point(NamedTuple):
    """One or more points of the path x = alpha x_0 + sigma eps, with the process's time at each, in float64.

    s is the coordinate in which samplers integrate dx/ds = alpha'(s) x_0 + sigma'(s) eps, the probability-flow ODE
    (Song et al. 2021): the angle of a variance-preserving process, the sigma of EDM, the time of a flow. The rate dx/ds
    is then v, the noise or the velocity.
    """

    time: Tensor
    s: Tensor
    alpha: Tensor
    sigma: Tensor
    alpha_rate: Tensor
    sigma_rate: Tensor

    def rate(self, prediction: Prediction) -> Tensor:
        """Return dx/ds, (B, C, H, W)."""
        x0, eps = prediction.x0, prediction.eps
        return self.alpha_rate.to(x0.dtype) * x0 + self.sigma_rate.to(eps.dtype) * eps

    def coefficients(self, space: str, sigma_data: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return a and b such that a network's output in a `Space`, or in "edm", is a x_0 + b eps.

        "edm" is the F of EDM's preconditioning, (x_0 - c_skip x) / c_out, for data of standard deviation `sigma_data`;
        it equals -v if that is 1.
        """
        if space == "velocity":
            return self.alpha_rate, self.sigma_rate
        if space in ("x0", "eps"):
            one, zero = torch.ones_like(self.alpha), torch.zeros_like(self.alpha)
            return (one, zero) if space == "x0" else (zero, one)
        if space == "v":
            return -self.sigma / self.total(), self.alpha / self.total()
        total = self.total(sigma_data)
        return self.sigma / (sigma_data * total), -sigma_data * self.alpha / total

    def total(self, sigma_data: float = 1.0) -> Tensor:
        """Return the standard deviation of x for data of standard deviation `sigma_data`."""
        return (self.sigma**2 + (sigma_data * self.alpha) ** 2).sqrt()


@dataclass(frozen=True)
class Grid:
    """The points that a sampler with N steps visits, noisiest first."""

    points: Point
    """N + 1 points: its tensors are (N + 1,), on the CPU."""
    scale: float = 1.0
    """Standard deviation of x at the first point."""
    open_end: bool = True
    """Whether the network cannot be evaluated at the last point, where no noise is left: the process has no time for
    that point, or a predicted image does not determine the noise there."""

    def __len__(self) -> int:
        return len(self.points.s) - 1

    def __getitem__(self, i: int) -> Point:
        return Point(*(values[i] for values in self.points))

    def start(self, noise: Tensor) -> Tensor:
        """Scale standard normal noise to x at the first point."""
        return noise * self.scale

    def reversed(self) -> "Grid":
        """Return the points from least to most noisy, without one at which the network cannot be evaluated."""
        end = len(self) + (not self.open_end)
        return Grid(Point(*(values[:end].flip(0) for values in self.points)), self.scale, open_end=False)


class Process(ABC):
    """A diffusion process. Times t are (B,) tensors in the process's own unit, images (B, C, H, W)."""

    name: ClassVar[str]
    towards_image: ClassVar[bool] = False
    """Whether time runs from noise to image."""
    learn_sigma: bool = False
    """Whether the network also predicts a variance, which doubles its output channels."""
    config: Any

    @abstractmethod
    def noising_key(self) -> tuple[Any, ...]:
        """Return what identifies the noisy inputs of a network; processes with equal values can share a classifier."""

    @abstractmethod
    def uniform_time(self, u: Tensor) -> Tensor:
        """Map u (B,), uniform in (0, 1), to training times (B,) uniform in the process's own time."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2) at times t (B,), float64."""

    @abstractmethod
    def time_at(self, log_snr: Tensor) -> Tensor:
        """Return the times (B,), float64, with these log-SNRs; inverse of `log_snr`."""

    @abstractmethod
    def path(self, t: Tensor) -> Point:
        """Return alpha, sigma and their derivatives at times t (B,), float64."""

    @abstractmethod
    def grid(self, steps: int | str) -> Grid:
        """Return the points that a sampler with this many steps visits."""

    def time(self, u: Tensor) -> Tensor:
        """Map u (B,), uniform in (0, 1), to training times (B,) of the config's distribution."""
        c = self.config
        if c.times == "log_normal":
            t = self.training_time_at(-2 * normal_quantiles(u, c.p_mean, c.p_std))
        elif c.times == "logit_normal":
            mean = c.logit_mean if self.towards_image else -c.logit_mean
            t = self.uniform_time(normal_quantiles(u, mean, c.logit_std).sigmoid())
        else:
            t = self.uniform_time(u)
        return t if self.shift == 1 else self.training_time_at(self.log_snr(t) - 2 * math.log(self.shift))

    def training_time_at(self, log_snr: Tensor) -> Tensor:
        """Return the training times (B,) nearest to these log-SNRs."""
        return self.time_at(log_snr)

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the network's inputs: the scaled noisy image, and the conditioning time (B,) in the same dtype."""
        return x_t, t.to(x_t.dtype)

    def noise_level(self, time: Tensor) -> Tensor:
        """Return sigma / alpha (B,), float64, at a network's conditioning time (B,) from `inputs`."""
        return (-0.5 * self.log_snr(time)).exp()

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at times t (B,), in the dtype of `like` and shaped to broadcast over it."""
        p = self.path(t)
        return per_sample(p.alpha, like), per_sample(p.sigma, like)

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return x_t for images x0 and noise eps (B, C, H, W) at times t (B,)."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return the network's regression target (B, C, H, W) at add_noise(x0, t, eps), without a learned variance."""
        if self.config.prediction in ("x0", "eps"):
            return x0 if self.config.prediction == "x0" else eps
        a, b = self.path(t).coefficients(self.config.prediction, self.sigma_data)
        return per_sample(a, x0) * x0 + per_sample(b, x0) * eps

    def convert(self, out: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Convert a network's output (B, C, H, W) at x_t and times t (B,) to image and noise.

        The two solve x_t = alpha x_0 + sigma eps and out = a x_0 + b eps. At an end of the path where the prediction
        does not determine the other one (noise where alpha is 0, image where sigma is 0), the other one is 0.

        Only the first C channels of the output are used (SiT keeps DiT's doubled last layer).
        """
        out, p, prediction = out[:, : x_t.shape[1]], self.path(t), self.config.prediction
        if prediction == "x0":
            return Prediction(out, (x_t - per_sample(p.alpha, x_t) * out) / per_sample(divisor(p.sigma), x_t))
        if prediction == "eps":
            return Prediction((x_t - per_sample(p.sigma, x_t) * out) / per_sample(divisor(p.alpha), x_t), out)
        a, b = p.coefficients(prediction, self.sigma_data)
        scale = p.alpha * b - p.sigma * a
        x0 = per_sample(b / scale, x_t) * x_t - per_sample(p.sigma / scale, x_t) * out
        eps = per_sample(p.alpha / scale, x_t) * out - per_sample(a / scale, x_t) * x_t
        return Prediction(x0, eps)

    def losses(self, out: Tensor, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return each sample's loss (B,), the weighted squared error of the network's output for the noisy x0."""
        loss = mean_square(out[:, : x0.shape[1]] - self.target(x0, t, eps))
        weight = self.weight(t)
        return loss if weight is None else loss * weight.to(loss.dtype)

    def weight(self, t: Tensor) -> Tensor | None:
        """Return weights (B,) float64 of the output's squared error at times t (B,), at most `MAX_WEIGHT`; None for 1.

        At a given x_t all errors are multiples of one k: sigma k in x_0, -alpha k in eps, and (a sigma - b alpha) k in
        a x_0 + b eps. A weight is the factor of k^2 in the objective over that in the output's squared error.
        """
        c = self.config
        if c.weighting == "none" and c.loss_space in (None, c.prediction):
            return None
        p = self.path(t)
        signal, noise = p.alpha**2, p.sigma**2
        if c.weighting == "min_snr":
            wanted = torch.minimum(signal, (c.min_snr_gamma or 5.0) * noise)
        elif c.weighting == "edm":
            wanted = signal + noise / self.sigma_data**2
        elif c.weighting == "sigmoid":
            bias = 2.0 if c.sigmoid_bias is None else c.sigmoid_bias
            wanted = signal * noise / (noise + math.exp(-bias) * signal)
        else:
            wanted = self._error(p, c.loss_space)
        return (wanted / self._error(p, c.prediction).clamp(min=1e-300)).clamp(max=MAX_WEIGHT)

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the data; 0.5 if the config leaves it at null."""
        return 0.5 if self.config.sigma_data is None else float(self.config.sigma_data)

    @property
    def shift(self) -> float:
        """Shift of times in the config; raises ValueError if it is null, which needs the shape of the images."""
        if self.config.shift is None:
            raise ValueError("process.shift: null follows the shape of an experiment's images; give a number")
        return float(self.config.shift)

    def _error(self, p: Point, space: str) -> Tensor:
        a, b = p.coefficients(space, self.sigma_data)
        return (a * p.sigma - b * p.alpha) ** 2


def predictor(process: Process, network: Callable[[Tensor, Tensor, Tensor], Tensor]) -> LabelledPredict:
    """Wrap a network (x, t, y) -> output into the (x_t, t, y) -> Prediction that guidance and samplers take."""

    def predict(x_t: Tensor, t: Tensor, y: Tensor) -> Prediction:
        t = _on(t, x_t.device)
        x, time = process.inputs(x_t, t)
        return process.convert(network(x, time, y), x_t, t)

    return predict


def _on(t: Tensor, device: torch.device) -> Tensor:
    """Move times t (B,) to a device; a time that all samples share is sent as a number, without a synchronisation."""
    if t.device == device or t.device.type != "cpu" or bool((t != t[0]).any()):
        return t.to(device)
    return torch.full(t.shape, t[0].item(), dtype=t.dtype, device=device)


def divisor(values: Tensor) -> Tensor:
    """Replace 0 by infinity, so that dividing by the values gives 0 there, also in the gradient."""
    return values.masked_fill(values == 0, math.inf)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Return values (B,) in the dtype of `like` (B, ...), shaped (B, 1, ...) to broadcast over it."""
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def mean_square(x: Tensor) -> Tensor:
    """Return the mean square (B,) of each sample of x (B, ...)."""
    return x.square().flatten(1).mean(1)


def step_count(steps: int | str, least: int = 1) -> int:
    """Parse the number of sampling steps of a continuous-time process.

    Raises:
        ValueError: if it is not a whole number, or too small.
    """
    text = str(steps).strip()
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"steps must be a number of at least {least} for a continuous-time process, got {text!r}")
    return int(text)
