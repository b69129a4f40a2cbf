"""What a study says before it begins, and what its report says of budgets, sizes and tuning."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffbench.core.progress import span
from diffbench.reports.tables import run_table
from diffbench.studies.budget import Probe
from diffbench.studies.cells import is_trained
from diffbench.studies.config import StudyConfig
from diffbench.studies.plan import Cell, Group


def plan_text(study: StudyConfig, folder: Path, found: Sequence[Group], tuning: Sequence[Cell], probe: Probe) -> str:
    """The plan: a line for each network, and what all of it will take."""
    seconds = {group.name: probe.seconds(group) for group in found}
    columns: dict[str, dict[str, str]] = {name: {} for name in _heads(study)}
    for group in found:
        for name, value in _facts(study, group, seconds[group.name]).items():
            columns[name][group.name] = value
    runs, evaluations = len(found) * len(study.seeds), sum(len(g.evaluations) for g in found) * len(study.seeds)
    left = [c for c in tuning if not is_trained(c.folder, c.config)]
    total = sum(seconds.values()) * len(study.seeds)
    share = study.tune.share if study.tune else 0.0
    by_label = {c.label: next((seconds[g.name] for g in found if c.label in g.at.values()), 0.0) for c in tuning}
    tuning_total = sum(share * by_label[c.label] for c in tuning)
    lines = [
        f"{study.title or folder.name}: {len(found)} networks x {len(study.seeds)} seeds = {runs} runs,"
        f" {evaluations} evaluations",
        "",
        run_table(list(columns.items())),
        "",
    ]
    if tuning:
        lines.append(
            f"tuning: {len(tuning)} runs with seed {study.tune.seed if study.tune else 0}, {len(left)} of them to do,"
            f" about {span(tuning_total / study.jobs)} in all"
        )
    at_once = f", {study.jobs} runs at a time" if study.jobs > 1 else ""
    lines.append(f"about {span((total + tuning_total) / study.jobs)} for all that is new{at_once}; {folder}")
    return "\n".join(lines)


def _heads(study: StudyConfig) -> list[str]:
    matched = ["sized", f"off {study.match.by}"] if study.match.by != "none" else []
    return ["parameters", "GMACs", *matched, "images", "training FLOPs", "seconds a seed"]


def _facts(study: StudyConfig, group: Group, seconds: float) -> dict[str, str]:
    t = group.config.trainer
    facts = {
        "parameters": f"{group.cost.parameters:,}",
        "GMACs": f"{group.cost.gmacs:.4g}",
        "images": f"{t.max_steps * t.batch_size:,}",
        "training FLOPs": f"{group.flops:.3g}",
        "seconds a seed": f"{seconds:,.0f}",
    }
    if group.residual is not None:
        facts |= {"sized": group.sized, f"off {study.match.by}": f"{100 * group.residual:+.1f}%"}
    return facts


def notes_of(
    study: StudyConfig, found: Sequence[Group], tuning: Sequence[Cell], tuned: dict[str, dict[str, Any]]
) -> list[str]:
    """What a reader of the report must know."""
    budget = {
        "images": f"{study.stop.images or 0:,} images",
        "flops": f"{study.stop.flops or 0:.3g} training FLOPs (6 for each multiply-accumulate of a forward pass)",
        "seconds": f"{study.stop.seconds or 0:g} seconds of training at each network's measured rate",
    }
    which = next(name for name, value in vars(study.stop).items() if value is not None)
    lengths = "; ".join(f"{g.name} {g.config.trainer.max_steps * g.config.trainer.batch_size:,}" for g in found)
    notes = [f"Training stops at {budget[which]}. Images seen: {lengths}."]
    if study.match.by != "none":
        told = "; ".join(f"{g.name} {100 * (g.residual or 0):+.1f}% ({g.sized})" for g in found)
        notes.append(f"Networks are sized by {study.match.change} to the {study.match.by} of {study.match.to}: {told}.")
    if study.tune is not None:
        notes.append(_tuning_note(study, found, tuning, tuned))
    if study.jobs > 1:
        notes.append(f"{study.jobs} runs at a time shared the machine: seconds and images/s are of that.")
    return notes


def _tuning_note(
    study: StudyConfig, found: Sequence[Group], tuning: Sequence[Cell], tuned: dict[str, dict[str, Any]]
) -> str:
    assert study.tune is not None
    grid = " x ".join(f"{key} in {values}" for key, values in study.tune.grid.items())
    cost = sum(c.group.flops for c in tuning) / max(1.0, sum(g.flops for g in found) * len(study.seeds))
    chosen = "; ".join(f"{label} {', '.join(f'{k}={v}' for k, v in v.items())}" for label, v in tuned.items())
    edges = [
        label
        for label, values in tuned.items()
        if any(len(grid) > 2 and values[key] in (grid[0], grid[-1]) for key, grid in study.tune.grid.items())
    ]
    at_edge = f" At the edge of the grid, where more might be gained: {', '.join(edges)}." if edges else ""
    return (
        f"Each {study.tune.axis} was tuned alike: {grid}, by validation error with seed {study.tune.seed}, which is not"
        f" reported, for {100 * study.tune.share:g}% of the length; that took {100 * cost:.0f}% of the training FLOPs"
        f" of the reported runs. Chosen: {chosen}.{at_edge}"
    )
