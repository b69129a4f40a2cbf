"""From YAML and key=value arguments to checked dataclasses; every error names the file and the key.

`layers` reads, OmegaConf resolves ${...}, `build` checks. What reaches the code is a tree of plain dataclasses, whose
roots are in kinds.py.
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
from diffbench.config.kinds import DEFAULT_NAMES, KINDS, REGISTRIES, BaseConfig, RunConfig, kept_below, keys_of
from diffbench.config.layers import (
    COMMAND_LINE,
    SMOKE_MODE,
    Layer,
    located,
    parse_overrides,
    places,
    read_chain,
    stacked,
)
from diffbench.config.types import convert, shown
from diffbench.core.errors import suggest
from diffbench.denoisers import DENOISERS, foreign

C = TypeVar("C", bound=BaseConfig)
T = TypeVar("T")

LAPTOP = "laptop"
"""The preset of every backbone whose sizes follow the images; see `denoisers.laptop`."""
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
    """The layers of a config: its farthest base first, the command line last."""
    stack = read_chain(Path(path))
    changes = parse_overrides(overrides)
    said: dict[str, Any] = {}
    for _, values in (*stack, (COMMAND_LINE, changes)):
        said |= {key: values[key] for key in ("debug", "kind") if key in values}
    if said.get("debug") == "smoke":
        with located(stack):
            known = keys_of(_root(said))
        stack.append((SMOKE_MODE, {section: values for section, values in SMOKE.items() if section in known}))
    return [*stack, (COMMAND_LINE, changes)]


def from_layers(stack: Sequence[Layer]) -> BaseConfig:
    """The checked config of layers, later ones on top: the dataclass of its `kind`, a `RunConfig` for denoisers."""
    merged: dict[str, Any] = {}
    for _, values in stack:
        merged = kept_below(merged, values)
        with located(stack):
            merged = stacked(merged, values)
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
        raise ValueError(f"kind: unknown value {shown(kind)}; choose from {', '.join(KINDS)}{near}")
    return KINDS[kind]


def from_dict(values: dict[str, Any], origin: str) -> BaseConfig:
    """The config of values already read; `origin` is named in errors."""
    return from_layers([(origin, values)])


def change(config: C, changes: dict[str, Any], origin: str = COMMAND_LINE) -> C:
    """A config with some values changed, checked again; `origin` of the changes is named in errors.

    Clipping that followed from the sampler follows from the new one.
    """
    values, sample = to_dict(config), changes.get("sample")
    if isinstance(config, RunConfig) and isinstance(sample, dict):
        own = config.sample
        follows = dataclasses.replace(own, clip=None).settled(config.process.name, config.pixels)
        if sample.get("sampler", own.sampler) != own.sampler and own.clip == follows.clip:
            values["sample"]["clip"] = None
    changed = from_layers([("config", values), (origin, changes)])
    assert isinstance(changed, type(config))
    return changed


def to_dict(config: BaseConfig) -> dict[str, Any]:
    """Plain dictionaries, lists, numbers and strings: what config.yaml and checkpoints hold."""
    values = _values(config)
    return {key: values[key] for key in keys_of(type(config))}


def _values(value: Any) -> Any:
    """As `dataclasses.asdict`, without fields that are no arguments, which only a network from outside has."""
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
    """{"a": {"b": 1}} to {"a.b": 1}; lists are leaves."""
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _chosen(values: dict[Any, Any], section: str, stack: Sequence[Layer]) -> type:
    """The dataclass of a section's `name`; fills in its preset.

    A denoiser named package.module:Class is looked up beside the files of the layers, the last first.
    """
    registry, given = REGISTRIES[section], values.get(section)
    first = next(iter(registry))
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"{section}: must be a section with keys, got {shown(given)}; write {section}.name={first}")
    given = values[section] = {"name": DEFAULT_NAMES.get(section)} | (given or {})
    name = given["name"]
    outside = section == "denoiser" and isinstance(name, str) and ":" in name
    if not isinstance(name, str) or not (name in registry or outside):
        said = "missing" if name is None else f"unknown name {name!r}"
        near = "" if name is None else suggest(str(name), registry)
        others = ", or write package.module:Class" if section == "denoiser" else ""
        raise ValueError(f"{section}.name: {said}; choose from {', '.join(registry)}{others}{near}")
    preset = given.pop("preset", None)
    if preset is not None:
        presets = DENOISERS[name].presets if section == "denoiser" and not outside else {}
        if section == "denoiser" and preset == LAPTOP and not outside and (fitted := _laptop(values, name)) is not None:
            values[section] = fitted | given
            return _named(registry[name], name)
        if not isinstance(preset, str) or preset not in presets:
            allowed = f"choose from {', '.join([*presets, LAPTOP])}" if presets else f"{section}.name={name} has none"
            near = suggest(str(preset), presets)
            raise ValueError(f"{section}.preset: unknown preset {preset!r}; {allowed}{near}")
        values[section] = dataclasses.asdict(presets[preset].config) | given
    if not outside:
        return _named(registry[name], name)
    files = [Path(origin) for origin, _ in reversed(stack) if os.path.isfile(origin)]
    folders = list(dict.fromkeys(folder for file in files for folder in places(file))) or [Path.cwd()]
    values[section] = {"args": {}} | given  # a dataclass of its own may lack defaults
    found: type = foreign.section(name, given.get("code"), folders)
    return _named(found, name)


def _laptop(values: dict[Any, Any], name: str) -> dict[str, Any] | None:
    """The sizes of a denoiser for a laptop and these images; None for a denoiser that has none."""
    if values.get("autoencoder") is not None:
        raise ValueError(f"denoiser.preset: {LAPTOP} sizes a network by the image, not by latents of autoencoder")
    kind: type[Any] = _chosen(values, "data", ())
    data = build(kind, values["data"], "data.")
    sizes = DENOISERS[name].laptop
    return None if sizes is None else sizes(*data.shape[1:])


@cache
def _named(cls: type, name: str) -> type:
    """A component's dataclass with the field `name` added, so that the choice is saved with it."""
    return dataclasses.make_dataclass(cls.__name__, [("name", str, field(default=name))], bases=(cls,))


def build(cls: type[T], values: Mapping[str, Any], prefix: str = "", kinds: Mapping[str, Any] | None = None) -> T:
    """An instance of a dataclass, its sections included.

    `OmegaConf.structured` would check the types, but takes 'true' for text, 2 for true, NaN for a number and ??? for a
    missing key without a word, refuses 2e5 for a whole number, and names no key for some errors; a test shows each.

    Args:
        cls: the dataclass.
        values: what a user wrote for it; missing keys take their defaults.
        prefix: of the keys in messages, as "trainer.".
        kinds: types of fields that are only known now, such as the dataclass of the chosen denoiser.

    Raises:
        ValueError: a line that begins with the key, says what is wrong, and after "; " what is allowed.
    """
    hints = get_type_hints(cls) | dict(kinds or {})
    known = keys_of(cls)
    made = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in known:
            near = suggest(name, known) or _elsewhere(prefix, name)
            raise ValueError(f"{key}: unknown key; allowed: {', '.join(known)}{near}")
        kind = hints[name]
        if not dataclasses.is_dataclass(kind):
            made[name] = convert(kind, value, key)
        elif isinstance(value, dict):
            made[name] = build(kind, value, f"{key}.")  # type: ignore[arg-type]
        else:
            keys = ", ".join(keys_of(kind))
            raise ValueError(f"{key}: must be a section with keys, got {shown(value)}; allowed: {keys}")
    for field_ in dataclasses.fields(cls):  # type: ignore[arg-type]
        needed = field_.init and field_.default is field_.default_factory is dataclasses.MISSING
        if needed and field_.name not in made:
            raise ValueError(f"{prefix}{field_.name}: missing")
    return _from_outside(cls, made, prefix.rstrip(".")) if prefix.startswith("denoiser.args.") else cls(**made)


def _from_outside(cls: type[T], made: dict[str, Any], key: str) -> T:
    """An instance of the dataclass of a network from outside, which may raise whatever it likes.

    Raises:
        ValueError: if it does, or holds what config.yaml cannot.
    """
    with located(key=key):
        try:
            found = cls(**made)
        except ValueError:
            raise
        except Exception as e:
            raise ValueError(f"{cls.__name__} refuses these values ({type(e).__name__}: {e})") from None
    for name, value in _values(found).items():
        try:
            dump({name: value})
        except Exception:
            kind = type(value).__name__
            raise ValueError(
                f"{key}.{name}: {cls.__name__} holds a value of type {kind}; use what YAML holds: numbers, text, lists"
            ) from None
    return found


def _elsewhere(prefix: str, key: str) -> str:
    """A hint that other choices of a section have a key, as "; data.path is a key of data.name=images"."""
    section = prefix.rstrip(".")
    others = [name for name, kind in REGISTRIES.get(section, {}).items() if key in keys_of(kind)]
    return f"; {prefix}{key} is a key of {section}.name={' or '.join(others)}" if others else ""


def origins(stack: Sequence[Layer]) -> dict[str, str]:
    """Dotted key -> the last layer that sets it, as "experiments/digits/dit.yaml:7"; a default has none."""
    found: dict[str, str] = {}
    merged: dict[str, Any] = {}
    for origin, values in stack:
        lines = line_numbers(Path(origin).read_text("utf-8-sig")) if Path(origin).is_file() else {}
        merged = kept_below(merged, values)
        left = flatten(merged)
        found = {key: place for key, place in found.items() if key in left}
        merged = stacked(merged, values)
        found |= {key: f"{origin}:{lines[key]}" if key in lines else origin for key in flatten(values)}
    return found


def annotated(config: BaseConfig, stack: Sequence[Layer]) -> str:
    """The config as YAML, with the origin of each value in a comment."""
    known = origins(stack)
    lines: list[tuple[str, str]] = []

    def walk(values: dict[str, Any], prefix: str, indent: str) -> None:
        for name, value in values.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict) and value:
                lines.append((f"{indent}{name}:", ""))
                walk(value, f"{key}.", f"{indent}  ")
                continue
            text = dump_line(name, value)
            preset = known.get(f"{prefix}preset")
            lines.append((f"{indent}{text}", known.get(key) or (f"preset, {preset}" if preset else "default")))

    walk(to_dict(config), "", "")
    column = 2 + max((len(text) for text, _ in lines if len(text) <= 36), default=0)
    return "\n".join(f"{text:<{column - 2}}  # {origin}" if origin else text for text, origin in lines) + "\n"
