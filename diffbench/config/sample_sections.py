"""The settings of what is drawn and measured, in training and after it; apart from that code, as `settings`."""

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from diffbench.denoisers.base import check_positive
from diffbench.diffusion import PAIRS, check_pair


@dataclass
class ValidationConfig:
    """Squared error of the denoised image on held-out images with fixed noise."""

    log_snr: list[float] = field(default_factory=lambda: [-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0])
    """Noise levels, log(alpha^2 / sigma^2)."""
    count: int = 2_000
    """Held-out images to use, spread evenly over the classes; all where there are fewer."""

    def __post_init__(self) -> None:
        check_positive(self, "count", section="validation")
        if not self.log_snr:
            raise ValueError("validation.log_snr: must name at least one level")


# Keys of one sampler alone: key, sampler, the value that does nothing with the others.
_OWNED: tuple[tuple[str, str, Any], ...] = (
    ("eta", "ddim", 0.0),
    ("s_churn", "heun", 0.0),
    ("sde_diffusion", "euler_maruyama", "sigma"),
    ("sde_strength", "euler_maruyama", 1.0),
    ("sde_last", "euler_maruyama", "mean"),
    ("sde_last_step", "euler_maruyama", 0.04),
    ("rtol", "dopri5", 1e-3),
    ("atol", "dopri5", 1e-6),
)


@dataclass
class SampleConfig:
    """How samples are drawn, in training and after it."""

    sampler: Literal["ddpm", "ddim", "euler", "heun", "dpm_solver", "euler_maruyama", "dopri5"] | None = None
    """null takes the process's first: ddpm for vp, heun for edm, euler for flow."""
    steps: str = "250"
    """Steps of the sampler: a number, and for vp also ddimN, or a list of sections like 10,15,20."""
    guidance: float = 1.0
    """Weight of classifier-free guidance where samples are guided; 1 is none."""
    guidance_schedule: Literal["constant", "power_cosine"] = "constant"
    """`power_cosine` raises the weight from 1 at the noisy end to `guidance` at the image (DiffiT)."""
    guidance_power: float = 4.0
    """The power of `power_cosine`."""
    guidance_interval: list[float] | None = None
    """Guidance for noise levels sigma / alpha in (low, high] alone (Kynkäänniemi et al. 2024)."""
    guidance_channels: int | None = None
    """How many channels are guided; null for all. The DiT and DiffiT releases guide three of four."""
    weak_model: str | None = None
    """Run folder of a weaker model to guide away from, instead of the null class: autoguidance (Karras et al. 2024)."""
    classifier: str | None = None
    """Run folder of a noise-aware classifier that guides besides (Dhariwal & Nichol 2021)."""
    classifier_scale: float = 1.0
    """Scale of the classifier's gradient; 1 is Bayes' rule, 0 none."""
    eta: float = 0.0
    """Noise of DDIM, 0 to 1; DDPM takes none."""
    variance: Literal["fixed_small", "fixed_large"] = "fixed_large"
    """Variance of DDPM's steps; a process with a learned variance uses that instead."""
    s_churn: float = 0.0
    """Heun on the edm process: noise added to each step and taken away by it, over all steps (EDM, Algorithm 2)."""
    s_min: float = 0.0
    """Least sigma at which noise is churned."""
    s_max: float | None = None
    """Largest sigma at which noise is churned; null for no bound."""
    s_noise: float = 1.0
    """Standard deviation of the churned noise."""
    sde_diffusion: Literal["sigma", "constant"] = "sigma"
    """Euler-Maruyama: how much noise the SDE of a flow adds over time."""
    sde_strength: float = 1.0
    """Euler-Maruyama: that noise times this; 0 is the ODE."""
    sde_last: Literal["mean", "tweedie", "euler"] = "mean"
    """Euler-Maruyama's last step: along the SDE's mean, to the predicted image, or along the velocity."""
    sde_last_step: float = 0.04
    """Size of Euler-Maruyama's last step, in the flow's time."""
    rtol: float = 1e-3
    """dopri5: relative error allowed in a step."""
    atol: float = 1e-6
    """dopri5: absolute error allowed in a step."""
    clip: bool | None = None
    """Clamp the predicted image to [-1, 1] at each step; null does so for ddpm and ddim on pixels, not on latents."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """bf16-mixed: the network's products in bfloat16."""
    cuda_graphs: bool = False
    """On a CUDA GPU, records the network's kernels once for each batch shape and replays them."""
    batch_size: int = 500

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "guidance_power", "rtol", "atol", "s_noise", section="sample")
        if not re.fullmatch(r"ddim\d+|\d+( *, *\d+)*", self.steps):
            raise ValueError(f"sample.steps: must be like 250, ddim25 or 10,15,20, got {self.steps!r}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"sample.eta: must lie in 0 to 1, got {self.eta}")
        for name, owner, idle in _OWNED:
            if getattr(self, name) != idle and self.sampler not in (owner, None):
                told = "null" if idle is None else f"{idle:g}" if isinstance(idle, float) else idle
                raise ValueError(
                    f"sample.{name}: belongs to sample.sampler={owner}; with {self.sampler} leave it at {told}"
                )
        for name in ("guidance", "classifier_scale", "s_churn", "s_min", "sde_strength"):
            if getattr(self, name) < 0:
                raise ValueError(f"sample.{name}: must be at least 0, got {getattr(self, name)}")
        ends = self.guidance_interval
        if ends is not None and not (len(ends) == 2 and 0 <= ends[0] < ends[1]):
            raise ValueError(f"sample.guidance_interval: must be two rising numbers of at least 0, got {ends}")
        if self.guidance_channels is not None and self.guidance_channels < 1:
            raise ValueError(f"sample.guidance_channels: must be at least 1 or null, got {self.guidance_channels}")
        if self.s_max is not None and self.s_max <= self.s_min:
            raise ValueError(f"sample.s_max: must exceed sample.s_min={self.s_min:g} or be null, got {self.s_max:g}")
        if not 0 < self.sde_last_step < 1:
            raise ValueError(f"sample.sde_last_step: must lie between 0 and 1, got {self.sde_last_step}")

    def settled(self, process: str, pixels: bool = True) -> "SampleConfig":
        """The same with the sampler that suits a process, and whether it clips, which only pixels do by default.

        Raises:
            ValueError: if the sampler does not suit the process.
        """
        sampler = self.sampler or PAIRS[process][0]
        try:
            check_pair(process, sampler)
        except ValueError as e:
            raise ValueError(f"sample.sampler: {e}") from None
        clip = pixels and sampler in ("ddpm", "ddim") if self.clip is None else self.clip
        return replace(self, sampler=sampler, clip=clip)  # type: ignore[arg-type]

    @property
    def guided(self) -> bool:
        """Whether samples differ from the plain conditional model's."""
        return self.guidance != 1 or (self.classifier is not None and self.classifier_scale != 0)

    def numbers(self) -> dict[str, Any]:
        """The keys on which samples depend: the others say how fast they come. A precision that is whole is not named,
        as by records older than the key."""
        idle = {"batch_size", "cuda_graphs"} | ({"precision"} if self.precision == "32-true" else set())
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in idle}

    def unguided(self) -> "SampleConfig":
        """The same without guidance."""
        return replace(self, guidance=1.0, weak_model=None, classifier=None)


@dataclass
class EvaluateConfig:
    """Scores of generated samples against real images, after training and, where asked for, in it."""

    count: int = 500
    """Samples, spread evenly over the classes."""
    extractor: str | None = None
    """digits-cnn, efficientnet-lite0, inception, or package.module:function of one's own; null takes digits-cnn for the
    digits and efficientnet-lite0, where it is installed, for other pictures."""
    weights: str | None = None
    """File of weights, for an extractor that reads one (inception)."""
    reference: Literal["same", "all"] = "same"
    """Training images to compare with: as many as samples, evenly over the classes; or all of them."""
    infinity: bool = False
    """Also extrapolates the Fréchet distance to infinitely many samples; a diagnostic, from 5,000 samples on."""
    every_images: int | None = None
    """Images between distances in training, of averaged weights without guidance; null for none."""
    every_count: int = 500
    """Samples of a distance in training."""
    best: Literal["fd", "kid"] | None = None
    """Keeps the averaged weights of the least such distance in best.safetensors, scored again at the end."""

    def __post_init__(self) -> None:
        for name in ("count", "every_count"):
            if getattr(self, name) < 20:
                raise ValueError(f"evaluate.{name}: must be at least 20, got {getattr(self, name)}")
        if self.infinity and self.count < 5000:
            raise ValueError(f"evaluate.infinity: needs evaluate.count of at least 5000, got {self.count}")
        if self.every_images is not None and self.every_images <= 0:
            raise ValueError(f"evaluate.every_images: must be positive or null, got {self.every_images}")
        if self.best is not None and self.every_images is None:
            raise ValueError("evaluate.best: needs distances in training; allowed: null, or set evaluate.every_images")
