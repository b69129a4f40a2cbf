"""The plan that a study prints before it begins, and the notes of its report on budgets, sizes and tuning."""

from collections.abc import Sequence
from pathlib import Path

from diffbench.core.progress import span
from diffbench.reports.tables import as_text
from diffbench.studies.budget import Probe
from diffbench.studies.config import StudyConfig
from diffbench.studies.plan import PlannedTrial, TrainingVariant, Tuned, equal_by_construction
from diffbench.studies.trials import is_trained


def plan_text(
    study: StudyConfig,
    folder: Path,
    found: Sequence[TrainingVariant],
    tuning: Sequence[PlannedTrial],
    probe: Probe,
) -> str:
    """The plan: a line for each network, and what all of it will take."""
    rows = []
    seconds = 0.0
    for variant in found:
        each = probe.seconds(variant)
        seconds += each * len(study.seeds)
        row = {
            "network": variant.name,
            "parameters": f"{variant.cost.parameters:,}",
            "GMACs": f"{variant.cost.gmacs:.4g}",
        }
        if variant.residual is not None:
            row |= {"sized": variant.sized, f"off {study.match.by}": f"{100 * variant.residual:+.1f}%"}
        row |= {"images": f"{variant.images:,}", "training FLOPs": f"{variant.flops:.3g}"}
        rows.append(row | {"seconds a seed": f"{each:,.0f}"})
    runs, evaluations = len(found) * len(study.seeds), sum(len(v.evaluations) for v in found) * len(study.seeds)
    lines = [
        f"{study.title or folder.name}: {len(found)} networks x {len(study.seeds)} seeds = {runs} runs,"
        f" {evaluations} evaluations",
        "",
        as_text(rows),
        "",
    ]
    if tuning:
        left = sum(not is_trained(trial.folder) for trial in tuning)
        tuning_seconds = sum(probe.seconds(trial.variant, evaluations=False) for trial in tuning)
        seconds += tuning_seconds
        lines.append(
            f"tuning: {len(tuning)} runs with seed {tuning[0].seed}, {left} of them to do, about"
            f" {span(tuning_seconds / study.jobs)} in all"
        )
    lines += [f"warning: {text}" for text in equal_by_construction(list(found))]
    at_once = f", {study.jobs} runs at a time" if study.jobs > 1 else ""
    lines.append(f"about {span(seconds / study.jobs)} for all that is new{at_once}; {folder}")
    return "\n".join(lines)


def notes_of(
    study: StudyConfig,
    found: Sequence[TrainingVariant],
    tuning: Sequence[PlannedTrial],
    tuned: Tuned,
) -> list[str]:
    """Notes that a reader of the report needs."""
    budget = {
        "images": f"{study.stop.images or 0:,} images",
        "flops": f"{study.stop.flops or 0:.3g} training FLOPs (6 for each multiply-accumulate of a forward pass)",
        "seconds": f"{study.stop.seconds or 0:g} seconds of training at each network's measured rate",
    }
    which = next(name for name, value in vars(study.stop).items() if value is not None)
    lengths = "; ".join(f"{v.name} {v.images:,}" for v in found)
    notes = [f"Training stops at {budget[which]}. Images seen: {lengths}."]
    notes += [f"Variants {text}." for text in equal_by_construction(list(found))]
    if study.match.by != "none":
        sizes = "; ".join(f"{v.name} {100 * (v.residual or 0):+.1f}% ({v.sized})" for v in found)
        notes.append(
            f"Networks are sized by {study.match.change} to the {study.match.by} of {study.match.to}: {sizes}."
        )
    if study.tune is not None:
        notes.append(_tuning_note(study, found, tuning, tuned))
    if study.jobs > 1:
        notes.append(f"{study.jobs} runs at a time shared the machine: seconds and images/s are of that.")
    return notes


def _tuning_note(
    study: StudyConfig,
    found: Sequence[TrainingVariant],
    tuning: Sequence[PlannedTrial],
    tuned: Tuned,
) -> str:
    assert study.tune is not None
    grid = " x ".join(f"{key} in {values}" for key, values in study.tune.grid.items())
    cost = sum(trial.variant.flops for trial in tuning) / max(1.0, sum(v.flops for v in found) * len(study.seeds))
    chosen = "; ".join(f"{label} {', '.join(f'{k}={v}' for k, v in v.items())}" for label, v in tuned.items())
    edges = [
        label
        for label, values in tuned.items()
        if any(len(grid) > 2 and values[key] in (grid[0], grid[-1]) for key, grid in study.tune.grid.items())
    ]
    at_edge = f" At the edge of the grid, where more might be gained: {', '.join(edges)}." if edges else ""
    return (
        f"Each {study.tune.axis} was tuned alike: {grid}, by validation bound with seed {study.tune.seed}, which is not"
        f" reported, for {100 * study.tune.share:g}% of the length; that took {100 * cost:.0f}% of the training FLOPs"
        f" of the reported runs. Chosen: {chosen}.{at_edge}"
    )
