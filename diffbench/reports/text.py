"""Numbers and lists in words, with as many digits as mean something."""

import math
from collections.abc import Sequence

from diffbench.metrics.registry import metric_of
from diffbench.reports.statistics import Paired, Summary


def number(value: float, name: str = "", scale: float | None = None) -> str:
    """A value of a metric with the digits that its uncertainty `scale` leaves; four significant ones without it."""
    percent = metric_of(name).percent
    factor = 100 if percent else 1
    value, scale = value * factor, None if scale is None else scale * factor
    if not math.isfinite(value):
        return "-"
    scale = None if scale is None or scale <= 1e-9 * abs(value) else scale
    # Two digits of an uncertainty that begins with 1, 2 or 3, one from 4 on.
    size = scale / (10 if float(f"{scale:e}"[:3]) < 4 else 1) if scale else abs(value) / 1000
    decimals = min(8, max(0, -math.floor(math.log10(size)))) if size else 1 if percent else 4
    return f"{value:,.{decimals}f}{'%' if percent else ''}"


def mean_text(found: Summary, name: str) -> str:
    """Mean ± half of the 95% interval; the mean alone where there is none."""
    if found.half is None:
        return number(found.mean, name)
    unit = "%" if metric_of(name).percent else ""
    if found.half <= 1e-9 * abs(found.mean):
        return f"{number(found.mean, name).removesuffix('%')} ± 0{unit}"
    parts = [number(v, name, found.half).removesuffix("%") for v in (found.mean, found.half)]
    return f"{' ± '.join(parts)}{unit}"


def interval_text(pair: Paired, name: str) -> str:
    """The interval of a difference, "-0.0071 to -0.0045"; in words where there is none."""
    if pair.interval is None:
        return f"none: {counted(pair.n, 'shared seed')}"
    return " to ".join(number(end, name, pair.half) for end in pair.interval)


def percent(share: float) -> str:
    """A confidence: 95%, 97.5%, 99.17%."""
    return f"{100 * share:.4g}%"


def listed(names: Sequence[str]) -> str:
    """a, b and c; separated by semicolons where names have commas; of more than eight the first six."""
    names = names if len(names) <= 8 else [*names[:6], f"{len(names) - 6} more"]
    between = "; " if any("," in name for name in names) else ", "
    return names[0] if len(names) == 1 else f"{between.join(names[:-1])} and {names[-1]}" if names else ""


def counted(n: int, what: str) -> str:
    """1 seed, 3 seeds."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"
