"""YAML with `base:` inheritance, plus key=value overrides, into plain dataclasses; every error names file and key.

OmegaConf reads YAML and resolves ${...}; `schema` checks. What reaches the code is the dataclass of the config's
`kind`, a tree of plain dataclasses; config_kinds.py holds them.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffbench.config import schema
from diffbench.config.kinds import DEFAULT_NAMES, KINDS, REGISTRIES, BaseConfig, keys_of
from diffbench.config.layers import (
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
from diffbench.denoisers import DENOISERS

C = TypeVar("C", bound=BaseConfig)

SMOKE: dict[str, dict[str, Any]] = {
    "trainer": {
        "max_images": 16,
        "batch_size": 8,
        "log_images": 8,
        "validate_images": 16,
        "checkpoint_images": 8,
        "sample_images": 16,
    },
    "optimizer": {"warmup_images": 0, "decay_images": None},
    "sample": {"steps": "2"},
    "evaluate": {"count": 20, "every_count": 20},
    "validation": {"count": 20},
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> BaseConfig:
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
    said: dict[str, Any] = {}
    for _, values in (*stack, (COMMAND_LINE, changes)):
        said |= {key: values[key] for key in ("debug", "kind") if key in values}
    if said.get("debug") == "smoke":
        with blaming(stack):
            known = keys_of(_root(said))
        stack.append((SMOKE_MODE, {section: values for section, values in SMOKE.items() if section in known}))
    return [*stack, (COMMAND_LINE, changes)]


def from_layers(stack: Sequence[Layer]) -> BaseConfig:
    """The checked config of layers, later ones on top: the dataclass of its `kind`, a `RunConfig` for denoisers."""
    merged: dict[str, Any] = {}
    for _, values in stack:
        for section in REGISTRIES:
            before, now = merged.get(section), values.get(section)
            # The sizes of another network or data set do not carry over, nor do sizes below a preset.
            if isinstance(before, dict) and isinstance(now, dict):
                name = before.get("name", DEFAULT_NAMES.get(section))
                if now.get("name", name) != name or now.get("preset") is not None:
                    merged[section] = {"name": name}
        merged = merge(merged, values)
    with blaming(stack):
        try:
            plain = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
        except OmegaConfBaseException as e:
            raise ValueError(f"{e.full_key or 'config'}: {one_line(e)}") from None
        assert isinstance(plain, dict)
        root = _root(plain)
        sections = [key for key in keys_of(root) if key in REGISTRIES]
        config = schema.build(root, plain, kinds={section: _chosen(plain, section) for section in sections})
    assert isinstance(config, BaseConfig)
    return config


def _root(values: dict[Any, Any]) -> type[BaseConfig]:
    """The dataclass of the config's kind."""
    kind = values.get("kind", "denoiser")
    if not isinstance(kind, str) or kind not in KINDS:
        near = suggest(str(kind), KINDS)
        raise ValueError(f"kind: unknown value {schema.shown(kind)}; choose from {', '.join(KINDS)}{near}")
    return KINDS[kind]


def from_dict(values: dict[str, Any], origin: str) -> BaseConfig:
    """The config of values already read; `origin` is named in errors."""
    return from_layers([(origin, values)])


def change(config: C, changes: dict[str, Any], origin: str = COMMAND_LINE) -> C:
    """A config with some values changed, checked again; `origin` of the changes is named in errors."""
    changed = from_layers([("config", to_dict(config)), (origin, changes)])
    assert isinstance(changed, type(config))
    return changed


def to_dict(config: BaseConfig) -> dict[str, Any]:
    """Plain dictionaries, lists, numbers and strings: what config.yaml and checkpoints hold."""
    return dataclasses.asdict(config)  # type: ignore[call-overload]


def to_yaml(config: BaseConfig) -> str:
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
    if section in DEFAULT_NAMES and (given is None or isinstance(given, dict)):
        given = values[section] = {"name": DEFAULT_NAMES[section]} | (given or {})
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
        values[section] = dataclasses.asdict(presets[preset].config) | given
    return _named(registry[name], name)


@cache
def _named(cls: type, name: str) -> type:
    """A component's dataclass with the field `name` added, so that the choice is saved with it."""
    return dataclasses.make_dataclass(cls.__name__, [("name", str, field(default=name))], bases=(cls,))
