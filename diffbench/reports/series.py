"""What plots show of a conclusion: networks trained once, their curves over training, and sweeps of sampling."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffbench.reports.conclusions import Conclusion
from diffbench.reports.entries import Entry
from diffbench.reports.statistics import summary
from diffbench.reports.wording import short


@dataclass(frozen=True)
class Curve:
    """A metric of one network over training, seeds together.

    Attributes:
        images: (points,).
        flops: (points,) of training, or None where the network could not be counted.
        seconds: (points,) of training, the mean over seeds; None where they were not logged.
        values: (seeds, points).
    """

    images: np.ndarray
    flops: np.ndarray | None
    seconds: np.ndarray | None
    values: np.ndarray


def trained(c: Conclusion) -> dict[str, list[Entry]]:
    """Name -> results of what was trained apart; variants that only sample differently count once."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for variant, found in c.variants.items():
        groups.setdefault(_runs(found), []).append(variant)
    named: dict[str, list[Entry]] = {}
    for variants in groups.values():
        name = _common(variants) if len(variants) > 1 else variants[0]
        if not name:
            seen = c.variants[variants[0]][0].seen
            name = str(seen.flat.get("denoiser.name", "one network")) if seen else "one network"
        while name in named:
            name += "'"
        named[name] = c.variants[variants[0]]
    return named


def _common(names: Sequence[str]) -> str:
    """The parts between commas that names share."""
    parts = [name.split(", ") for name in names]
    return ", ".join(part for part in parts[0] if all(part in other for other in parts))


def curve(found: Sequence[Entry], name: str) -> Curve | None:
    """A metric over training for the images at which all begun seeds have it; None where there are fewer than two."""
    series = [{m["images"]: m[name] for m in e.seen.metrics if name in m} for e in found if e.seen is not None]
    kept = [(e, s) for e, s in zip([e for e in found if e.seen is not None], series, strict=True) if s]
    if not kept:
        return None
    shared = sorted(set.intersection(*(set(s) for _, s in kept)))
    if len(shared) < 2:
        return None
    images = np.array(shared, dtype=np.float64)
    values = np.array([[s[i] for i in shared] for _, s in kept])
    cost = next((e.cost for e, _ in kept if e.cost), None)
    lines = [e.seen.timeline for e, _ in kept if e.seen and e.seen.timeline]
    times = [np.interp(images, *np.array([(0.0, 0.0), *line]).T) for line in lines]
    return Curve(
        images,
        None if cost is None else cost.training_flops(1) * images,
        np.mean(times, axis=0) if times else None,
        values,
    )


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and 95% interval over seeds (seeds, points) at each point; of fewer than three seeds the mean alone."""
    found = [summary(column.tolist()) for column in values.T]
    mean = np.array([s.mean for s in found])
    half = np.array([s.half or 0.0 for s in found])
    return mean, mean - half, mean + half


def levels(found: Sequence[Entry]) -> tuple[list[float], dict[int, np.ndarray]]:
    """Log-SNRs, and seed -> validation error at each, of complete results."""
    prefix = "val/error_log_snr_"
    names: list[str] = next(
        ([n for n in e.values if n.startswith(prefix)] for e in found if e.complete and e.values), []
    )
    names.sort(key=lambda n: float(n.removeprefix(prefix)))
    rows = {
        e.result.seed: np.array([e.values[n] for n in names])
        for e in found
        if e.complete and all(n in e.values for n in names)
    }
    return [float(n.removeprefix(prefix)) for n in names], rows


@dataclass(frozen=True)
class Sweep:
    """Variants along one key of sampling.

    Attributes:
        key: "steps", "guidance" or "ema".
        label: of the axis, with its unit.
        lines: name -> [(place on the axis, variant), ...] in rising order.
        metrics: full names of what is drawn.
    """

    key: str
    label: str
    lines: dict[str, list[tuple[float, str]]]
    metrics: list[str]


def sweeps(c: Conclusion) -> list[Sweep]:
    """The keys of sampling along which variants of one network differ, with at least two places on a line."""
    axes: list[tuple[str, str, Callable[[dict[str, Any]], float | None]]] = [
        ("steps", "network evaluations a sample", lambda r: (r.get("drawing") or {}).get("network_evaluations")),
        ("guidance", "weight of guidance (1 is none)", lambda r: r.get("guidance")),
        ("ema", "steps averaged over, 1 / (1 - decay)", lambda r: 1 / (1 - r["ema"]) if r.get("ema", 1) < 1 else None),
    ]
    names = list(dict.fromkeys(n for found in c.summaries.values() for n in found if not n.startswith("val/")))
    metrics = [n for n in (c.metric,) if n in names]
    for wanted in ("fd", "fid", "label_accuracy", "recall", "coverage"):
        metrics += [n for n in names if short(n) == wanted and n not in metrics]
    found = []
    for key, label, place in axes:
        lines = _lines(c, key, place)
        if lines and metrics:
            found.append(Sweep(key, label, lines, metrics[:3]))
    return found


def _lines(
    c: Conclusion, key: str, place: Callable[[dict[str, Any]], float | None]
) -> dict[str, list[tuple[float, str]]]:
    groups: dict[tuple[Any, ...], list[tuple[float, str]]] = {}
    settings: dict[tuple[Any, ...], dict[str, Any]] = {}
    networks = {_runs(first): name for name, first in trained(c).items()}
    homes = {variant: networks[_runs(found)] for variant, found in c.variants.items()}
    for variant, found in c.variants.items():
        record = next((e.result.record for e in found if e.complete and e.result.record), None)
        at = None if record is None else place(record)
        if record is None or at is None:
            continue
        what = {"ema": record.get("ema"), **(record.get("sample") or {})}
        for passing in ("seed", "seconds", "batch_size", key):
            what.pop(passing, None)
        signature = (homes[variant], *sorted((k, str(v)) for k, v in what.items()))
        groups.setdefault(signature, []).append((float(at), variant))
        settings[signature] = {"network": homes[variant], **what}
    groups = {k: sorted(v) for k, v in groups.items() if len({at for at, _ in v}) > 1}
    differ = {k for s in groups for k, v in settings[s].items() if any(settings[o].get(k) != v for o in groups)}
    named = {}
    for signature, line in groups.items():
        told = [str(v) for k, v in settings[signature].items() if k in differ and k != "clip"]
        named[", ".join(told) or homes[line[0][1]]] = line
    return named


def _runs(found: Sequence[Entry]) -> tuple[str, ...]:
    """The run folders of a variant."""
    return tuple(sorted({str(e.result.folder) for e in found}))
