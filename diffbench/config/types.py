"""Conversion of values that a user wrote to the types that the config's dataclasses declare."""

import contextlib
import itertools
import re
import sys
import types
from typing import Any, Literal, Union, get_args, get_origin

from diffbench.core.errors import suggest


def convert(kind: Any, value: Any, key: str) -> Any:
    """Convert a value to the type that its key declares: 2e5 is valid as a whole number, and text stays as typed.

    Raises:
        ValueError: one line that begins with the key.
    """
    try:
        return _convert(kind, value)
    except _Mismatch:
        pass
    options = [kind, *get_args(kind)]
    choices = [str(c) for option in options if get_origin(option) is Literal for c in get_args(option)]
    if choices:
        choices += [_description(option) for option in options if option in (int, float, type(None))]
        near = suggest(str(value), choices)
        raise ValueError(f"{key}: unknown value {yaml_text(value)}; choose from {', '.join(choices)}{near}")
    raise ValueError(f"{key}: must be {_description(kind)}, got {yaml_text(value)}")


def yaml_text(value: Any) -> str:
    """Format a value roughly as YAML writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


class _Mismatch(Exception):
    pass


def _convert(kind: Any, value: Any) -> Any:
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for option in sorted(options, key=lambda o: o is str):  # text last: a number becomes text only if it must
            with contextlib.suppress(_Mismatch):
                return _convert(option, value)
    elif origin is Literal:
        if value in options and type(value) in map(type, options):
            return value
    elif origin is list:
        if isinstance(value, list):
            return [_convert(options[0], v) for v in value]
    elif origin is tuple:
        kinds = [options[0]] * len(value) if isinstance(value, list | tuple) and options[1:] == (...,) else options
        if isinstance(value, list | tuple) and len(value) == len(kinds):
            return tuple(itertools.starmap(_convert, zip(kinds, value, strict=True)))
    elif origin is dict:
        if isinstance(value, dict):
            return {str(k): _convert(options[1], v) for k, v in value.items()}
    elif kind is Any:
        return value
    elif kind is type(None):
        if value is None:
            return None
    elif kind not in (bool, int, float, str):  # other types come only from custom networks
        return value
    elif kind is bool:
        if isinstance(value, bool | str) and str(value).lower() in _BOOLS:
            return _BOOLS[str(value).lower()]
    elif kind is str and isinstance(value, bool):
        return str(value).lower()
    elif kind is str and isinstance(value, str | int | float) and _is_text(str(value)):
        return str(value)
    elif isinstance(value, bool):
        pass
    elif kind is int and (isinstance(value, int) or (isinstance(value, float) and _is_whole(value))):
        return int(value)
    elif kind is float and isinstance(value, int | float) and abs(value) <= sys.float_info.max:
        return float(value)
    raise _Mismatch


_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _is_text(text: str) -> bool:
    """Return whether a text can be UTF-8 and a file name: no NUL, no lone surrogate."""
    return "\0" not in text and not re.search("[\ud800-\udfff]", text)


def _is_whole(value: float) -> bool:
    return value.is_integer() and abs(value) < 2**53


def _description(kind: Any) -> str:
    """Describe a type in words."""
    options = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_description(option) for option in options)
    if get_origin(kind) is list:
        if options[0] is str:
            return "a list of text values, e.g. [a, 'b: c']"
        if get_origin(options[0]) is list:
            return "a list of lists, e.g. [[1, 2]]"
        return f"a list of {_description(options[0]).split(' ', 1)[1]}s, e.g. [1, 2]"
    if get_origin(kind) is dict:
        return "a section with keys"
    names = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
    return names.get(kind, "null")
