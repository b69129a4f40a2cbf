"""Sections of a config: seeds, optimizer, averages, validation, sampling and scores; trainer.py has `trainer`.

They are separate from the code they configure, which imports Lightning, so that a config is checked within a second.
"""

import math
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from diffbench.config.layers import located
from diffbench.core.errors import check, check_at_least
from diffbench.denoisers.base import check_choices, check_positive
from diffbench.diffusion import PAIRS, check_pair

AUGMENT_WIDTH = 9
"""Length of the vector that tells a network how an image was augmented."""


@dataclass
class OptimizerConfig:
    """Optimizer and learning rate; the rate is a function of the number of images seen."""

    name: Literal["adamw", "adam", "muon"] = "adamw"
    """muon: Muon for the matrices of linear layers in blocks, AdamW at the same learning rate for everything else."""
    lr: float = 1e-3
    """Learning rate after the warmup."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Betas of Adam and AdamW; Muon's momentum is 0.95."""
    weight_decay: float = 0.0
    warmup_images: int = 0
    """Images over which the learning rate rises linearly from zero."""
    decay_images: int | list[int] | None = None
    """Images seen at the end of a cosine decay that starts after the warmup, or [begin, end]; null: no decay."""
    final_lr: float = 0.01
    """Learning rate after the decay, as a fraction of `lr`."""
    grad_clip_norm: float | None = None
    """Norm to which gradients are clipped; null: no clipping."""

    def __post_init__(self) -> None:
        check_positive(self, "lr", section="optimizer")
        two = "be two numbers in [0, 1)"
        check(self, "optimizer", two, lambda b: len(b) == 2 and min(b) >= 0 and max(b) < 1, "betas")
        check(self, "optimizer", "be positive or null", lambda v: v > 0, "grad_clip_norm")
        check_at_least(self, "optimizer", warmup_images=0, weight_decay=0)
        check(self, "optimizer", "lie in [0, 1]", lambda v: 0 <= v <= 1, "final_lr")
        if (decay := self.decay) is not None and (len(decay) != 2 or not self.warmup_images <= decay[0] < decay[1]):
            must = "be [begin, end], rising from" if isinstance(self.decay_images, list) else "exceed"
            raise ValueError(
                f"optimizer.decay_images: {self.decay_images} must {must} optimizer.warmup_images={self.warmup_images};"
                " allowed: null for a constant rate"
            )

    @property
    def decay(self) -> list[int] | None:
        """The images at which the decay of the learning rate starts and ends; None for a constant rate."""
        if self.decay_images is None or isinstance(self.decay_images, list):
            return self.decay_images
        return [self.warmup_images, self.decay_images]


@dataclass
class SeedsConfig:
    """Seeds of individual sources of randomness; null: the run's `seed`."""

    init: int | None = None
    """Initial weights."""
    data: int | None = None
    """Order and flips of the images, and draws from the posterior of latents."""
    noise: int | None = None
    """Training times and noise, dropped labels, dropout, augmentation."""

    def __post_init__(self) -> None:
        check(self, "seeds", "lie in [0, 2^63) or be null", lambda v: 0 <= v < 2**63, *vars(self))


@dataclass
class DenoiserSeedsConfig(SeedsConfig):
    """Seeds of a denoiser's run, in addition to those of every kind of run."""

    sample: int | None = None
    """Noise of the scored samples; it changes no weights, so another value scores a run again without retraining it."""


@dataclass
class EMAConfig:
    """Exponential moving averages of the weights; validation and sampling use the first by default."""

    decays: list[float] = field(default_factory=lambda: [0.9999])
    """Decay of each average per optimizer step, in (0, 1)."""
    half_life: list[float] | None = None
    """Half-lives instead of `decays`. Values from 1 up are in images (EDM); values below 1 are fractions of the images
    seen so far, which suit runs of any length, at any point of training (EDM2's power functions)."""
    warmup: bool = True
    """Limit the decay at update n to (1 + n) / (10 + n)."""
    ramp: float | None = None
    """Instead of `warmup`, limit the half-life to this fraction of the images seen (EDM: 0.05)."""

    def in_steps(self, batch_size: int) -> "EMAConfig":
        """Fill in `decays` from the half-lives (fractions stay as they are); ValueError if decays were given too."""
        if self.half_life is None:
            return self
        decays = [h if h < 1 else round(0.5 ** (batch_size / h), 8) for h in self.half_life]
        if self.decays not in (EMAConfig().decays, decays):
            raise ValueError(f"ema.decays: {self.decays} conflicts with ema.half_life; give one of the two")
        with located(key="ema.half_life"):
            return replace(self, decays=decays)

    def decay_at(self, update: int, decay: float) -> float:
        """Return the decay that the average with this entry of `decays` uses at update n = 0, 1, ...

        A half-life that is a fraction h of the n updates so far gives 0.5^(1 / (h n)), which weights update i by
        i^(ln 2 / h - 1) (Karras et al. 2024, Eq. 1). Other decays are at most (1 + n) / (10 + n) with `warmup`, or with
        `ramp` the decay of a half-life of `ramp` times n (Karras et al. 2022).
        """
        if self.half_life is not None and decay < 1 and decay in self.half_life:
            return _decay(decay * update)
        if self.ramp is not None:
            return min(decay, _decay(self.ramp * update))
        return min(decay, (1 + update) / (10 + update)) if self.warmup else decay

    def half_life_at(self, images: int, batch_size: int, decay: float) -> float:
        """Return the half-life, in images, that an average has after seeing `images`."""
        return -batch_size * math.log(2) / math.log(self.decay_at(max(1, images // batch_size), decay))

    def __post_init__(self) -> None:
        check(self, "ema", "be positive numbers", lambda v: v and min(v) > 0, "half_life")
        check(self, "ema", "lie in (0, 1] or be null", lambda v: 0 < v <= 1, "ramp")
        different = "be different numbers between 0 and 1"
        check(self, "ema", different, lambda v: v and min(v) > 0 and max(v) < 1 and len({*v}) == len(v), "decays")


def _decay(half_life: float) -> float:
    """Return the decay per update of a half-life in updates."""
    return float(0.5 ** (1 / max(half_life, 1e-8)))


@dataclass
class ValidationConfig:
    """Squared error of eps on held-out images with fixed noise; half its integral over log-SNR is `val/bound`."""

    log_snr: list[float] = field(default_factory=lambda: [-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0])
    """Rising noise levels, log(alpha^2 / sigma^2); the bound covers the range from the first to the last."""
    count: int = 2_000
    """Held-out images to use, spread evenly over the classes; all of them if there are fewer."""

    def __post_init__(self) -> None:
        check_positive(self, "count", section="validation")
        if len(self.log_snr) < 2 or sorted(set(self.log_snr)) != self.log_snr:
            raise ValueError(f"validation.log_snr: must be at least two rising levels, got {self.log_snr}")


# Keys that need another key to have a certain value: the key, the other key, that value, the default without it.
_OWNED: tuple[tuple[str, str, Any, Any], ...] = (
    ("guidance_power", "guidance_schedule", "power_cosine", 4.0),
    ("variance", "sampler", "ddpm", "fixed_large"),
    ("eta", "sampler", "ddim", 0.0),
    ("s_churn", "sampler", "heun", 0.0),
    ("s_min", "sampler", "heun", 0.0),
    ("s_max", "sampler", "heun", None),
    ("s_noise", "sampler", "heun", 1.0),
    ("sde_diffusion", "sampler", "euler_maruyama", "sigma"),
    ("sde_strength", "sampler", "euler_maruyama", 1.0),
    ("sde_last", "sampler", "euler_maruyama", "mean"),
    ("sde_last_step", "sampler", "euler_maruyama", 0.04),
    ("rtol", "sampler", "dopri5", 1e-3),
    ("atol", "sampler", "dopri5", 1e-6),
)


@dataclass
class SampleConfig:
    """The sampler and its settings, during training and after it."""

    sampler: Literal["ddpm", "ddim", "euler", "heun", "dpm_solver", "euler_maruyama", "dopri5"] | None = None
    """null: the process's default, which is ddpm for vp, heun for edm, euler for flow."""
    steps: str = "250"
    """Number of sampler steps; for vp also ddimN (DDIM's stride), or a number per equal section, e.g. 10,15,20."""
    guidance: float = 1.0
    """Weight of classifier-free guidance; 1: no guidance."""
    guidance_schedule: Literal["constant", "power_cosine"] = "constant"
    """power_cosine raises the weight from 1 at pure noise to `guidance` at the image (DiffiT)."""
    guidance_power: float = 4.0
    """Exponent of power_cosine."""
    guidance_interval: list[float] | None = None
    """Guide only at noise levels sigma / alpha in (low, high] (Kynkäänniemi et al. 2024); null: at all levels."""
    guidance_channels: int | None = None
    """Guide only this many channels, the first ones; null: all. The DiT and DiffiT releases guide three of four."""
    weak_model: str | None = None
    """Run folder of a weaker model to guide away from, instead of the null class: autoguidance (Karras et al. 2024)."""
    classifier: str | None = None
    """Run folder of a noise-aware classifier for classifier guidance (Dhariwal & Nichol 2021)."""
    classifier_scale: float = 1.0
    """Scale of the classifier's gradient; 1 is Bayes' rule, 0 is no classifier guidance."""
    eta: float = 0.0
    """DDIM: amount of noise, from 0 (deterministic) to 1 (like DDPM)."""
    variance: Literal["fixed_small", "fixed_large"] = "fixed_large"
    """DDPM: variance of a step; a process with a learned variance uses that instead."""
    s_churn: float = 0.0
    """Heun on the edm process: amount of noise to add and remove again, over all steps (EDM, Algorithm 2)."""
    s_min: float = 0.0
    """Smallest sigma at which noise is churned."""
    s_max: float | None = None
    """Largest sigma at which noise is churned; null: no limit."""
    s_noise: float = 1.0
    """Standard deviation of the churned noise."""
    sde_diffusion: Literal["sigma", "constant"] = "sigma"
    """Euler-Maruyama: diffusion coefficient of the flow's SDE, proportional to sigma or constant. constant is stable
    only for steps below about 2 sde_last_step^2 / sde_strength."""
    sde_strength: float = 1.0
    """Euler-Maruyama: factor of the diffusion coefficient; 0 is the ODE."""
    sde_last: Literal["mean", "tweedie", "euler"] = "mean"
    """Euler-Maruyama: the last step. mean follows the SDE's drift and leaves noise of sde_last_step times sde_strength;
    tweedie jumps to the predicted image; euler follows the velocity."""
    sde_last_step: float = 0.04
    """Euler-Maruyama: size of the last step, in the flow's time."""
    rtol: float = 1e-3
    """dopri5: relative error allowed per step."""
    atol: float = 1e-6
    """dopri5: absolute error allowed per step."""
    clip: bool | None = None
    """Clamp the predicted image to [-1, 1] at each step; null: only for ddpm and ddim, and only on pixels."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """bf16-mixed: run the network under bfloat16 autocast."""
    batch_size: int = 500
    """Largest batch of samples; a CPU uses at most 250."""

    def __post_init__(self) -> None:
        check_choices(self, section="sample")
        check_positive(self, "batch_size", "guidance_power", "rtol", "atol", "s_noise", section="sample")
        self.steps = str(self.steps)  # a script may pass a number
        if not re.fullmatch(r"ddim\d+|\d+( *, *\d+)*", self.steps):
            raise ValueError(f"sample.steps: must be like 250, ddim25 or 10,15,20, got {self.steps!r}")
        check(self, "sample", "lie in [0, 1]", lambda v: 0 <= v <= 1, "eta")
        for name, owner, wanted, idle in _OWNED:
            if getattr(self, name) != idle and (other := getattr(self, owner)) not in (wanted, None):
                left = "null" if idle is None else f"{idle:g}" if isinstance(idle, float) else idle
                raise ValueError(f"sample.{name}: belongs to sample.{owner}={wanted}; with {other} leave it at {left}")
        check(self, "sample", "lie in [0, 1e6]", lambda v: 0 <= v <= 1e6, "guidance", "classifier_scale")
        check_at_least(self, "sample", s_churn=0, s_min=0, sde_strength=0)
        rising = "be two rising numbers of at least 0"
        check(self, "sample", rising, lambda v: len(v) == 2 and 0 <= v[0] < v[1], "guidance_interval")
        check(self, "sample", "be at least 1 or null", lambda v: v >= 1, "guidance_channels")
        if self.s_max is not None and self.s_max <= self.s_min:
            raise ValueError(f"sample.s_max: must exceed sample.s_min={self.s_min:g} or be null, got {self.s_max:g}")
        for name, idle in (("s_min", 0), ("s_max", None), ("s_noise", 1)):
            if not self.s_churn and getattr(self, name) != idle:
                raise ValueError(f"sample.{name}: acts on the noise of sample.s_churn, which is 0")
        check(self, "sample", "lie between 0 and 1", lambda v: 0 < v < 1, "sde_last_step")
        if self.sde_diffusion == "constant" and self.sde_last == "mean" and self.sde_strength:
            raise ValueError(
                "sample.sde_last: mean leaves noise with sample.sde_diffusion=constant; choose tweedie or euler"
            )
        if self.clip and self.sampler == "dopri5":
            raise ValueError("sample.clip: dopri5 cannot clip the predicted image; leave it at null or false")

    def with_defaults(self, process: str, pixels: bool = True) -> "SampleConfig":
        """Fill in the process's default sampler and `clip`; ValueError if the sampler does not suit the process."""
        sampler = self.sampler or PAIRS[process][0]
        with located(key="sample.sampler"):
            check_pair(process, sampler)
        clip = pixels and sampler in ("ddpm", "ddim") if self.clip is None else self.clip
        return replace(self, sampler=sampler, clip=clip)  # type: ignore[arg-type]

    @property
    def guided(self) -> bool:
        """Whether samples differ from the plain conditional model's."""
        return self.guidance != 1 or (self.classifier is not None and self.classifier_scale != 0)

    def sampling_keys(self) -> dict[str, Any]:
        """Return key -> value for what the samples depend on; `batch_size` and a precision of 32-true are left out."""
        idle = {"batch_size"} | ({"precision"} if self.precision == "32-true" else set())
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in idle}

    def unguided(self) -> "SampleConfig":
        return replace(self, guidance=1.0, weak_model=None, classifier=None)

    def scored(self) -> "list[SampleConfig]":
        """Return the settings to score: without guidance and, if this config has any, also with it."""
        return [self.unguided(), *([self] if self.guided else [])]


@dataclass
class EvaluateConfig:
    """Scores of generated samples against real images, after training and optionally during it."""

    count: int = 500
    """Number of samples; their classes are those of the real images they are compared with."""
    extractor: str | None = None
    """digits-cnn, efficientnet-lite0, random-cnn, inception, or a custom package.module:function; null: digits-cnn for
    the digits; for other images efficientnet-lite0 if it is installed, else random-cnn."""
    weights: str | None = None
    """Weights file, for an extractor that needs one (inception)."""
    judge: str | None = None
    """Run folder of a classifier that checks whether samples match their labels. It sees samples and real images at the
    last noise level of its validation."""
    reference: Literal["same", "all"] = "same"
    """Training images to compare with: as many as there are samples, with equal class counts (same), or all of them."""
    infinity: bool = False
    """Also extrapolate the Fréchet distance to infinitely many samples: a diagnostic, from 5,000 samples up."""
    every_images: int | None = None
    """Images between distances measured during training (averaged weights, no guidance); null: none are measured."""
    every_count: int = 500
    """Number of samples per distance during training."""
    best: Literal["fd", "kid"] | None = None
    """Keep the averaged weights with the lowest such distance in best.safetensors; they are scored again at the end."""

    def __post_init__(self) -> None:
        check_at_least(self, "evaluate", count=20, every_count=20)
        if self.infinity and self.count < 5000:
            raise ValueError(f"evaluate.infinity: needs evaluate.count of at least 5000, got {self.count}")
        check(self, "evaluate", "be positive or null", lambda v: v > 0, "every_images")
        if self.best is not None and self.every_images is None:
            raise ValueError("evaluate.best: needs distances in training; allowed: null, or set evaluate.every_images")
