"""The plan that a study prints before it starts, and the notes in its report on budgets, sizes and tuning."""

import json
from collections.abc import Sequence
from pathlib import Path

from diffbench.config.load import to_dict
from diffbench.core.progress import span
from diffbench.reports.text import as_text
from diffbench.studies.budget import Probe
from diffbench.studies.config import AVERAGE, StudyConfig, is_sampled
from diffbench.studies.plan import TrainingVariant, evaluation_config
from diffbench.studies.tuning import Tuning


def plan_text(
    study: StudyConfig,
    folder: Path,
    found: Sequence[TrainingVariant],
    tuning: Tuning,
    probe: Probe,
) -> str:
    """Format the plan: a line for each network, and the total time."""
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
    evaluations *= len(study.stop.rungs) * study.samplings
    lines = [
        f"{study.title or folder.name}: {len(found)} networks x {len(study.seeds)} seeds = {runs} runs,"
        f" {evaluations} evaluations",
        "",
        as_text(rows),
        "",
    ]
    if tuning.trials:
        tuning_seconds = sum(probe.seconds(trial) for trial in tuning.trials)
        seconds += tuning_seconds
        lines.append(
            f"tuning: {len(tuning.trials)} runs with seed {tuning.trials[0].config.seed}, {len(tuning.todo)} of them"
            f" left, about {span(tuning_seconds / study.jobs)} in all; more if a best value is at an edge of the grid"
        )
    lines += [f"warning: {text}" for text in equal_by_construction(found)]
    at_once = f", {study.jobs} runs at a time" if study.jobs > 1 else ""
    lines.append(f"about {span(seconds / study.jobs)} from scratch{at_once}; {folder}")
    return "\n".join(lines)


def notes_of(
    study: StudyConfig,
    found: Sequence[TrainingVariant],
    tuning: Tuning,
) -> list[str]:
    """Return the notes that a reader of the report needs."""
    how = {
        "images": "",
        "flops": " (6 for each multiply-accumulate of a forward pass)",
        "seconds": " of training at each network's measured rate",
    }[study.stop.unit]
    seen = {v.name: ", ".join(f"{images:,}" for images, _ in v.rungs) for v in found}
    same = len(found) > 1 and len(set(seen.values())) == 1
    lengths = f"{next(iter(seen.values()))} each" if same else "; ".join(f"{name} {n}" for name, n in seen.items())
    notes = [f"Training stops at {study.stop.text(study.stop.rungs[-1])}{how}. Images seen: {lengths}."]
    if len(study.stop.rungs) > 1:
        if (share := study.stop.cooldown) is None:
            how = "averaged weights are scored at each"
        else:
            how = f"over the last {100 * share:g}% of each a branch of it, whose rate decays, is trained and scored"
        notes.append(f"One run passes all budgets at a constant learning rate; {how}.")
    notes += [f"Variants {text}." for text in equal_by_construction(found)]
    if study.match.by != "none":
        sizes = "; ".join(f"{v.name} {100 * (v.residual or 0):+.1f}% ({v.sized})" for v in found)
        notes.append(
            f"Networks are sized by {study.match.change} to the {study.match.by} of {study.match.to}: {sizes}."
        )
    if study.tune is not None:
        notes.append(_tuning_note(study, found, tuning))
    if study.jobs > 1:
        notes.append(f"{study.jobs} runs at a time shared the machine: seconds and images/s are of that.")
    return notes


def _tuning_note(study: StudyConfig, found: Sequence[TrainingVariant], tuning: Tuning) -> str:
    assert study.tune is not None
    grid = " x ".join(f"{key} in {values}" for key, values in tuning.grid.items())
    cost = sum(t.flops for t in tuning.trials) / max(1.0, sum(v.flops for v in found) * len(study.seeds))
    chosen = "; ".join(f"{label} {', '.join(f'{k}={v}' for k, v in c.items())}" for label, c in tuning.chosen.items())
    longer = [key for key, values in tuning.grid.items() if len(values) > len(study.tune.grid[key])]
    grown = f" {', '.join(longer)} grew for all, as a best value stood at an edge." if longer else ""
    edges = [
        label
        for label, c in tuning.chosen.items()
        if any(len(values) > 2 and c.get(key) in (values[0], values[-1]) for key, values in tuning.grid.items())
    ]
    at_edge = f" Still at an edge, where more might be gained: {', '.join(edges)}." if edges else ""
    failed = "; ".join(f"{label} ({', '.join(keys)})" for label, keys in tuning.failed.items())
    untuned = f" Not tuned, since every try failed: {failed}." if failed else ""
    sampling = f", of sampling by {study.primary}," if any(map(is_sampled, tuning.grid)) else ""
    return (
        f"Each {study.tune.axis} was tuned alike: {grid}, by validation bound{sampling} with seed {study.tune.seed},"
        f" which is not reported, for {100 * study.tune.share:g}% of the length; that took {100 * cost:.0f}% of the"
        f" training FLOPs of the reported runs.{grown} Chosen: {chosen or 'nothing'}.{untuned}{at_edge}"
    )


def equal_by_construction(found: Sequence[TrainingVariant]) -> list[str]:
    """Return a sentence for each group of variants that cannot differ: one config, or EMAs with the same decays."""
    groups: dict[str, list[str]] = {}
    for variant in found:
        c = variant.config
        for name, changes in variant.evaluations.items():
            average = changes.get(AVERAGE, c.ema.decays[0])
            # The cap only rises: averages that it still limits at the last update have had equal decays throughout.
            last = c.ema.decay_at(c.trainer.max_steps - 1, average)
            values = to_dict(evaluation_config(c, changes, "study")) | {"ema": last, "average": last}
            groups.setdefault(json.dumps(values, sort_keys=True), []).append(name)
    return [
        f"{', '.join(names)}: the same by construction (one config, or averages whose decays a warm-up caps alike)"
        for names in groups.values()
        if len(names) > 1
    ]
