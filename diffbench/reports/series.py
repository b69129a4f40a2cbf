"""The data behind plots: distinct networks, their curves over training, and sweeps over a key."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffbench.metrics.registry import metric_of
from diffbench.reports.conclusions import Conclusion
from diffbench.reports.results import Trial, levels_of, network_key


@dataclass(frozen=True)
class Curve:
    """A metric of one network over training, for all its seeds.

    Attributes:
        images: (points,) training images.
        flops: (points,) training FLOPs; None if they could not be counted.
        seconds: (points,) seconds of training, averaged over seeds; None if they were not logged.
        values: (seeds, points) values of the metric.
    """

    images: np.ndarray
    flops: np.ndarray | None
    seconds: np.ndarray | None
    values: np.ndarray


def networks(c: Conclusion) -> dict[str, list[Trial]]:
    """Return name -> trials of each network; variants that only sample it differently count once."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for variant, trials in c.variants.items():
        groups.setdefault(network_key(trials), []).append(variant)
    named: dict[str, list[Trial]] = {}
    for variants in groups.values():
        first, *others = (variant.split(", ") for variant in variants)
        run = c.variants[variants[0]][0].run
        name = ", ".join(part for part in first if all(part in other for other in others))
        name = name or str(run.flat.get("denoiser.name") if run else "one network")
        while name in named:
            name += "'"
        named[name] = c.variants[variants[0]]
    return named


def curve(trials: Sequence[Trial], name: str) -> Curve | None:
    """Return a metric over training at the image counts that all its seeds share; None if there are fewer than two."""
    logged = [(t, {m["images"]: m[name] for m in t.run.metrics if name in m}) for t in trials if t.run is not None]
    logged = [(t, values) for t, values in logged if values]
    shared = sorted(set.intersection(*(set(values) for _, values in logged))) if logged else []
    if len(shared) < 2:
        return None
    images = np.array(shared, dtype=np.float64)
    cost = next((t.cost for t, _ in logged if t.cost), None)
    timelines = [t.run.timeline for t, _ in logged if t.run and t.run.timeline]
    times = [np.interp(images, *np.array([(0.0, 0.0), *line]).T) for line in timelines]
    return Curve(
        images,
        None if cost is None else cost.training_flops(1) * images,
        np.mean(times, axis=0) if times else None,
        np.array([[values[i] for i in shared] for _, values in logged]),
    )


def noise_levels(trials: Sequence[Trial], part: str = "val") -> tuple[list[float], dict[int, np.ndarray]]:
    """Return log-SNRs and seed -> squared error of eps at each, for complete trials on "val" or "train" images."""
    complete = [t for t in trials if t.complete and t.values]
    levels = levels_of(complete[0].values, part) if complete else {}
    rows = {t.seed: np.array([t.values[n] for n in levels]) for t in complete if levels.keys() <= t.values.keys()}
    return list(levels.values()), rows


def shared_levels(trained: dict[str, list[Trial]]) -> tuple[list[float], dict[str, dict[int, np.ndarray]]]:
    """Return two or more log-SNRs, and network -> seed -> errors for the networks measured at exactly these levels."""
    found = {name: noise_levels(trials) for name, trials in trained.items()}
    found = {name: (at, rows) for name, (at, rows) in found.items() if rows and len(at) > 1}
    at = next((at for at, _ in found.values()), [])
    return at, {name: rows for name, (own, rows) in found.items() if own == at}


def above_least(levels: dict[str, dict[int, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return network -> percent by which its error, averaged over seeds, exceeds the lowest of all at each level."""
    means = {name: np.mean(list(rows.values()), axis=0) for name, rows in levels.items()}
    least = np.min(list(means.values()), axis=0)
    return {name: 100 * (error / least - 1) for name, error in means.items()}


@dataclass(frozen=True)
class Sweep:
    """Variants along one axis.

    Attributes:
        key: "steps", "guidance" or "ema", or an axis of the study, such as "patch_size".
        title: the heading of its plot.
        label: label of the axis, with its unit.
        lines: name -> [(position on the axis, variant), ...] in rising order.
        metrics: full names of the metrics to draw.
    """

    key: str
    title: str
    label: str
    lines: dict[str, list[tuple[float, str]]]
    metrics: list[str]


Place = Callable[[Trial, dict[str, Any]], float | None]
"""Function from a trial and its record to a position on an axis, or None."""


def _half_life(trial: Trial, record: dict[str, Any]) -> float | None:
    """Return the half-life of a record's EMA at the end of training, as a share of the images seen."""
    run = trial.run
    if run is None or not record["images_seen"]:
        return None
    images = int(record["images_seen"])
    return float(run.config.ema.half_life_at(images, run.config.trainer.batch_size, record["ema"]) / images)


AXES: list[tuple[str, str, str, Place]] = [
    (
        "steps",
        "Quality against sampling steps",
        "network evaluations a sample",
        lambda _, r: (r.get("drawing") or {}).get("network_evaluations"),
    ),
    ("guidance", "Quality against guidance", "weight of guidance (1 is none)", lambda _, r: r.get("guidance")),
    (
        "ema",
        "Quality against the length of the average",
        "half-life of the average (share of the images)",
        _half_life,
    ),
]


def sweeps(c: Conclusion) -> list[Sweep]:
    """Return sweeps over sampling keys in which variants of one network differ, and over numeric axes of the study.

    Each line has at least two positions.
    """
    scores = [name for name in c.metrics if not metric_of(name).is_validation]
    metrics = [n for n in scores if n == c.name] + [n for n in scores if metric_of(n).swept and n != c.name]
    found = [Sweep(key, title, label, _lines(c, key, place), metrics[:3]) for key, title, label, place in AXES]
    sampled = {key for key, *_ in AXES} | {"average"}
    trained = [c.name, *(name for name in metrics if name != c.name)] if c.name in c.metrics else metrics
    found += [
        Sweep(key, f"Quality against {key.replace('_', ' ')}", key.replace("_", " "), lines, trained[:3])
        for key, lines in _axes(c).items()
        if key not in sampled
    ]
    return [sweep for sweep in found if sweep.lines and sweep.metrics]


def _axes(c: Conclusion) -> dict[str, dict[str, list[tuple[float, str]]]]:
    """Return key -> line -> positions for keys with a number in the names of variants, such as "patch_size=4, x0"."""
    found: dict[str, dict[str, list[tuple[float, str]]]] = {}
    for variant in c.variants:
        parts = variant.split(", ")
        for part in parts:
            key, _, value = part.partition("=")
            if re.fullmatch(r"-?\d+(\.\d+)?(e[+-]\d+)?", value):
                line = ", ".join(other for other in parts if other != part) or metric_of(c.name).title
                found.setdefault(key, {}).setdefault(line, []).append((float(value), variant))
    several = {key: {k: sorted(v) for k, v in lines.items() if len(v) > 1} for key, lines in found.items()}
    return {key: lines for key, lines in several.items() if lines}


def _lines(c: Conclusion, key: str, place: Place) -> dict[str, list[tuple[float, str]]]:
    """Return line -> positions, where a line has the variants whose records differ only in the key."""
    network = {network_key(trials): name for name, trials in networks(c).items()}
    lines: dict[str, list[tuple[float, str]]] = {}
    settings: dict[str, dict[str, str]] = {}
    for variant, trials in c.variants.items():
        trial = next((t for t in trials if t.complete and t.record), None)
        record = trial.record if trial else None
        at = place(trial, record) if trial and record else None
        if record is None or at is None:
            continue
        sample = {"ema": record.get("ema"), **(record.get("sample") or {})}
        same = {k: str(v) for k, v in sample.items() if k not in ("seed", "seconds", "batch_size", key)}
        same = {"network": network[network_key(trials)], **same}
        lines.setdefault(str(same), []).append((float(at), variant))
        settings[str(same)] = same
    lines = {line: sorted(places) for line, places in lines.items() if len({at for at, _ in places}) > 1}
    kept = [settings[line] for line in lines]
    differing = {k for one in kept for k in one if k != "clip" and len({other.get(k) for other in kept}) > 1}
    return {
        ", ".join(v for k, v in settings[line].items() if k in differing) or settings[line]["network"]: places
        for line, places in lines.items()
    }
