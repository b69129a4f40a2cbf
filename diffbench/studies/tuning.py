"""Tune a study: a grid tried alike for every value of an axis, longer for all where a best value stands at its edge.

Keys of training are chosen by the validation bound of runs with a seed of their own. Keys of sampling come after them:
they are chosen by the study's primary metric on the samples of the chosen one of these runs, and cost samples only.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffbench.config.load import flatten
from diffbench.core.errors import UserError
from diffbench.metrics.registry import metric_of
from diffbench.reports.results import full_name
from diffbench.studies.config import StudyConfig, Variant, is_sampled, nested, value_text, variants
from diffbench.studies.plan import (
    PlannedTrial,
    Rate,
    TrainingVariant,
    Tuned,
    stopped,
    target_size,
    training_variant,
)
from diffbench.studies.trials import TrialFile, is_trained, last_bound

MOST_ADDED = 2
"""Values that a grid may gain at each end."""
LEAST_VALUES = 3
"""Values of a grid from which on its edges say something."""

Grid = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Tuning:
    """Tuning as far as it has come.

    Attributes:
        grid: every key with its values, those that were added among them.
        trials: all runs of the grid so far.
        chosen: label of the tuned axis -> the best values.
        todo: trials that are not trained, or not scored, yet.
    """

    grid: dict[str, list[Any]] = field(default_factory=dict)
    trials: list[PlannedTrial] = field(default_factory=list)
    chosen: Tuned = field(default_factory=dict)
    todo: list[PlannedTrial] = field(default_factory=list)


def tuning_so_far(study: StudyConfig, path: Path, rate: Rate, folder: Path) -> Tuning:
    """The grid's runs, its extensions and choices, as the results on disk allow.

    Args:
        study: the study.
        path: its YAML, named in errors.
        rate: measures how fast a config trains, for `stop.seconds`.
        folder: of the study, which holds its trials.
    """
    if study.tune is None:
        return Tuning()
    given = {key: list(values) for key, values in study.tune.grid.items()}
    trained = {key: values for key, values in given.items() if not is_sampled(key)}
    sampled = {key: values for key, values in given.items() if is_sampled(key)}

    def runs(grid: Grid) -> list[PlannedTrial]:
        return _training_trials(study, path, rate, grid)

    def bounds(trials: Sequence[PlannedTrial]) -> list[Tried]:
        return [Tried(t.label, t.tuning or {}, _bound(folder, t), t) for t in trials]

    trained, tried = _explored(trained, runs, bounds)
    trials = [t.trial for t in tried]
    todo = [trial for trial in trials if not is_trained(trial.folder)]
    best = best_of(tried)
    chosen = {label: t.values for label, t in best.items()}
    if not sampled or not all(t.value is not None for t in tried):
        return Tuning(trained | sampled, trials, chosen, todo)

    def scored(grid: Grid) -> list[PlannedTrial]:
        named = {_named(values): nested(values) for values in _combinations(grid)}
        return [replace(t.trial, variant=replace(t.trial.variant, evaluations=named)) for t in best.values()]

    def scores(trials: Sequence[PlannedTrial]) -> list[Tried]:
        return [point for trial in trials for point in _scores(folder, trial, study.primary)]

    sampled, found = _explored(sampled, scored, scores)
    sign = 1 if metric_of(study.primary).lower_is_better else -1
    for label, point in best_of(found, sign).items():
        chosen[label] = chosen[label] | point.values
    evaluated = {point.trial.slug: point.trial for point in found}
    todo = list({p.trial.slug: p.trial for p in found if p.value is None}.values())
    return Tuning(trained | sampled, [evaluated.get(t.slug, t) for t in trials], chosen, todo)


@dataclass(frozen=True)
class Tried:
    """One point of the grid: its value is None until it is measured, infinite where its run failed."""

    label: str
    values: dict[str, Any]
    value: float | None
    trial: PlannedTrial


def best_of(tried: Sequence[Tried], sign: int = 1) -> dict[str, Tried]:
    """Label -> its best point so far."""
    best: dict[str, Tried] = {}
    for t in tried:
        if t.value is not None and (t.label not in best or sign * t.value < sign * (best[t.label].value or 0.0)):
            best[t.label] = t
    return best


def _explored(
    given: dict[str, list[Any]],
    plan: Callable[[Grid], list[PlannedTrial]],
    measure: Callable[[Sequence[PlannedTrial]], list[Tried]],
) -> tuple[dict[str, list[Any]], list[Tried]]:
    """The grid, longer while a label's best stands at an edge, and its points, up to those that are not measured."""
    grid, tried = given, measure(plan(given))
    while all(t.value is not None for t in tried):
        longer = extended(given, grid, tried)
        try:
            points = measure(plan(longer)) if longer != grid else []
        except UserError:  # a value that no config takes
            break
        if not points:
            break
        grid, tried = longer, points
    return grid, tried


def extended(given: Grid, grid: Grid, tried: Sequence[Tried]) -> dict[str, list[Any]]:
    """The grid with one value more at each end where some label has its best, by the ratio of the first grid there.

    Only rising positive numbers are extended, three or more of them, and by two values at each end at most.
    """
    best, longer = best_of(tried), {key: list(values) for key, values in grid.items()}
    for key, start in given.items():
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in start)
        if len(start) < LEAST_VALUES or not numbers or sorted(set(start)) != list(start):
            continue
        low, high = grid[key][0], grid[key][-1]
        found = [t.values[key] for t in best.values()]
        if low in found and grid[key].index(start[0]) < MOST_ADDED:
            longer[key].insert(0, _like(start, low * start[0] / start[1]))
        if high in found and len(grid[key]) - 1 - grid[key].index(start[-1]) < MOST_ADDED:
            longer[key].append(_like(start, high * start[-1] / start[-2]))
    return longer


def _like(values: Sequence[Any], value: float) -> Any:
    """A number of the kind that the grid holds: whole, or with six digits."""
    return round(value) if all(isinstance(v, int) for v in values) else float(f"{value:.6g}")


def _combinations(grid: Grid) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rsplit('.', 1)[-1]}={value_text(value)}" for key, value in values.items())


def _training_trials(study: StudyConfig, path: Path, rate: Rate, grid: Grid) -> list[PlannedTrial]:
    """A run for each label and combination of the grid, with other axes at their first value."""
    assert study.tune is not None
    tune, first = study.tune, dict[str, Variant]()
    for variant in variants(study):
        first.setdefault(variant.at[str(tune.axis)], variant)
    target = target_size(study, path)
    made = []
    for label, variant in first.items():
        for tried in _combinations(grid):
            found: TrainingVariant = training_variant(study, path, [variant], {label: tried}, target, rate)
            images = round(tune.share * found.config.trainer.max_images)
            config = replace(stopped(found.config, images, nested(study.set)), seed=tune.seed)
            name = f"tuning {label} {_named(tried)}".strip()
            made.append(
                PlannedTrial(
                    name, replace(found, config=config, evaluations={}, rungs=[]), config, tuning=tried, label=label
                )
            )
    return made


def _bound(folder: Path, trial: PlannedTrial) -> float | None:
    """The last validation bound of a run; infinite where it failed, None where it is not trained."""
    if is_trained(trial.folder):
        bound = last_bound(trial.folder)
        return bound if math.isfinite(bound) else math.inf
    return math.inf if TrialFile.of(folder, trial).failure else None


def _scores(folder: Path, trial: PlannedTrial, primary: str) -> list[Tried]:
    """The primary metric of each way of sampling a tuning run."""
    file = TrialFile.of(folder, trial) if is_trained(trial.folder) else None
    found = file.trials() if file else []
    name, measured = full_name(found, primary), {t.variant: t.values for t in found if t.complete}
    failed = file is not None and bool(file.failure)
    points = []
    for variant, changes in trial.variant.evaluations.items():
        value = measured.get(variant, {}).get(name or primary, math.inf if failed else None)
        points.append(Tried(trial.label, flatten(changes), value, trial))
    return points
