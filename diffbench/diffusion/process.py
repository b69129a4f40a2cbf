"""The interface of all processes: the path from image to noise, the loss, and the points that samplers visit.

Every process is x_t = alpha_t x_0 + sigma_t eps. They differ in the meaning of time, the distribution of training
times, the network's input and output, and the weight of the loss. A process is not an nn.Module: its tables stay
float64 and out of checkpoints. It draws no random numbers: callers pass u and eps.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """A network's output at x_t as the clean image and the noise in it, both (B, C, H, W)."""

    x0: Tensor
    eps: Tensor
    variance: Tensor | None = None
    """Position of a learned log-variance between its bounds, from 0 (the posterior's) to 1 (log beta); the bounds
    themselves depend on the respacing. None where the network learns no variance."""


Predict = Callable[[Tensor, Tensor], Prediction]
"""(x_t (B, C, H, W), t (B,) times of the process) -> Prediction; see guidance.py for ways to wrap it."""

LabelledPredict = Callable[[Tensor, Tensor, Tensor], Prediction]
"""(x_t, t, y (B,) labels) -> Prediction."""


class Point(NamedTuple):
    """A point of the path, or several: the process's time there, and x = alpha x_0 + sigma eps, in float64.

    s is the coordinate in which samplers integrate dx/ds = alpha'(s) x_0 + sigma'(s) eps, the probability-flow ODE
    (Song et al. 2021): the angle of a variance-preserving process, the sigma of EDM, the time of a flow. In it the rate
    is v, the noise or the velocity.
    """

    time: Tensor
    s: Tensor
    alpha: Tensor
    sigma: Tensor
    alpha_rate: Tensor
    sigma_rate: Tensor

    def rate(self, prediction: Prediction) -> Tensor:
        """dx/ds, (B, C, H, W)."""
        x0, eps = prediction.x0, prediction.eps
        return self.alpha_rate.to(x0.dtype) * x0 + self.sigma_rate.to(eps.dtype) * eps


@dataclass(frozen=True)
class Grid:
    """The points that a sampler of N steps visits, noisiest first."""

    points: Point
    """Its tensors are (N + 1,), on the CPU."""
    scale: float = 1.0
    """Standard deviation of x at the first point."""
    open_end: bool = True
    """Whether the last point, where no noise is left, has no time of its own: the network cannot be evaluated there."""

    def __len__(self) -> int:
        return len(self.points.s) - 1

    def __getitem__(self, i: int) -> Point:
        return Point(*(values[i] for values in self.points))

    def start(self, noise: Tensor) -> Tensor:
        """x at the first point, of standard normal noise."""
        return noise * self.scale

    def reversed(self) -> "Grid":
        """The points from the least to the most noisy, without one at which the network cannot be evaluated."""
        end = len(self) + (not self.open_end)
        return Grid(Point(*(values[:end].flip(0) for values in self.points)), self.scale, open_end=False)


class Process(ABC):
    """A diffusion process. Times t are (B,) tensors in its own unit, images (B, C, H, W)."""

    name: ClassVar[str]
    learn_sigma: bool = False
    """Whether the network also puts out a variance, in as many channels again."""

    @abstractmethod
    def noising(self) -> tuple[Any, ...]:
        """Identity of the noisy images and times that a network sees; where it is equal, a classifier serves both."""

    @abstractmethod
    def time(self, u: Tensor) -> Tensor:
        """Training times (B,) for u (B,) uniform in (0, 1)."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at times t (B,), float64."""

    @abstractmethod
    def time_at(self, log_snr: Tensor) -> Tensor:
        """The times (B,), float64, with these log-SNRs; inverse of `log_snr`."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at times t (B,), in the dtype of `like` and shaped to broadcast over it."""

    @abstractmethod
    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The output (B, C, H, W) that the network should give at add_noise(x0, t, eps), without a learned variance."""

    @abstractmethod
    def convert(self, out: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """A network's output at x_t and times t (B,) as image and noise."""

    @abstractmethod
    def grid(self, steps: int | str) -> Grid:
        """The points of a sampler of that many steps."""

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The network's input: the noisy image as scaled for it, and its conditioning time (B,) in that dtype."""
        return x_t, t.to(x_t.dtype)

    def losses(self, out: Tensor, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The loss of each sample's network output at add_noise(x0, t, eps), (B,): the squared error of its target."""
        return mean_square(out[:, : x0.shape[1]] - self.target(x0, t, eps))

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t of images x0 and noise eps (B, C, H, W) at times t (B,)."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * eps


def predictor(process: Process, network: Callable[[Tensor, Tensor, Tensor], Tensor]) -> LabelledPredict:
    """A network (x, t, y) -> output as the (x_t, t, y) -> Prediction that guidance and samplers take."""

    def predict(x_t: Tensor, t: Tensor, y: Tensor) -> Prediction:
        t = _on(t, x_t.device)
        x, time = process.inputs(x_t, t)
        return process.convert(network(x, time, y), x_t, t)

    return predict


def _on(t: Tensor, device: torch.device) -> Tensor:
    """Times t (B,) on a device; a time that all samples share is sent as a number, without a synchronisation."""
    if t.device == device or t.device.type != "cpu" or bool((t != t[0]).any()):
        return t.to(device)
    return torch.full(t.shape, t[0].item(), dtype=t.dtype, device=device)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,) in the dtype of `like` (B, ...), shaped (B, 1, ...) to broadcast over it."""
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def mean_square(x: Tensor) -> Tensor:
    """Mean square of each sample of x (B, ...), (B,)."""
    return x.square().flatten(1).mean(1)


def step_count(steps: int | str, least: int = 1) -> int:
    """The number of steps of a process whose times are continuous.

    Raises:
        ValueError: if it is not a number, or too small.
    """
    text = str(steps).strip()
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"steps must be a number of at least {least} for a process in continuous time, got {text!r}")
    return int(text)
