"""Tune a study: try one grid for every value of an axis, and extend it for all if a best value is at its edge.

Training keys are chosen by the validation bound of runs with a separate seed. Sampling keys come after them: they are
chosen by the study's primary metric on samples of the best of these runs, without further training.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffbench.config.layers import merge
from diffbench.config.load import flatten, to_dict
from diffbench.core.errors import UserError
from diffbench.reports.results import TriedPoint, best_of
from diffbench.studies.config import StudyConfig, Variant, is_sampled, key_label, nest_keys, variants
from diffbench.studies.plan import (
    Rate,
    TrainingVariant,
    Tuned,
    config_of,
    target_size,
    training_variant,
    with_cooldown,
    with_length,
)
from diffbench.studies.trials import TrialFile, is_trained

MOST_ADDED = 2
"""Largest number of values by which a grid may grow at each end."""
LEAST_VALUES = 3
"""Fewest values of a grid that may grow."""

Grid = Mapping[str, Sequence[Any]]
Measured = tuple[TrainingVariant, TriedPoint]


@dataclass(frozen=True)
class Tuning:
    """The state of tuning so far."""

    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Every key with its values, including those that were added."""
    trials: list[TrainingVariant] = field(default_factory=list)
    """All runs of the grid so far."""
    chosen: Tuned = field(default_factory=dict)
    todo: list[TrainingVariant] = field(default_factory=list)
    """Trials that are not yet trained, or not yet scored."""

    @property
    def failed(self) -> dict[str, list[str]]:
        """Label -> keys for which every trial failed; these keys keep their values."""
        left = {t.label: [key for key in self.grid if key not in self.chosen.get(t.label, {})] for t in self.trials}
        return {label: keys for label, keys in left.items() if keys}


def tuning_so_far(study: StudyConfig, path: Path, rate: Rate, folder: Path) -> Tuning:
    """Return the runs, extended grid and choices that follow from the results in the study's folder."""
    if study.tune is None:
        return Tuning()
    numbers = flatten(to_dict(config_of(study, path, variants(study)[0], {})))
    given = {
        key: [float(v) if isinstance(numbers.get(key), float) and isinstance(v, int) else v for v in values]
        for key, values in study.tune.grid.items()
    }
    trained = {key: values for key, values in given.items() if not is_sampled(key)}
    sampled = {key: values for key, values in given.items() if is_sampled(key)}

    def bounds(grid: Grid) -> list[Measured]:
        planned = _training_trials(study, path, rate, grid)
        return [(trial, TrialFile.of(folder, trial).points(study.primary)[0]) for trial in planned]

    trained, runs = _explored(trained, bounds)
    trials = [trial for trial, _ in runs]
    best = best_of(point for _, point in runs)
    chosen = {label: point.values for label, point in best.items()}
    if not sampled or any(point.value is None for _, point in runs):
        return Tuning(trained | sampled, trials, chosen, [trial for trial in trials if not is_trained(trial.folder)])

    own = {variant.at[str(study.tune.axis)]: variant.sampled for variant in reversed(variants(study))}

    def scores(grid: Grid) -> list[Measured]:
        found = []
        for tuned in [trial for trial, point in runs if best.get(trial.label) is point]:
            ways = {_named(values): merge(own[tuned.label], nest_keys(values)) for values in _combinations(grid)}
            trial = replace(tuned, evaluations=ways)
            for point in TrialFile.of(folder, trial).points(study.primary)[1:]:
                found.append((trial, replace(point, values={key: point.values[key] for key in grid})))
        return found

    sampled, found = _explored(sampled, scores)
    for label, point in best_of(point for _, point in found).items():
        chosen[label] = chosen[label] | point.values
    scored = {trial.slug: trial for trial, _ in found}
    todo = list({trial.slug: trial for trial, point in found if point.value is None}.values())
    return Tuning(trained | sampled, [scored.get(trial.slug, trial) for trial in trials], chosen, todo)


def _explored(
    given: dict[str, list[Any]], measured: Callable[[Grid], list[Measured]]
) -> tuple[dict[str, list[Any]], list[Measured]]:
    """Extend the grid while a label's best is at an edge and all points are measured; return it with its points."""
    grid, found = given, measured(given)
    while all(point.value is not None for _, point in found):
        if (longer := extended(given, grid, [point for _, point in found])) == grid:
            break
        try:
            found = measured(longer)
        except UserError:  # no config accepts the added value
            break
        grid = longer
    return grid, found


def extended(given: Grid, grid: Grid, tried: Sequence[TriedPoint]) -> dict[str, list[Any]]:
    """Return the grid with a value added at each end where some label has its best, at the given grid's ratio there.

    Only three or more rising positive numbers are extended, and by at most two values at each end.
    """
    best, longer = best_of(tried), {key: list(values) for key, values in grid.items()}
    for key, start in given.items():
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in start)
        if len(start) < LEAST_VALUES or not numbers or sorted(set(start)) != list(start):
            continue
        low, high = grid[key][0], grid[key][-1]
        found = [t.values[key] for t in best.values()]
        lower = _like(start, low * start[0] / start[1])
        if low in found and grid[key].index(start[0]) < MOST_ADDED and 0 < lower < low:
            longer[key].insert(0, lower)
        if high in found and len(grid[key]) - 1 - grid[key].index(start[-1]) < MOST_ADDED:
            longer[key].append(_like(start, high * start[-1] / start[-2]))
    return longer


def _like(values: Sequence[Any], value: float) -> Any:
    """Round a number like the grid's values: to a whole number, or to six significant digits."""
    return round(value) if all(isinstance(v, int) for v in values) else float(f"{value:.6g}")


def _combinations(grid: Grid) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(key_label(key, value) for key, value in values.items())


def _training_trials(study: StudyConfig, path: Path, rate: Rate, grid: Grid) -> list[TrainingVariant]:
    """Return a run for each label and combination of the grid, with the other axes at their first value."""
    assert study.tune is not None
    tune, first = study.tune, dict[str, Variant]()
    for variant in variants(study):
        first.setdefault(variant.at[str(tune.axis)], variant)
    target, made = target_size(study, path), []
    for (label, variant), tried in itertools.product(first.items(), _combinations(grid)):
        found = training_variant(study, path, [variant], {label: tried}, target, rate)
        images = round(tune.share * found.config.trainer.max_images)
        given = merge(merge(nest_keys(study.set), variant.trained), nest_keys(tried))
        config = replace(with_length(found.config, [images], given, tune.share), seed=tune.seed)
        if study.stop.cooldown is not None:
            config = with_cooldown(config, study.stop.cooldown)
        name = f"tuning {label} {_named(tried)}".strip()
        found = replace(found, name=name, config=config, tuning=tried, label=label)
        made.append(replace(found, evaluations={}, rungs=[], cooldown=None, samplings=1))
    return made
