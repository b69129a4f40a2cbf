"""The root dataclass of each `kind` of run, and the registries that sections choose from by `name`."""

import math
import os
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch

from diffbench.autoencoders import KLConfig
from diffbench.config.layers import located
from diffbench.config.sections import (
    DenoiserSeedsConfig,
    EMAConfig,
    EvaluateConfig,
    OptimizerConfig,
    SampleConfig,
    SeedsConfig,
    ValidationConfig,
)
from diffbench.config.trainer import DenoiserTrainerConfig, TrainerConfig, precision_here
from diffbench.core.errors import check_at_least
from diffbench.data.registry import SOURCES
from diffbench.denoisers import DENOISERS
from diffbench.denoisers.classifier import ClassifierConfig
from diffbench.denoisers.registry import takes_labels
from diffbench.diffusion import PROCESSES

FORMAT = 1

# Section -> its registry of dataclasses, chosen by the section's `name`.
REGISTRIES: dict[str, dict[str, type]] = {
    "data": {name: source.config for name, source in SOURCES.items()},
    "denoiser": {name: entry.config for name, entry in DENOISERS.items()},
    "process": {name: entry.config for name, entry in PROCESSES.items()},
}

DEFAULT_NAMES = {"process": "vp"}
"""Section -> the `name` it defaults to; in other sections `name` is required."""


def carried_over(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Drop values of the lower layer that the upper layer makes meaningless; return the others.

    Sizes do not carry over to another network or data set, nor to a preset; for averages see `_carried_averages`.
    """
    kept = dict(lower)
    for section in REGISTRIES:
        before, now = lower.get(section), upper.get(section)
        if isinstance(before, dict) and isinstance(now, dict):
            name = before.get("name", DEFAULT_NAMES.get(section))
            if now.get("name", name) != name or now.get("preset") is not None:
                kept[section] = {"name": name}
    if isinstance(lower.get("ema"), dict):
        kept["ema"] = _carried_averages(lower["ema"], upper)
    return kept


def _carried_averages(before: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Drop decays or half-lives if the upper layer sets the other of the two, and decays computed from a half-life if
    it sets the batch size."""
    now, trainer, dropped = upper.get("ema"), upper.get("trainer"), set()
    if isinstance(now, dict):
        given = {key for key in ("decays", "half_life") if now.get(key) is not None or (key in now and before.get(key))}
        dropped = {"decays", "half_life"} - given if len(given) == 1 else set()
    if isinstance(trainer, dict) and "batch_size" in trainer and before.get("half_life") and "half_life" not in dropped:
        dropped.add("decays")
    return {key: value for key, value in before.items() if key not in dropped}


LAST = ("optimizer", "ema", "trainer", "validation", "sample", "evaluate")
"""The sections at the end of every config.yaml, in this order; those of a kind's network come before them."""


@dataclass
class BaseConfig:
    """The keys that every kind of run has."""

    format: int = FORMAT
    kind: str = ""
    seed: int = 0
    """Seed of every source of randomness that `seeds` leaves at null."""
    seeds: SeedsConfig = field(default_factory=SeedsConfig)
    tag: str | None = None
    """Added to the run folder's name; overrides that change training add a tag automatically."""
    runs_dir: str = "runs"
    """Folder in which runs are stored."""
    debug: Literal["none", "smoke", "overfit"] = "none"
    """smoke: two steps of everything; overfit: train on a single batch."""
    data: Any = None
    """An instance of the dataclass that its `name` chooses, with `name` as a field."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format: must be {FORMAT}, got {self.format}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: must lie in [0, 2^63), got {self.seed}")
        if self.tag is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.tag):
            raise ValueError(
                f"tag: {self.tag!r} is not a valid name; allowed: up to 100 letters, digits, '-', '_' and '.', the"
                " first a letter or a digit"
            )
        if not self.runs_dir:
            raise ValueError("runs_dir: must be a folder, got ''")
        if self.optimizer.name == "muon" and self.trainer.strategy == "fsdp":
            raise ValueError(
                "optimizer.name: muon needs whole matrices, which trainer.strategy=fsdp shards; choose adamw, or ddp"
            )
        self.runs_dir = os.path.expanduser(self.runs_dir)  # shells leave ~ alone after an equals sign
        self.ema = self.ema.in_steps(self.trainer.batch_size)
        precision = precision_here(self.trainer, low=self.kind == "denoiser")
        self.trainer = replace(self.trainer, precision=precision)

    def seed_of(self, source: str) -> int:
        """Return the seed of a source of randomness, which is a field of `seeds`."""
        seed = getattr(self.seeds, source)
        return self.seed if seed is None else int(seed)


@dataclass
class RunConfig(BaseConfig):
    """A denoiser's run. `denoiser` and `process` are instances of the dataclasses that their `name` chooses."""

    kind: Literal["denoiser"] = "denoiser"
    init_from: str | None = None
    """Run folder whose EMA weights initialise this run (a warm start, not a resume)."""
    autoencoder: str | None = None
    """Autoencoder whose latents are denoised: a run folder, a folder in diffusers' format, a hub name, or an
    experiment's YAML file, whose run is trained first if it does not exist. null: denoise pixels."""
    latent_dtype: Literal["float16", "float32"] = "float16"
    """Data type of the stored latents (means and log-variances)."""
    denoiser: Any = None
    process: Any = None
    seeds: DenoiserSeedsConfig = field(default_factory=DenoiserSeedsConfig)
    trainer: DenoiserTrainerConfig = field(default_factory=DenoiserTrainerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.autoencoder == "":
            raise ValueError("autoencoder: must be a folder, a hub name, an experiment's YAML, or null; got ''")
        if self.autoencoder is None and self.latent_dtype != "float16":
            raise ValueError("latent_dtype: needs an autoencoder; without one leave it at float16")
        if self.autoencoder is not None and self.trainer.augment:
            raise ValueError("trainer.augment: augments images, not an autoencoder's latents; leave it at 0")
        self._check_guidance()
        call = getattr(self.denoiser, "call", None)
        if call is not None and call.t_as == "step" and self.process.name != "vp":
            raise ValueError(
                f"denoiser.call.t_as: step rounds the time to a step, and only process.name=vp has steps, not"
                f" {self.process.name}; choose time, noise_level or log_snr"
            )
        if self.trainer.time_sampling == "loss_aware":
            p = self.process
            if p.name != "vp":
                raise ValueError(
                    f"trainer.time_sampling: loss_aware needs the steps of process.name=vp, not {p.name};"
                    " choose uniform or stratified"
                )
            if p.times != "uniform" or p.shift != 1:
                raise ValueError(
                    "trainer.time_sampling: loss_aware replaces process.times and process.shift; leave them"
                    f" at uniform and 1, got {p.times} and {p.shift}"
                )
        shape = self.data.shape if self.autoencoder is None else None
        self.process = complete_process(self.process, self.pixels, shape)
        self._complete_sampler()
        check_levels(self.process, self.validation)

    @property
    def pixels(self) -> bool:
        """Whether the denoiser works on pixels in [-1, 1] and not on latents or other values."""
        return self.autoencoder is None and self.data.shape[0] in (1, 3)

    def _check_guidance(self) -> None:
        s = self.sample
        by_class = s.guidance != 1 and s.weak_model is None
        if by_class and self.trainer.label_dropout == 0:
            raise ValueError(
                f"sample.guidance: {s.guidance:g} needs a null class, but trainer.label_dropout=0 trains none;"
                " allowed: sample.guidance=1, trainer.label_dropout above 0, sample.weak_model=RUN,"
                " or sample.classifier=RUN with sample.guidance=1"
            )
        if by_class and not takes_labels(self.denoiser):
            raise ValueError(
                f"sample.guidance: {s.guidance:g} needs labels, but denoiser.call.y=null gives the network none;"
                " allowed: sample.guidance=1, sample.weak_model=RUN"
            )
        if s.guidance_schedule == "power_cosine" and self.process.name != "vp":
            raise ValueError(
                f"sample.guidance_schedule: power_cosine follows the steps of process.name=vp, not"
                f" {self.process.name}; choose constant"
            )

    def _complete_sampler(self) -> None:
        """Fill in the process's default sampler; raise ValueError if sampler or steps do not suit the process."""
        name = self.process.name
        s = self.sample = self.sample.with_defaults(name, pixels=self.pixels)
        if s.s_churn and name != "edm":
            raise ValueError(f"sample.s_churn: belongs to process.name=edm, not {name}; leave it at 0")
        process = PROCESSES[name].build(self.process)
        try:
            if s.sampler == "euler_maruyama":
                process.sde_grid(s.steps, s.sde_last_step)  # type: ignore[attr-defined]
            else:
                process.grid(s.steps)
        except ValueError as e:
            fixed = f"process.steps={self.process.steps}" if name == "vp" else f"process.name={name}"
            raise ValueError(f"sample.steps: {s.steps!r} does not fit {fixed}: {e}") from None


@dataclass
class ClassifierRunConfig(BaseConfig):
    """A run of a classifier of noisy images, for classifier guidance with the same process."""

    kind: Literal["classifier"] = "classifier"
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    process: Any = None
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.process = complete_process(self.process, pixels=True, shape=self.data.shape)
        check_levels(self.process, self.validation)


def complete_process(process: Any, pixels: bool, shape: tuple[int, int, int] | None) -> Any:
    """Fill in what a process's config takes from the data: `sigma_data` if it is used, and `shift` if it is null.

    Args:
        pixels: whether the data are pixels in [-1, 1].
        shape: (C, H, W), or None if it is not known yet; a shift of null is then a ValueError.
    """
    if process.sigma_data is None and "edm" in (process.name, process.weighting):
        process = replace(process, sigma_data=0.5 if pixels else 1.0)
    if process.shift is not None:
        return process
    if shape is None:
        raise ValueError("process.shift: null takes it from the image shape; with an autoencoder give a number")
    return replace(process, shift=math.sqrt(math.prod(shape) / 4096))


def check_levels(process: Any, validation: ValidationConfig) -> None:
    """Raise ValueError unless the process covers the noise levels of validation."""
    levels = torch.tensor(validation.log_snr, dtype=torch.float64)
    with located(key="validation.log_snr"):
        PROCESSES[process.name].build(process).time_at(levels)


def keys_of(kind: Any) -> list[str]:
    """List the keys of a dataclass in the order of config.yaml."""
    names = [f.name for f in fields(kind) if f.init]
    return [name for name in names if name not in LAST] + [name for name in LAST if name in names]


@dataclass
class NetworkConfig:
    """Sizes of an autoencoder to train; its image channels come from the data, its scaling factor from training."""

    latent_channels: int = 4
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    """Width of each level; n levels reduce each side by 2^(n-1)."""
    layers_per_block: int = 2
    norm_num_groups: int = 32
    """Groups of the group normalisation; must divide every width."""
    mid_block_add_attention: bool = True
    """Self-attention over all positions at the coarsest level."""

    def __post_init__(self) -> None:
        self.for_channels(1)

    def for_channels(self, channels: int) -> KLConfig:
        """Return the config of the network for images with this many channels."""
        try:
            return KLConfig(channels, channels, scaling_factor=1.0, **vars(self))
        except ValueError as e:
            raise ValueError(f"network.{e}") from None


@dataclass
class LossConfig:
    """Loss, summed over an image as in LDM: reconstruction + kl_weight * KL + perceptual_weight * perceptual."""

    reconstruction: Literal["l1", "l2"] = "l1"
    kl_weight: float = 1e-6
    """0: a plain autoencoder, whose latents have no variance."""
    perceptual: str | None = None
    """Extractor of the perceptual loss (mean squared difference of features, times the number of pixels)."""
    perceptual_weight: float = 1.0

    def __post_init__(self) -> None:
        check_at_least(self, "loss", kl_weight=0, perceptual_weight=0)


@dataclass
class AutoencoderConfig(BaseConfig):
    """An autoencoder's run."""

    kind: Literal["autoencoder"] = "autoencoder"
    network: NetworkConfig = field(default_factory=NetworkConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


KINDS: dict[str, type[BaseConfig]] = {
    "denoiser": RunConfig,
    "classifier": ClassifierRunConfig,
    "autoencoder": AutoencoderConfig,
}
