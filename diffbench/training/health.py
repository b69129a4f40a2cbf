"""Whether a run goes as its experiment's reference curves say, told once at 20% and once at 50% of training."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffbench.evaluation.curves import Band
from diffbench.metrics.registry import metric_of

MARKS = (0.2, 0.5)


def mark_between(before: int, now: int, total: int) -> float | None:
    """The share of training that was passed since `before` images, or None."""
    return next((mark for mark in MARKS if before < mark * total <= now), None)


def verdict(lines: Sequence[Mapping[str, Any]], bands: Mapping[str, Band], mark: float) -> list[str]:
    """Lines for the terminal: a warning for each metric whose newest value left its band, or one that all lie inside.

    Args:
        lines: of metrics.jsonl, so far.
        bands: metric -> its band.
        mark: the share of training that is done.
    """
    inside: list[str] = []
    outside: list[str] = []
    for name, band in bands.items():
        found = next(((line["images"], line[name]) for line in reversed(lines) if name in line), None)
        ends = band.at(found[0]) if found else None
        if found is None or ends is None:
            continue
        text = f"{metric_of(name).title} {found[1]:.4g}, band {ends[0]:.4g} to {ends[1]:.4g}"
        (inside if ends[0] <= found[1] <= ends[1] else outside).append(text)
    if outside:
        return [f"warning: at {mark:.0%}: {text}: something is wrong; see docs/health.md" for text in outside]
    return [f"at {mark:.0%}: as healthy runs are: {'; '.join(inside)}"] if inside else []
