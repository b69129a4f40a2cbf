"""Objective keys common to all processes: the space and weight of the squared error, and the training times."""

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

Space = Literal["x0", "eps", "v", "velocity"]
"""The image, the noise, v = (alpha eps - sigma x0) / sqrt(alpha^2 + sigma^2) (Salimans & Ho 2022), or the rate dx/ds of
the path, see `Point`: v itself in vp, the noise in edm."""

MAX_WEIGHT = 400.0
"""Largest weight of an error: 1 / 0.05^2, since JiT clips the 1 - t in its velocity at 0.05 (Li & He 2025)."""

# Keys that apply only with one value of another key: (key, other key, its value, the key's default elsewhere).
_DEPENDENT = (
    ("min_snr_gamma", "weighting", "min_snr", None),
    ("sigmoid_bias", "weighting", "sigmoid", None),
    ("p_mean", "times", "log_normal", -1.2),
    ("p_std", "times", "log_normal", 1.2),
    ("logit_mean", "times", "logit_normal", 0.0),
    ("logit_std", "times", "logit_normal", 1.0),
)


@dataclass(kw_only=True)
class ObjectiveConfig:
    """Keys that all processes have in addition to `prediction`, the network's output."""

    loss_space: Space | None = None
    """Space of the squared error; null is that of the prediction."""
    weighting: Literal["none", "min_snr", "edm", "sigmoid"] = "none"
    """Instead of a loss space: the image's squared error times min(SNR, gamma) (Hang et al. 2023), SNR +
    1 / sigma_data^2 (Karras et al. 2022), or SNR sigmoid(bias - log SNR) (Kingma & Gao 2023). Capped at 400."""
    min_snr_gamma: float | None = None
    """Gamma of min_snr; null is 5."""
    sigmoid_bias: float | None = None
    """Bias of sigmoid; null is 2."""
    sigma_data: float | None = None
    """Standard deviation of the data, for EDM's scaling and weighting; null is 0.5 for pixels in [-1, 1], or 1 for
    latents, which are scaled to it."""
    times: Literal["uniform", "log_normal", "logit_normal"] = "uniform"
    """Distribution of training times: uniform in the process's own time (in ln sigma for edm), log-normal in
    sigma / alpha (Karras et al. 2022), or logit-normal in the fraction of that time (Esser et al. 2024)."""
    p_mean: float = -1.2
    """Mean of ln(sigma / alpha) for log-normal times."""
    p_std: float = 1.2
    """Standard deviation of ln(sigma / alpha) for log-normal times."""
    logit_mean: float = 0.0
    """Mean of the logit for logit-normal times; values above 0 favour times nearer to the image."""
    logit_std: float = 1.0
    """Standard deviation of the logit for logit-normal times."""
    shift: float | None = 1.0
    """Factor on sigma / alpha of the training times, and of a flow's sampling steps (Esser et al. 2024, Eq. 23);
    null derives it from the image shape: sqrt(channels x height x width / 4096)."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            choices = [c for part in (kind, *get_args(kind)) if get_origin(part) is Literal for c in get_args(part)]
            if choices and getattr(self, name) not in (*choices, None):
                raise ValueError(
                    f"process.{name}: unknown value {getattr(self, name)!r}; choose from {', '.join(choices)}"
                )
        for name in ("min_snr_gamma", "sigma_data", "p_std", "logit_std", "shift"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"process.{name}: must be positive, got {getattr(self, name)}")
        for name, owner, wanted, default in _DEPENDENT:
            if getattr(self, name) != default and getattr(self, owner) != wanted:
                current, unset = getattr(self, owner), "null" if default is None else f"{default:g}"
                raise ValueError(
                    f"process.{name}: belongs to process.{owner}={wanted}; with {current} leave it at {unset}"
                )
        if self.loss_space is not None and self.weighting != "none":
            raise ValueError(
                f"process.loss_space: {self.loss_space} weights the noise levels, and so does"
                f" process.weighting={self.weighting}; leave one of them at null or none"
            )
