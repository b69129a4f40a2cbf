"""YAML with `base:` inheritance, plus key=value overrides, into plain dataclasses; every error names file and key.

OmegaConf reads YAML and resolves ${...}; `schema` checks. What reaches the code is `RunConfig`, a tree of plain
dataclasses. The sections `data` and `denoiser` choose their dataclass by `name`, from the registries of data
sources and of denoisers.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffbench import schema
from diffbench.config_layers import (
    COMMAND_LINE,
    SMOKE_MODE,
    Layer,
    blaming,
    merge,
    one_line,
    parse_overrides,
    read_chain,
)
from diffbench.core.errors import suggest
from diffbench.data.sources import SOURCES
from diffbench.denoisers import DENOISERS
from diffbench.diffusion.process import DiscreteVP, VPConfig
from diffbench.diffusion.schedules import space_timesteps
from diffbench.training.settings import (
    EMAConfig,
    EvaluateConfig,
    OptimizerConfig,
    SampleConfig,
    TrainerConfig,
    ValidationConfig,
)

FORMAT = 1


@dataclass
class RunConfig:
    """One run. `data` and `denoiser` hold the dataclass of their `name`, with `name` as a field."""

    format: int = FORMAT
    kind: Literal["denoiser"] = "denoiser"
    seed: int = 0
    tag: str | None = None
    """Added to the run folder's name; overrides of anything but the length add one by themselves."""
    runs_dir: str = "runs"
    init_from: str | None = None
    """A run folder whose EMA weights start this run (a warm start, apart from resuming)."""
    debug: Literal["none", "smoke", "overfit"] = "none"
    """smoke: two steps of everything; overfit: learn one batch by heart."""
    data: Any = None
    denoiser: Any = None
    process: VPConfig = field(default_factory=VPConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format: must be {FORMAT}, got {self.format}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: must lie in 0 to 2^63 - 1, got {self.seed}")
        if self.tag is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.tag):
            raise ValueError(
                f"tag: {self.tag!r} is no name; allowed: up to 100 letters, digits, '-', '_' and '.', no sign first"
            )
        if not self.runs_dir:
            raise ValueError("runs_dir: must be a folder, got ''")
        if self.sample.guidance != 1 and self.trainer.label_dropout == 0:
            raise ValueError(
                f"sample.guidance: {self.sample.guidance:g} needs a null class, and trainer.label_dropout=0 trains"
                " none; allowed: sample.guidance=1, or trainer.label_dropout above 0"
            )
        self._check_against_process()

    def _check_against_process(self) -> None:
        total = self.process.steps
        try:
            space_timesteps(total, self.sample.steps)
        except ValueError as e:
            wanted = f"{self.sample.steps!r} does not fit process.steps={total}"
            raise ValueError(f"sample.steps: {wanted}: {e}") from None
        try:
            DiscreteVP(self.process).time_at(torch.tensor(self.validation.log_snr, dtype=torch.float64))
        except ValueError as e:
            raise ValueError(f"validation.log_snr: {e}") from None


# Section -> its registry of dataclasses, chosen by the section's `name`.
REGISTRIES: dict[str, dict[str, type]] = {
    "data": {name: source.config for name, source in SOURCES.items()},
    "denoiser": {name: entry.config for name, entry in DENOISERS.items()},
}

SMOKE = {
    "trainer": {
        "max_images": 16,
        "batch_size": 8,
        "log_images": 8,
        "validate_images": 16,
        "checkpoint_images": 8,
        "sample_images": 16,
    },
    "optimizer": {"ramp_images": 0, "decay_images": None},
    "sample": {"steps": "2"},
    "evaluate": {"count": 20},
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, merges its bases and the overrides, checks everything.

    Args:
        path: the experiment's YAML.
        overrides: `key=value` arguments, dotted keys.

    Raises:
        UserError: one line that names the file and the key, and says what is allowed.
    """
    return from_layers(read_layers(path, overrides))


def read_layers(path: str | Path, overrides: Sequence[str] = ()) -> list[Layer]:
    """What a config consists of: its farthest base first, the command line last."""
    stack = read_chain(Path(path))
    changes = parse_overrides(overrides)
    debug = [values["debug"] for values in (*(v for _, v in stack), changes) if "debug" in values]
    if debug and debug[-1] == "smoke":
        stack.append((SMOKE_MODE, SMOKE))
    return [*stack, (COMMAND_LINE, changes)]


def from_layers(stack: Sequence[Layer]) -> RunConfig:
    """The checked config of layers, later ones on top."""
    merged: dict[str, Any] = {}
    for _, values in stack:
        for section in REGISTRIES:
            before, now = merged.get(section), values.get(section)
            # The sizes of another network or data set do not carry over, nor do sizes below a preset.
            if isinstance(before, dict) and isinstance(now, dict):
                same = now.get("name", before.get("name")) == before.get("name")
                if not same or now.get("preset") is not None:
                    merged[section] = {"name": before.get("name")}
        merged = merge(merged, values)
    with blaming(stack):
        try:
            plain = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
        except OmegaConfBaseException as e:
            raise ValueError(f"{e.full_key or 'config'}: {one_line(e)}") from None
        assert isinstance(plain, dict)
        kinds = {section: _chosen(plain, section) for section in REGISTRIES}
        config = schema.build(RunConfig, plain, kinds=kinds)
    assert isinstance(config, RunConfig)
    return config


def from_dict(values: dict[str, Any], origin: str) -> RunConfig:
    """The config of values already read; `origin` is named in errors."""
    return from_layers([(origin, values)])


def change(config: RunConfig, changes: dict[str, Any], origin: str = COMMAND_LINE) -> RunConfig:
    """A config with some values changed, checked again; `origin` of the changes is named in errors."""
    return from_layers([("config", to_dict(config)), (origin, changes)])


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain dictionaries, lists, numbers and strings: what config.yaml and checkpoints hold."""
    return dataclasses.asdict(config)


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}; lists are leaves."""
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _chosen(values: dict[Any, Any], section: str) -> type:
    """The dataclass of a section's `name`; fills in its preset."""
    registry, given = REGISTRIES[section], values.get(section)
    first = next(iter(registry))
    if given is not None and not isinstance(given, dict):
        raise ValueError(
            f"{section}: must be a section with keys, got {schema.shown(given)}; write {section}.name={first}"
        )
    name = (given or {}).get("name")
    if not isinstance(name, str) or name not in registry:
        said = "missing" if name is None else f"unknown name {name!r}"
        near = "" if name is None else suggest(str(name), registry)
        raise ValueError(f"{section}.name: {said}; choose from {', '.join(registry)}{near}")
    assert given is not None
    preset = given.pop("preset", None)
    if preset is not None:
        presets = DENOISERS[name].presets if section == "denoiser" else {}
        if not isinstance(preset, str) or preset not in presets:
            allowed = f"choose from {', '.join(presets)}" if presets else f"{section}.name={name} has none"
            near = suggest(str(preset), presets)
            raise ValueError(f"{section}.preset: unknown preset {preset!r}; {allowed}{near}")
        values[section] = dataclasses.asdict(presets[preset]) | given
    return _named(registry[name], name)


@cache
def _named(cls: type, name: str) -> type:
    """A component's dataclass with the field `name` added, so that the choice is saved with it."""
    return dataclasses.make_dataclass(cls.__name__, [("name", str, field(default=name))], bases=(cls,))
