"""YAML whose scalars keep the text they were typed as, so that a key of type text gets `007` and not 7.

OmegaConf's loader cannot do that, because it parses numbers before the type of the key is known.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from diffbench.core.errors import UserError

MAX_VALUES, MAX_DEPTH = 100_000, 50
"""Limits of a YAML file: number of values, and levels of nesting."""


class Typed:
    """A number typed differently from how Python prints it, such as 007, 1e-4 or 200_000."""

    typed: str

    def __str__(self) -> str:
        return self.typed


class _Int(Typed, int):
    pass


class _Float(Typed, float):
    pass


_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?|\.(?=[0-9]))[0-9_]*([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_PLAIN: dict[str, Any] = {"true": True, "false": False} | dict.fromkeys(("", "~", "null", "Null", "NULL"))


def scalar(text: str) -> Any:
    """Parse an unquoted scalar: null, true, false, a number that keeps its text, or the text itself."""
    bare = text.strip()
    if bare in _PLAIN:
        return _PLAIN[bare]
    try:
        if _INT.fullmatch(bare):
            return _number(int(bare), _Int, text)
        if _FLOAT.fullmatch(bare):
            return _number(float(re.sub(r"\.(?=inf|nan)", "", bare.lower())), _Float, text)
    except ValueError:  # such as 1__0, or more digits than Python parses
        pass
    return text


def untyped(value: Any) -> Any:
    """Convert a value that has no declared type: true and false, in any capitalisation, become booleans."""
    return value.lower() == "true" if isinstance(value, str) and value.lower() in ("true", "false") else value


def _number(value: Any, kind: Callable[[Any], Any], text: str) -> Any:
    if str(value) == text:
        return value
    value = kind(value)
    value.typed = text
    return value


class _SafeLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A loader that keeps the text of scalars, and requires keys to be unique and text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                what = f"duplicate key {key.value}" if isinstance(key, yaml.ScalarNode) else "a key that is not text"
                raise yaml.constructor.ConstructorError(None, None, f"found {what}", key.start_mark)
            seen.add(key.value)
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}

    def construct_text(self, node: yaml.ScalarNode) -> Any:
        return node.value if node.style else scalar(node.value)


_SafeLoader.yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}
_SafeLoader.add_constructor("tag:yaml.org,2002:str", _SafeLoader.construct_text)


class _Dumper(yaml.SafeDumper):
    """A dumper whose output `_SafeLoader` reads back unchanged, including the text that numbers were typed as."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(_Int, lambda dumper, n: dumper.represent_scalar("tag:yaml.org,2002:int", n.typed))
_Dumper.add_representer(_Float, lambda dumper, n: dumper.represent_scalar("tag:yaml.org,2002:float", n.typed))


def dump(values: dict[str, Any]) -> str:
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def dump_line(key: str, value: Any) -> str:
    """Format a key and its value as one line of YAML."""
    text = yaml.dump({key: value}, Dumper=_Dumper, allow_unicode=True, default_flow_style=True, width=2**20)
    return text.strip()[1:-1]


def parse(text: str, where: str) -> Any:
    try:
        values = yaml.load(text, _SafeLoader)
        if sum(1 for _ in itertools.islice(_nodes(values), MAX_VALUES)) == MAX_VALUES:  # aliases of aliases
            raise ValueError("contains too many values")
        return values
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as e:
        raise UserError(f"{where}: not valid YAML: {_problem(e)}") from None


def line_numbers(text: str) -> dict[str, int]:
    """Map each dotted key to its line, counted from 1, in a YAML document that `parse` accepts."""
    lines: dict[str, int] = {}

    def walk(node: yaml.Node | None, prefix: str) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            lines[f"{prefix}{key.value}"] = key.start_mark.line + 1
            walk(value, f"{prefix}{key.value}.")

    walk(yaml.compose(text, _SafeLoader), "")
    return lines


def _nodes(value: Any, depth: int = 0) -> Iterator[Any]:
    if depth > MAX_DEPTH:
        raise RecursionError
    yield value
    if isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _nodes(child, depth + 1)


def _problem(error: Exception) -> str:
    """Return the message of a YAML error without its context."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
    return str(error).strip().split("\n")[0]
