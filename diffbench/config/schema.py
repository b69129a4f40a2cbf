"""Plain values against dataclasses: the first unknown key, wrong type or value out of range is one error.

Every message begins with its key, says what is wrong, then after "; " what is allowed and what comes nearest.
"""

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from diffbench.core.errors import suggest


def build(cls: type, values: Mapping[Any, Any], prefix: str = "", kinds: Mapping[str, Any] | None = None) -> Any:
    """An instance of a dataclass, sections inside included.

    Args:
        cls: the dataclass.
        values: what a user wrote for it; missing keys take their defaults.
        prefix: of the keys in messages, as "trainer.".
        kinds: types of fields that are only known now, such as the dataclass of the chosen denoiser.

    Raises:
        ValueError: a line that begins with the key.
    """
    hints = get_type_hints(cls) | dict(kinds or {})
    known = [f.name for f in fields(cls)]
    made = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in known:
            raise ValueError(f"{key}: unknown key; allowed: {', '.join(known)}{suggest(str(name), known)}")
        kind = hints[name]
        if not is_dataclass(kind):
            made[name] = convert(kind, value, key)
        elif isinstance(value, dict):
            made[name] = build(kind, value, f"{key}.")  # type: ignore[arg-type]
        else:
            keys = ", ".join(f.name for f in fields(kind))
            raise ValueError(f"{key}: must be a section with keys, got {shown(value)}; allowed: {keys}")
    return cls(**made)


def convert(kind: Any, value: Any, key: str) -> Any:
    """A value as the type asked for: whole floats such as 2e5 serve as integers, numbers as text.

    Raises:
        ValueError: a line that begins with the key.
    """
    try:
        return _convert(kind, value)
    except _Mismatch:
        pass
    choices = [str(c) for c in get_args(kind)] if get_origin(kind) is Literal else []
    if choices:
        near = suggest(str(value), choices)
        raise ValueError(f"{key}: unknown value {shown(value)}; choose from {', '.join(choices)}{near}")
    raise ValueError(f"{key}: must be {_wanted(kind)}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value as YAML writes it, near enough."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


class _Mismatch(Exception):
    pass


def _convert(kind: Any, value: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(option, value)
            except _Mismatch:
                continue
    elif origin is Literal:
        if value in arguments and type(value) in map(type, arguments):
            return value
    elif origin is list:
        if isinstance(value, list):
            return [_convert(arguments[0], v) for v in value]
    elif origin is dict:
        if isinstance(value, dict):
            return {str(k): _convert(arguments[1], v) for k, v in value.items()}
    elif kind is Any:
        return value
    elif kind is type(None):
        if value is None:
            return None
    elif isinstance(value, bool):
        if kind is bool:
            return value
    elif kind is int and (isinstance(value, int) or (isinstance(value, float) and _whole(value))):
        return int(value)
    elif kind is float and isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    elif kind is str and isinstance(value, str | int | float) and "\0" not in str(value):
        return str(int(value) if isinstance(value, float) and _whole(value) else value)
    raise _Mismatch


def _whole(value: float) -> bool:
    return value.is_integer() and abs(value) < 2**53


def _wanted(kind: Any) -> str:
    """A type in words."""
    arguments = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_wanted(a) for a in arguments)
    if get_origin(kind) is list:
        if arguments[0] is str:
            return "a list of texts (in quotes where YAML reads them otherwise), as [a, 'b: c']"
        return f"a list of {_wanted(arguments[0]).split(' ', 1)[1]}s, as [1, 2]"
    if get_origin(kind) is dict:
        return "a section with keys of its own"
    words = {int: "a whole number", float: "a finite number", str: "text (in quotes where YAML reads it otherwise)"}
    return words.get(kind, "true or false" if kind is bool else "null")
