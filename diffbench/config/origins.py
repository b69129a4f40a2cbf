"""Where each value of a config comes from: a line of a file, the command line, a preset, or a default."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffbench.config.documents import dump_line, line_numbers
from diffbench.config.kinds import BaseConfig, kept_below
from diffbench.config.layers import Layer, stacked
from diffbench.config.load import flatten, to_dict


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
