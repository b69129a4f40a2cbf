"""YAML with `base:` inheritance, plus key=value overrides, into plain dataclasses; every error names its key.

OmegaConf merges and checks types. What reaches the code is `RunConfig`, a tree of plain dataclasses. The sections
`data` and `denoiser` choose their dataclass by `name`, from the registries of data sources and of denoisers.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from diffbench.core.errors import UserError, suggest
from diffbench.data.sources import SOURCES
from diffbench.denoisers import DENOISERS
from diffbench.diffusion.process import VPConfig
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
            raise ValueError(f"format must be {FORMAT}, got {self.format}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.tag is not None and not self.tag.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise ValueError(f"tag may hold letters, digits, '-', '_' and '.', got {self.tag!r}")
        if self.sample.guidance != 1 and self.trainer.label_dropout == 0:
            raise ValueError(
                f"sample.guidance={self.sample.guidance} needs a null class: set trainer.label_dropout above 0"
            )


# Section -> its registry of dataclasses, chosen by the section's `name`.
REGISTRIES: dict[str, dict[str, type]] = {
    "data": {name: source.config for name, source in SOURCES.items()},
    "denoiser": {name: entry.config for name, entry in DENOISERS.items()},
}

SMOKE = """
trainer: {max_images: 16, batch_size: 8, log_images: 8, validate_images: 16, checkpoint_images: 8, sample_images: 16}
optimizer: {ramp_images: 0, decay_images: null}
sample: {steps: "2"}
evaluate: {count: 20}
"""


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, merges its bases and the overrides, checks everything.

    Args:
        path: the experiment's YAML.
        overrides: `key=value` arguments, dotted keys.

    Raises:
        UserError: one line that names the file and the key, and says what is allowed.
    """
    path = Path(path)
    raw = _read(path, ())
    changes = _override_tree(overrides)
    for section in REGISTRIES:
        name = _get(changes, f"{section}.name")
        if name is not None and name != _get(raw, f"{section}.name"):
            raw[section] = {}  # the keys of another network or data set do not carry over
    debug = _get(changes, "debug") or _get(raw, "debug")
    smoke = OmegaConf.create(SMOKE if debug == "smoke" else "{}")
    merged = OmegaConf.merge(raw, smoke, changes)
    assert isinstance(merged, DictConfig)
    _apply_preset(merged, path)
    return _build(merged, str(path), set(_leaves(OmegaConf.to_container(changes))))


def from_dict(values: dict[str, Any], origin: str) -> RunConfig:
    """The config of a run folder's config.yaml, already read; `origin` is named in errors."""
    return _build(OmegaConf.create(values), origin, set())


def apply_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A config with some keys changed, checked again; it must not change names of registered components."""
    changes = _override_tree(overrides)
    merged = OmegaConf.merge(OmegaConf.create(to_dict(config)), changes)
    assert isinstance(merged, DictConfig)
    return _build(merged, "config", set(_leaves(OmegaConf.to_container(changes))))


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """key=value arguments as a plain dictionary, values read as YAML reads them."""
    values = OmegaConf.to_container(_override_tree(overrides))
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}


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


def _read(path: Path, chain: tuple[Path, ...]) -> DictConfig:
    if path.resolve() in chain:
        names = " -> ".join(p.name for p in (*chain, path))
        raise UserError(f"{path}: base: the chain {names} returns to itself")
    if not path.is_file():
        named = f"{chain[-1]}: base: " if chain else ""
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) or experiments()
        allowed = f"choose from {', '.join(near)}" if near else "no experiment is near it"
        raise UserError(f"{named}no file {path}{suggest(str(path), near)}; {allowed}")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError) as e:
        raise UserError(f"{path}: not valid YAML: {_one_line(e)}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: the top level must be keys with values")
    base = loaded.pop("base", None)
    if base is None:
        return loaded
    if not isinstance(base, str):
        raise UserError(f"{path}: base must be the path of a YAML file, got {base!r}")
    parent = _read(path.parent / base, (*chain, path.resolve()))
    for section in REGISTRIES:
        name = _get(loaded, f"{section}.name")
        if name is not None and name != _get(parent, f"{section}.name"):
            parent[section] = {}
    merged = OmegaConf.merge(parent, loaded)
    assert isinstance(merged, DictConfig)
    return merged


def experiments(root: Path = Path("experiments")) -> list[str]:
    """The experiment YAMLs below a folder, but for shared bases (names that start with an underscore)."""
    return sorted(str(p) for p in root.glob("**/*.yaml") if not p.name.startswith("_"))


def _override_tree(overrides: Sequence[str]) -> DictConfig:
    for argument in overrides:
        name = argument.split("=", 1)[0]
        if "=" not in argument or argument.startswith("-") or not name:
            raise UserError(f"argument {argument!r}: write key=value, as in trainer.max_images=200_000")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as e:
        raise UserError(f"arguments {' '.join(overrides)!r}: {_one_line(e)}") from None


def _apply_preset(raw: DictConfig, path: Path) -> None:
    preset = _get(raw, "denoiser.preset")
    if preset is None:
        return
    name = str(_get(raw, "denoiser.name"))
    presets = DENOISERS[name].presets if name in DENOISERS else {}
    if preset not in presets:
        choices = ", ".join(presets) or f"none for denoiser.name={name}"
        raise UserError(
            f"{path}: denoiser.preset: unknown {preset!r}{suggest(str(preset), presets)}; choose from {choices}"
        )
    given = {k: v for k, v in raw["denoiser"].items() if k != "preset"}
    raw["denoiser"] = {**dataclasses.asdict(presets[preset]), **given}


def _build(raw: DictConfig, origin: str, overridden: set[str]) -> RunConfig:
    """Checks a merged config against the dataclasses and returns the plain tree."""

    def blame(key: str) -> str:
        return "command line" if key in overridden else origin

    plain = OmegaConf.to_container(raw)
    assert isinstance(plain, dict)
    schema = RunConfig()
    for section, registry in REGISTRIES.items():
        given = plain.get(section)
        key = f"{section}.name"
        name = given.get("name") if isinstance(given, dict) else None
        if name not in registry:
            said = f"unknown {name!r}{suggest(str(name), registry)}" if name else "missing"
            raise UserError(f"{blame(key)}: {key}: {said}; choose from {', '.join(registry)}")
        setattr(schema, section, _named(registry[name], name))
    _check_keys(plain, schema, "", blame)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), plain)
        OmegaConf.resolve(merged)
        config = OmegaConf.to_object(merged)
    except ValidationError as e:
        raise UserError(f"{blame(str(e.full_key))}: {e.full_key}: {_one_line(e)}") from None
    except OmegaConfBaseException as e:
        raise UserError(f"{origin}: {e.full_key or 'config'}: {_one_line(e)}") from None
    except ValueError as e:
        named = [k for k in overridden if k in str(e)]
        raise UserError(f"{'command line' if named else origin}: {_one_line(e)}") from None
    assert isinstance(config, RunConfig)
    return config


def _named(cls: type, name: str) -> Any:
    """An instance of a component's dataclass with the field `name` added, so that the choice is saved with it."""
    named = dataclasses.make_dataclass(cls.__name__, [("name", str, field(default=name))], bases=(cls,))
    return named()


def _check_keys(given: dict[Any, Any], schema: Any, prefix: str, blame: Any) -> None:
    """Refuses unknown keys with the nearest known one; reads whole floats such as 2e5 where an int is wanted."""
    known = {f.name: f for f in fields(schema)}
    for key, value in given.items():
        full = f"{prefix}{key}"
        if key not in known:
            raise UserError(f"{blame(full)}: unknown key {full}{suggest(str(key), known)}; allowed: {', '.join(known)}")
        target, kind = getattr(schema, key), known[key].type
        if is_dataclass(target):
            if not isinstance(value, dict):
                names = ", ".join(f.name for f in fields(target))
                raise UserError(f"{blame(full)}: {full} must hold keys ({names}), got {value!r}")
            _check_keys(value, target, f"{full}.", blame)
        elif isinstance(value, float) and value.is_integer() and int in (kind, *get_args(kind)):
            given[key] = int(value)
        elif get_origin(kind) is Literal and value not in get_args(kind):
            choices = [str(c) for c in get_args(kind)]
            raise UserError(
                f"{blame(full)}: {full}: {value!r} is unknown{suggest(str(value), choices)};"
                f" choose from {', '.join(choices)}"
            )


def _leaves(values: Any) -> Iterator[str]:
    yield from flatten(values)


def _get(config: DictConfig, key: str) -> Any:
    return OmegaConf.select(config, key, throw_on_missing=False)


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return " ".join(
        line.strip() for line in text if line.strip() and "full_key" not in line and "object_type" not in line
    )
