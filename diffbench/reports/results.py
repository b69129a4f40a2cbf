"""The trials that a report compares, with their runs and scores, and checks that they were measured the same way."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffbench.core.errors import UserError
from diffbench.denoisers.flops import Cost
from diffbench.evaluation.records import difference, values
from diffbench.metrics.registry import RANKING, metric_of
from diffbench.reports.image_errors import image_bounds
from diffbench.runs.base import DATA_FACTS, Run

Status = Literal["complete", "unfinished", "failed", "not begun"]
VALIDATION = ("val/", "train/bound", "train/level/")
"""Prefixes of the metric names that a validation logs."""
IMAGES = ("data.", "autoencoder")
"""Prefixes of the config keys that define the images on which networks are trained and scored."""
NOT_PROTOCOL = ("data.num_workers", "data.flip", "data.path")
"""Keys with these prefixes that may differ between comparable runs."""


@dataclass(eq=False)
class Trial:
    """One variant with one seed.

    Attributes:
        variant: its name in tables, such as "diffit" or "diffit, guidance=1.5".
        seed: the training seed.
        status: how far it has come.
        run: its run, shared by trials that differ only in sampling; None before the run has started.
        record: the variant's evaluation, as stored in results.jsonl; None before it is scored.
        why: the reason why it failed or is unfinished, in one line.
        at: images of its rung, if the run passes several.
        recipe: everything needed to train and score it again, in the format of a study's trial file.
        more: records of the same weights sampled with further seeds.
    """

    variant: str
    seed: int
    status: Status
    run: Run[Any] | None = None
    record: dict[str, Any] | None = None
    why: str = ""
    at: int | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    more: list[dict[str, Any]] = field(default_factory=list)

    @property
    def records(self) -> list[dict[str, Any]]:
        """All records, one for each sampling seed."""
        return [self.record, *self.more] if self.record else []

    @property
    def images(self) -> int:
        """Images that the scored weights have seen so far."""
        if self.run is None:
            return 0 if self.status == "not begun" else self.at or 0
        return min(self.at or self.run.images_seen, self.run.images_seen)

    @property
    def complete(self) -> bool:
        """Whether the trial counts in the comparison."""
        return self.status == "complete"

    @cached_property
    def values(self) -> dict[str, float]:
        """Full name -> value: metrics of the last validation, and scores averaged over the records."""
        found: dict[str, float] = {}
        for line in self.run.metrics if self.run else ():
            if self.at is not None and line["images"] > self.at:
                break
            found |= {name: value for name, value in line.items() if name.startswith(VALIDATION)}
        found |= {n: v for n, v in (self.record or {}).items() if n.startswith(VALIDATION)}
        scores = [values(record) for record in self.records] or [{}]
        shared = (name for name in scores[0] if all(name in each for each in scores))
        return found | {name: sum(each[name] for each in scores) / len(scores) for name in shared}

    @cached_property
    def cost(self) -> Cost | None:
        """Size and FLOPs of the network; None if they cannot be counted here."""
        try:
            return self.run.cost if self.run else None
        except (UserError, ValueError, OSError):
            return None

    @property
    def flops(self) -> float | None:
        """Training FLOPs so far; None if they cannot be counted."""
        return None if self.cost is None or self.run is None else self.cost.training_flops(self.images)

    @property
    def seconds(self) -> float | None:
        """Seconds of training so far; None if they were not logged."""
        if self.run is None or not self.run.timeline:
            return None
        return float(np.interp(self.images, *np.array([(0.0, 0.0), *self.run.timeline]).T))

    @cached_property
    def peak_gib(self) -> float | None:
        """Peak GPU memory in GiB; None if it was not logged."""
        logged = [
            line["perf/peak_gpu_gb"] for line in (self.run.metrics if self.run else ()) if "perf/peak_gpu_gb" in line
        ]
        return max(logged, default=None)

    @cached_property
    def image_bounds(self) -> np.ndarray | None:
        """Bounds (images,) of held-out images in nats per dimension for the reported EMA; None if not stored."""
        if self.run is None:
            return None
        return image_bounds(self.run.folder, self.images, (self.record or {}).get("ema", self.run.ema))


@dataclass(frozen=True)
class TriedPoint:
    """A point of a tuning grid.

    Attributes:
        label: the value of the tuned axis.
        values: key -> the value tried.
        name: full name of the metric that chooses.
        value: the metric's value; None until it is measured, infinite if the run failed.
        flops, seconds: cost of training; 0 for a point that only samples a trained run differently.
    """

    label: str
    values: dict[str, Any]
    name: str
    value: float | None
    flops: float = 0.0
    seconds: float = 0.0


def best_of(points: Iterable[TriedPoint]) -> dict[str, TriedPoint]:
    """Return label -> the best point, the first one among equals; a label without a finite value is left out."""
    best: dict[str, tuple[float, TriedPoint]] = {}
    for p in points:
        if p.value is not None and math.isfinite(p.value):
            error = p.value if metric_of(p.name).lower_is_better else -p.value
            if p.label not in best or error < best[p.label][0]:
                best[p.label] = error, p
    return {label: point for label, (_, point) in best.items()}


@dataclass(frozen=True)
class Comparison:
    """The trials that one report compares, with its settings.

    Attributes:
        title: the report's headline.
        question: the question it answers, in a sentence or two.
        trials: all variants and seeds, in the order of tables.
        primary: the metric that decides: "val/bound", or the name of a score, with or without extractor and count, such
            as "fd", "label_accuracy" or "kid".
        baseline: the variant that all others are compared with; None to compare all pairs.
        like_for_like: False if variants differ in more than the question; the report then says so.
        notes: what a reader must know: budgets, residuals of matching, costs of tuning, failures.
        tried: the points that tuning measured.
        rungs: budget as text -> its trials, in rising order, if runs pass several; `trials` are those of the last.
        command: the command line that produced it.
    """

    title: str
    question: str
    trials: list[Trial]
    primary: str = "val/bound"
    baseline: str | None = None
    like_for_like: bool = True
    notes: list[str] = field(default_factory=list)
    tried: list[TriedPoint] = field(default_factory=list)
    rungs: dict[str, list[Trial]] = field(default_factory=dict)
    command: str = ""


def check_comparable(trials: Sequence[Trial], primary: str) -> None:
    """Check that trials were measured the same way within each variant and, except in what is compared, between them.

    Variants of the same runs may use different extractors or counts, since their values then have different names.

    Raises:
        UserError: if trials were measured differently, or the primary metric does not rank variants.
    """
    if metric_of(primary).direction is None:
        raise UserError(f"primary: {primary} does not rank variants; choose from {', '.join(RANKING)}")
    scored = [(t, t.record, t.run.folder) for t in trials if t.record and t.run]
    variant_of: dict[Path, str] = {}
    shared = any(variant_of.setdefault(folder, t.variant) != t.variant for t, _, folder in scored)
    unsampled = {"sample": None, "guidance": None} if shared or _sampling_differs(trials) else {}
    within: dict[str, tuple[dict[str, Any], Path]] = {}
    between: dict[frozenset[str], tuple[dict[str, Any], Path]] = {}
    for trial, record, folder in scored:
        measured = frozenset(name.rpartition("/")[2] for name in values(record)) if shared else frozenset()
        for (other, where), ignored in (
            (within.setdefault(trial.variant, (record, folder)), {}),
            (between.setdefault(measured, (record, folder)), unsampled),
        ):
            if (found := difference(other | ignored, record | ignored)) is not None:
                raise measured_differently(where, folder, found)


def measured_differently(one: Path, other: Path, difference: str, which: str = "") -> UserError:
    """Return the error for two run folders whose records are not comparable."""
    evaluated = "evaluate both with the same keys to compare them"
    remedy = "compare runs on the same images" if difference.startswith("data is ") else evaluated
    return UserError(f"{one} and {other}: measured differently{which}: {difference}; {remedy}")


def _sampling_differs(trials: Sequence[Trial]) -> bool:
    """Return whether the configs of the runs differ in how they sample."""
    keys = ("process.name", "sample.sampler", "sample.steps", "sample.clip", "sample.guidance")
    return len({tuple(t.run.flat.get(key) for key in keys) for t in trials if t.run}) > 1


def differing(flats: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values differ between flat configs."""
    keys = dict.fromkeys(key for flat in flats for key in flat)
    return [key for key in keys if any(flat.get(key) != flats[0].get(key) for flat in flats)]


def protocol_difference(one: Mapping[str, Any], other: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """Describe the first difference between two flat configs in a key that starts with one of `keys`; None without."""
    for key in sorted(differing([one, other])):
        if key.startswith(keys) and key not in NOT_PROTOCOL:
            return f"{key} is {one.get(key)} in one and {other.get(key)} in the other"
    return None


def validation_difference(trials: Sequence[Trial]) -> str | None:
    """Describe the first difference between runs in held-out images or validation levels; None if they agree."""
    runs = [trial.run for trial in trials if trial.run]
    images: dict[str, Path] = {}
    for run in runs:
        if (run.folder / DATA_FACTS).is_file():  # otherwise its images would have to be read
            images.setdefault(run.facts.fingerprint, run.folder)
        if found := protocol_difference(runs[0].flat, run.flat, (*IMAGES, "validation.")):
            return found
    if len(images) > 1:
        one, other, *_ = images.values()
        return f"{one} and {other} were trained on different images, though their configs name the same"
    return None


def full_name(trials: Sequence[Trial], metric: str) -> str | None:
    """Return the full name of a metric given with or without extractor and count; None before it has values.

    "fd" also matches "fid", the name of the Fréchet distance in the published protocol.
    """
    alike = (metric, "fid") if metric == "fd" else (metric,)
    names = (name for trial in trials for name in trial.values)
    return next((n for n in names if metric in (n, n.partition("@")[0]) or metric_of(n).name in alike), None)


def by_seed(trials: Sequence[Trial], name: str) -> dict[int, float]:
    """Return seed -> value of a metric for the complete trials of a variant."""
    return {t.seed: t.values[name] for t in trials if t.complete and name in t.values}


def network_key(trials: Sequence[Trial]) -> tuple[str, ...]:
    """Return a variant's run folders, which variants that only sample differently share; its name if it has none."""
    return tuple(sorted({str(t.run.folder) for t in trials if t.run})) or (trials[0].variant,)


def levels_of(names: Iterable[str], part: str = "val") -> dict[str, float]:
    """Return name -> log-SNR for the errors at single noise levels, in rising order."""
    start = f"{part}/level/"
    found = {name: float(name.removeprefix(start)) for name in names if name.startswith(start)}
    return dict(sorted(found.items(), key=lambda item: item[1]))
