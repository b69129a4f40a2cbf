"""Keys with their defaults and descriptions, read from the dataclasses' source so that `--help` needs no torch."""

import ast
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
SECTIONS = ("config/sections.py", "config/trainer.py")
IN_TRAINING = ("every_images", "every_count", "best")
"""Keys of `evaluate` that act during training, and so stay fixed once a run is complete."""
FIXED = ("format", "kind")
"""Keys that are in files but aren't settings, so that `--help` leaves them out."""


@dataclass(frozen=True)
class Key:
    """A key as `--help` shows it: its dotted name, its default as YAML, its choices, and what it does."""

    name: str
    default: str
    choices: tuple[str, ...]
    text: str


def read_keys(place: str, prefix: str = "") -> list[Key]:
    """Return the keys of a dataclass, including those of its sections and its base class.

    Args:
        place: file in the package and class, such as "config/kinds.py:RunConfig".
        prefix: text put before each name, such as "sample.".
    """
    file, _, name = place.partition(":")
    classes = {name: node for part in (*SECTIONS, file) for name, node in _classes(part).items()}
    keys = {key.name: key for key in _keys(classes, name, prefix)}  # a subclass's key replaces its base's
    sections = list(dict.fromkeys(key.rpartition(".")[0] for key in keys))
    return sorted(keys.values(), key=lambda key: sections.index(key.name.rpartition(".")[0]))


def _classes(file: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse((PACKAGE / file).read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _keys(classes: dict[str, ast.ClassDef], name: str, prefix: str) -> Iterator[Key]:
    node = classes[name]
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _keys(classes, base.id, prefix)
    for line, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name) or line.target.id in FIXED:
            continue
        key = f"{prefix}{line.target.id}"
        section = next((n.id for n in ast.walk(line.annotation) if isinstance(n, ast.Name) and n.id in classes), None)
        if section:
            yield from _keys(classes, section, f"{key}.")
        elif ast.unparse(line.annotation) == "Any":
            yield Key(f"{key}.name", "", (), f"The {line.target.id} to use; `diffbench show CONFIG` prints its keys.")
        else:
            yield Key(key, _default(line.value), _choices(line.annotation), _text(after))


def _text(node: ast.stmt | None) -> str:
    """Return the docstring below a field, or an empty string."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


def _choices(annotation: ast.expr) -> tuple[str, ...]:
    if any(isinstance(n, ast.Name) and n.id in ("int", "float", "str") for n in ast.walk(annotation)):
        return ()  # other values are allowed too, as the description says
    literals = (n for n in ast.walk(annotation) if isinstance(n, ast.Subscript) and ast.unparse(n.value) == "Literal")
    values = [ast.literal_eval(n.slice) for n in literals]
    return tuple(str(v) for group in values for v in (group if isinstance(group, tuple) else (group,)))


def _default(node: ast.expr | None) -> str:
    """Format a default as YAML writes it."""
    if isinstance(node, ast.Call):  # field(default_factory=...)
        factory = next(k.value for k in node.keywords if k.arg == "default_factory")
        factory = factory.body if isinstance(factory, ast.Lambda) else factory
        return {"dict": "{}", "list": "[]"}.get(text := ast.unparse(factory), text)
    if not isinstance(node, ast.Constant):
        return ast.unparse(node) if node else ""
    if node.value is None or isinstance(node.value, bool):
        return {None: "null", True: "true", False: "false"}[node.value]
    return f"{node.value:_}" if isinstance(node.value, int) else str(node.value)


def key_lines(keys: Sequence[Key], width: int) -> Iterator[str]:
    """Yield one or more lines per key: name=default on the left, its description on the right."""
    column = 30
    for key in keys:
        left = f"  {key.name}={key.default}"
        text = " ".join(filter(None, (f"({' | '.join(key.choices)})" if key.choices else "", key.text)))
        lines = textwrap.wrap(text, max(20, width - column))
        if len(left) + 2 > column or not lines:
            yield left
        else:
            yield f"{left:<{column}}{lines.pop(0)}"
        yield from (" " * column + line for line in lines)
