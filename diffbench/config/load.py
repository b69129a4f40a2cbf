"""Loading of YAML and key=value arguments into checked dataclasses; every error names the file and the key.

`layers` reads, OmegaConf resolves ${...}, `build` checks. The result is a tree of plain dataclasses, whose roots are in
kinds.py.
"""

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from diffbench.config.documents import dump, dump_line, line_numbers
from diffbench.config.kinds import DEFAULT_NAMES, KINDS, REGISTRIES, BaseConfig, RunConfig, carried_over, keys_of
from diffbench.config.layers import (
    COMMAND_LINE,
    SMOKE_MODE,
    Layer,
    located,
    overlay,
    parse_overrides,
    read_chain,
    search_folders,
)
from diffbench.config.types import convert, yaml_text
from diffbench.core.errors import suggest
from diffbench.denoisers import DENOISERS, custom

C = TypeVar("C", bound=BaseConfig)
T = TypeVar("T")

LAPTOP = "laptop"
"""Name of the preset that sizes a backbone for a laptop and the shape of the images; see `denoisers.laptop`."""
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
    """Read a YAML file, merge its bases and the `key=value` overrides, and check everything.

    Raises:
        UserError: one line that names the file and the key, and says what is allowed.
    """
    return from_layers(read_layers(path, overrides))


def read_layers(path: str | Path, overrides: Sequence[str] = ()) -> list[Layer]:
    """Read the layers of a config: the root of its bases first, the command line last."""
    stack = read_chain(Path(path))
    changes = parse_overrides(overrides)
    mode: dict[str, Any] = {}
    for _, values in (*stack, (COMMAND_LINE, changes)):
        mode |= {key: values[key] for key in ("debug", "kind") if key in values}
    if mode.get("debug") == "smoke":
        with located(stack):
            known = keys_of(_root(mode))
        stack.append((SMOKE_MODE, {section: values for section, values in SMOKE.items() if section in known}))
    return [*stack, (COMMAND_LINE, changes)]


def from_layers(stack: Sequence[Layer]) -> BaseConfig:
    """Merge layers, later ones on top, into a checked config of the class of its `kind`: `RunConfig` for denoisers."""
    merged: dict[str, Any] = {}
    for _, values in stack:
        merged = carried_over(merged, values)
        with located(stack):
            merged = overlay(merged, values)
    with located(stack):
        plain = _resolved(merged)
        root = _root(plain)
        sections = [key for key in keys_of(root) if key in REGISTRIES]
        return build(root, plain, kinds={section: _chosen(plain, section, stack) for section in sections})


def _resolved(values: dict[str, Any]) -> dict[str, Any]:
    """Replace each ${key} by that key's value."""
    if "${" not in repr(values):
        return values
    from omegaconf import OmegaConf  # takes a quarter of a second, and few configs refer to other keys
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.create(values, flags={"allow_objects": True})
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as e:
        text = str(e).strip().split("\n")[0]
        raise ValueError(f"{e.full_key or 'config'}: {text}") from None


def _root(values: dict[Any, Any]) -> type[BaseConfig]:
    kind = values.get("kind", "denoiser")
    if not isinstance(kind, str) or kind not in KINDS:
        near = suggest(str(kind), KINDS)
        raise ValueError(f"kind: unknown value {yaml_text(kind)}; choose from {', '.join(KINDS)}{near}")
    return KINDS[kind]


def from_dict(values: dict[str, Any], origin: str) -> BaseConfig:
    """Build a config from values that have been read already; errors name `origin`."""
    return from_layers([(origin, values)])


def change(config: C, changes: dict[str, Any], origin: str = COMMAND_LINE) -> C:
    """Return a config with some values changed, checked again; errors name `origin` as the source of the changes.

    If `sample.clip` has the old sampler's default, changing the sampler resets it to the new one's.
    """
    values, sample = to_dict(config), changes.get("sample")
    if isinstance(config, RunConfig) and isinstance(sample, dict):
        old = config.sample
        default = dataclasses.replace(old, clip=None).with_defaults(config.process.name, config.pixels)
        if sample.get("sampler", old.sampler) != old.sampler and old.clip == default.clip:
            values["sample"]["clip"] = None
    changed = from_layers([("config", values), (origin, changes)])
    assert isinstance(changed, type(config))
    return changed


def to_dict(config: BaseConfig) -> dict[str, Any]:
    """Return a config as plain dictionaries, lists, numbers and strings, the form in config.yaml and checkpoints."""
    values = _values(config)
    return {key: values[key] for key in keys_of(type(config))}


def _values(value: Any) -> Any:
    """Convert dataclasses to dictionaries, also when nested, without fields with init=False (of custom networks)."""
    if dataclasses.is_dataclass(type(value)):
        return {f.name: _values(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, dict):
        return {key: _values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(map(_values, value))
    return copy.deepcopy(value)


def to_yaml(config: BaseConfig) -> str:
    return dump(to_dict(config))


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries: {"a": {"b": 1}} becomes {"a.b": 1}. Lists are leaves."""
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _chosen(values: dict[Any, Any], section: str, stack: Sequence[Layer]) -> type:
    """Return the dataclass of a section's `name`, and fill in the section's preset in `values`.

    A denoiser named package.module:Class is searched in the `search_folders` of the layers' files, the last one first.
    """
    registry, given = REGISTRIES[section], values.get(section)
    first = next(iter(registry))
    if given is not None and not isinstance(given, dict):
        raise ValueError(
            f"{section}: must be a section with keys, got {yaml_text(given)}; write {section}.name={first}"
        )
    given = values[section] = {"name": DEFAULT_NAMES.get(section)} | (given or {})
    name = given["name"]
    imported = section == "denoiser" and isinstance(name, str) and ":" in name
    if not isinstance(name, str) or not (name in registry or imported):
        problem = "missing" if name is None else f"unknown name {name!r}"
        near = "" if name is None else suggest(str(name), registry)
        others = ", or write package.module:Class" if section == "denoiser" else ""
        raise ValueError(f"{section}.name: {problem}; choose from {', '.join(registry)}{others}{near}")
    preset = given.pop("preset", None)
    if preset is not None:
        presets = DENOISERS[name].presets if section == "denoiser" and not imported else {}
        if section == "denoiser" and preset == LAPTOP and not imported and (sizes := _laptop(values, name)) is not None:
            values[section] = sizes | given
            return _named(registry[name], name)
        if not isinstance(preset, str) or preset not in presets:
            allowed = f"choose from {', '.join([*presets, LAPTOP])}" if presets else f"{section}.name={name} has none"
            near = suggest(str(preset), presets)
            raise ValueError(f"{section}.preset: unknown preset {preset!r}; {allowed}{near}")
        values[section] = dataclasses.asdict(presets[preset].config) | given
    if not imported:
        return _named(registry[name], name)
    files = [Path(origin) for origin, _ in reversed(stack) if os.path.isfile(origin)]
    folders = list(dict.fromkeys(folder for file in files for folder in search_folders(file))) or [Path.cwd()]
    values[section] = {"args": {}} | given  # so that `build` names the args that have no default
    found: type = custom.section(name, given.get("code"), folders)
    return _named(found, name)


def _laptop(values: dict[Any, Any], name: str) -> dict[str, Any] | None:
    """Return a denoiser's sizes for a laptop and these images; None if it has no laptop preset."""
    if values.get("autoencoder") is not None:
        raise ValueError(f"denoiser.preset: {LAPTOP} sizes a network for images, not for an autoencoder's latents")
    kind: type[Any] = _chosen(values, "data", ())
    data = build(kind, values["data"], "data.")
    sizes = DENOISERS[name].laptop
    return None if sizes is None else sizes(*data.shape[1:])


@cache
def _named(cls: type, name: str) -> type:
    """Add the field `name` to a component's dataclass, so that the choice is saved with it."""
    return dataclasses.make_dataclass(cls.__name__, [("name", str, field(default=name))], bases=(cls,))


def build(cls: type[T], values: Mapping[str, Any], prefix: str = "", kinds: Mapping[str, Any] | None = None) -> T:
    """Build a dataclass, with its sections, from what a user wrote; check its keys and the types of their values.

    `OmegaConf.structured` checks types too, but silently changes text (007 to 7, on to True), accepts 2 as true and NaN
    as a number, drops ???, refuses 2e5 as a whole number, and names no key in some errors; a test shows each.

    Args:
        cls: the dataclass.
        values: what a user wrote for it; missing keys take their defaults.
        prefix: text put before keys in messages, such as "trainer.".
        kinds: types of fields that are not declared, such as the dataclass of the chosen denoiser.

    Raises:
        ValueError: one line with the key, what is wrong, and after "; " what is allowed.
    """
    hints = get_type_hints(cls) | dict(kinds or {})
    known = keys_of(cls)
    arguments = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in known:
            near = suggest(name, known) or _elsewhere(prefix, name)
            raise ValueError(f"{key}: unknown key; allowed: {', '.join(known)}{near}")
        kind = hints[name]
        if not dataclasses.is_dataclass(kind):
            arguments[name] = convert(kind, value, key)
        elif isinstance(value, dict):
            arguments[name] = build(kind, value, f"{key}.")  # type: ignore[arg-type]
        else:
            keys = ", ".join(keys_of(kind))
            raise ValueError(f"{key}: must be a section with keys, got {yaml_text(value)}; allowed: {keys}")
    for field_ in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = field_.init and field_.default is field_.default_factory is dataclasses.MISSING
        if required and field_.name not in arguments:
            raise ValueError(f"{prefix}{field_.name}: missing")
    return _custom_args(cls, arguments, prefix.rstrip(".")) if prefix.startswith("denoiser.args.") else cls(**arguments)


def _custom_args(cls: type[T], arguments: dict[str, Any], key: str) -> T:
    """Build the dataclass of a custom network, which may raise any exception.

    Raises:
        ValueError: if it raises one, or has a value that config.yaml cannot store.
    """
    with located(key=key):
        try:
            config = cls(**arguments)
        except ValueError:
            raise
        except Exception as e:
            raise ValueError(f"{cls.__name__} refuses these values ({type(e).__name__}: {e})") from None
    for name, value in _values(config).items():
        try:
            dump({name: value})
        except Exception:
            kind = type(value).__name__
            raise ValueError(
                f"{key}.{name}: {cls.__name__} has a value of type {kind}; use what YAML can hold: numbers, text, lists"
            ) from None
    return config


def _elsewhere(prefix: str, key: str) -> str:
    """Return a hint that other choices of a section have a key: "; data.path is a key of data.name=images"."""
    section = prefix.rstrip(".")
    others = [name for name, kind in REGISTRIES.get(section, {}).items() if key in keys_of(kind)]
    return f"; {prefix}{key} is a key of {section}.name={' or '.join(others)}" if others else ""


def origins(stack: Sequence[Layer]) -> dict[str, str]:
    """Map each dotted key, unless it is a default, to what set it last, such as "experiments/digits/dit.yaml:7"."""
    found: dict[str, str] = {}
    merged: dict[str, Any] = {}
    for origin, values in stack:
        lines = line_numbers(Path(origin).read_text("utf-8-sig")) if Path(origin).is_file() else {}
        merged = carried_over(merged, values)
        remaining = flatten(merged)
        found = {key: place for key, place in found.items() if key in remaining}
        merged = overlay(merged, values)
        found |= {key: f"{origin}:{lines[key]}" if key in lines else origin for key in flatten(values)}
    return found


def annotated(config: BaseConfig, stack: Sequence[Layer]) -> str:
    """Format a config as YAML, with the origin of each value in a comment."""
    found = origins(stack)
    lines: list[tuple[str, str]] = []

    def walk(values: dict[str, Any], prefix: str, indent: str) -> None:
        for name, value in values.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict) and value:
                lines.append((f"{indent}{name}:", ""))
                walk(value, f"{key}.", f"{indent}  ")
                continue
            text = dump_line(name, value)
            preset = found.get(f"{prefix}preset")
            lines.append((f"{indent}{text}", found.get(key) or (f"preset, {preset}" if preset else "default")))

    walk(to_dict(config), "", "")
    column = 2 + max((len(text) for text, _ in lines if len(text) <= 36), default=0)
    return "\n".join(f"{text:<{column - 2}}  # {origin}" if origin else text for text, origin in lines) + "\n"
