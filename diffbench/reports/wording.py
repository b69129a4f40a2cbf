"""Names and numbers for readers: what a metric is called, which way is better, and as many digits as mean something."""

import math

from diffbench.reports.statistics import Summary

_TITLES = {
    "val/error": "validation error",
    "fd": "Fréchet distance",
    "fid": "FID",
    "sfid": "spatial FID",
    "fd_held_out": "Fréchet distance to held-out images",
    "fd_gap": "gap of the Fréchet distances to held-out and training images",
    "kid": "kernel distance (KID)",
    "label_accuracy": "label accuracy",
    "inception_score": "Inception score",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "nearest_train": "distance to the nearest training image",
}
LOWER = ("val/error", "fd", "fid", "sfid", "fd_held_out", "fid_held_out", "fd_infinity", "fid_infinity", "kid")
HIGHER = ("label_accuracy", "inception_score", "precision", "recall", "density", "coverage")


def short(name: str) -> str:
    """A metric's name without its extractor and count: "fd/digits-cnn@500" is "fd"."""
    return name if name.startswith("val/") else name.split("/")[0].split("@")[0]


def title(name: str) -> str:
    """A metric's name in words; its extractor and count stand in the name itself."""
    return _TITLES.get(short(name), short(name).replace("_", " "))


def lower_is_better(name: str) -> bool:
    """Which way a metric points; unknown ones count as errors do."""
    return short(name) not in HIGHER


def is_frechet(name: str) -> bool:
    """Whether small gaps of the metric are ties by themselves."""
    return short(name).startswith(("fd", "fid", "sfid"))


def better(name: str) -> str:
    """ "lower is better" or "higher is better"; nothing of metrics that rank nobody."""
    known = short(name) in LOWER or short(name) in HIGHER
    return f"{'lower' if lower_is_better(name) else 'higher'} is better" if known else ""


def number(value: float, name: str = "", scale: float | None = None) -> str:
    """A value with the digits that its uncertainty `scale` leaves; four significant ones without it."""
    percent = short(name) == "label_accuracy"
    factor = 100 if percent else 1
    value, scale = value * factor, None if scale is None else scale * factor
    if not math.isfinite(value):
        return "-"
    scale = None if scale is None or scale <= 1e-9 * abs(value) else scale
    # Two digits of an uncertainty that begins with 1, 2 or 3, one from 4 on.
    size = scale / (10 if float(f"{scale:e}"[:3]) < 4 else 1) if scale else abs(value) / 1000
    decimals = min(8, max(0, -math.floor(math.log10(size)))) if size else 1 if percent else 4
    return f"{value:,.{decimals}f}{'%' if percent else ''}"


def spread(found: Summary, name: str) -> str:
    """Mean ± half of the 95% interval; the mean alone where there is none."""
    if found.half is None:
        return number(found.mean, name)
    unit = "%" if short(name) == "label_accuracy" else ""
    if found.half <= 1e-9 * abs(found.mean):
        return f"{number(found.mean, name).removesuffix('%')} ± 0{unit}"
    parts = [number(v, name, found.half).removesuffix("%") for v in (found.mean, found.half)]
    return f"{' ± '.join(parts)}{unit}"


def percent(share: float) -> str:
    """A confidence: 95%, 97.5%, 99.17%."""
    return f"{100 * share:.4g}%"


def listed(names: list[str]) -> str:
    """a, b and c; apart by semicolons where names have commas; of more than eight the first six."""
    names = names if len(names) <= 8 else [*names[:6], f"{len(names) - 6} more"]
    between = "; " if any("," in name for name in names) else ", "
    return names[0] if len(names) == 1 else f"{between.join(names[:-1])} and {names[-1]}" if names else ""


def counted(n: int, what: str) -> str:
    """1 seed, 3 seeds."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"
