"""`diffbench compare`: compare several runs, or the variants of a study, in a table and a report."""

import argparse
import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffbench.commands.arguments import split_arguments
from diffbench.config.layers import COMMAND_LINE
from diffbench.core.errors import UserError
from diffbench.core.files import write_text
from diffbench.metrics.registry import metric_of
from diffbench.reports.conclusions import Conclusion, conclude
from diffbench.reports.export import check_export, exported
from diffbench.reports.results import Comparison, Trial, differing
from diffbench.reports.runs import comparable_scores, guidance, run_facts, run_table, run_values, settings
from diffbench.reports.tables import IDENTITY, for_terminal
from diffbench.reports.text import counted, listed
from diffbench.runs.base import Run
from diffbench.runs.lifecycle import open_any
from diffbench.studies.comparison import comparison_of_study
from diffbench.studies.config import load_study
from diffbench.studies.trials import recipe_of

MOST_COLUMNS = 8
"""Largest number of runs for which the table has a column for each run."""
SAME_VARIANT = {*IDENTITY, "data.num_workers"}
"""Keys that may differ between runs of the same variant."""
MOST_KEYS = 3
"""Largest number of differing keys that name a variant; with more, it is named after its run folder."""


@dataclass
class CompareConfig:
    """Keys of `diffbench compare`."""

    out: str | None = None
    """Folder of the report; null: a folder in runs/reports/ named after the runs."""
    primary: str | None = None
    """Metric that decides; null: val/bound if all runs have it, else fd."""
    baseline: str | None = None
    """Variant that all others are compared with; null: compare all pairs."""
    export: str | None = None
    """File for the main tables, .tex (booktabs) or .md; null: none."""


def run(arguments: argparse.Namespace) -> None:
    """Compare `arguments.runs`."""
    print(compare(arguments.runs)[0])


def as_json(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare `arguments.runs`; return the runs, and the conclusion if there is one, as values for JSON."""
    return compare(arguments.runs)[1]


def compare(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Compare runs, or a study; return the text for the terminal, and values for scripts.

    Args:
        words: run folders, or a study's YAML or folder; then key=value.

    Raises:
        UserError: if a folder has no run, records were measured differently, or a key is wrong.
    """
    folders, config = split_arguments(words, CompareConfig, "compare")
    if config.export is not None:
        check_export(Path(config.export))
    study = _study(folders[0])
    if study is not None:
        if len(folders) > 1:
            raise UserError(f"{COMMAND_LINE}: {folders[1]}: a study is reported alone; compare runs with runs")
        comparison = comparison_of_study(study)
        overridden = any(word.startswith("baseline=") for word in words)  # null is a value too: compare all pairs
        baseline = config.baseline if overridden else comparison.baseline
        comparison = replace(comparison, primary=config.primary or comparison.primary, baseline=baseline)
        return _report(comparison, config, report_folder(config.out, []) if config.out else study)
    runs = [_trained(folder) for folder in folders]
    scored = comparable_scores(runs)
    values = {"runs": [run_values(run) for run in runs]}
    if len({run.folder.resolve() for run in runs if run.kind == "denoiser"}) < 2 and config == CompareConfig():
        return _side_by_side(folders, runs, scored), values
    table = _side_by_side(folders, runs, scored) if len(runs) <= MOST_COLUMNS else None
    try:
        comparison = _comparison(runs, scored, config)
        single = len({t.variant for t in comparison.trials}) == len(runs)  # no means over seeds to show
        comparison = replace(comparison, command=shlex.join(["diffbench", "compare", *words]))
        text, result = _report(comparison, config, report_folder(config.out, runs), table if single else None)
    except UserError as e:
        if table is None or config != CompareConfig():
            raise
        return f"{table}\n\nno report: {e}", values
    return text, values | result


def _side_by_side(folders: Sequence[Path], runs: Sequence[Run[Any]], scored: Sequence[list[dict[str, Any]]]) -> str:
    titles = [str(folder).removeprefix("runs/") for folder in folders]
    labels: dict[tuple[bool, str], str] = {}  # the first label for each kind of record, so that runs share rows
    for record in (record for records in scored for record in records):
        labels.setdefault(_sampling(record), settings(record))
    facts = [run_facts(run, s, lambda r: labels[_sampling(r)]) for run, s in zip(runs, scored, strict=True)]
    return run_table(list(zip(titles, facts, strict=True)))


def _sampling(record: dict[str, Any]) -> tuple[bool, str]:
    """Return whether a record scores samples, rather than reconstructions, and with which guidance."""
    return "sample" in record, guidance(record)


def _report(
    comparison: Comparison, config: CompareConfig, out: Path, runs: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Write the report; return the text for the terminal (with the table `runs`, if given) and values for scripts.

    Raises:
        UserError: if the metric given to decide by has no value in any run.
    """
    from diffbench.reports.html import save

    page, c = out / "report.html", conclude(comparison)
    if config.primary is not None and not c.ranked():
        known = ", ".join(name for name in c.metrics if metric_of(name).direction) or "none, as no run is scored"
        raise UserError(f"{COMMAND_LINE}: primary: no run has {config.primary}; choose from {known}")
    save(c, out)
    if config.export is not None:
        write_text(Path(config.export), exported(c, Path(config.export).suffix))
    return f"{for_terminal(c, runs)}\n\nreport: {page}", _plain(c) | {"report": str(page)}


def _plain(c: Conclusion) -> dict[str, Any]:
    """Return the answer, the means of each variant, the tests between them and the trials as values for scripts."""
    return {
        "title": c.comparison.title,
        "outcome": c.outcome,
        "answer": c.answer,
        "primary": c.name,
        "variants": {v: {name: asdict(found) for name, found in c.summaries[v].items()} for v in c.variants},
        "tests": [
            {"first": x.first, "second": x.second, "winner": x.winner, "verdict": x.verdict, **asdict(x.paired)}
            for x in c.tests
        ],
        "trials": [
            {"variant": t.variant, "seed": t.seed, "status": t.status, "run": t.run and str(t.run.folder), **t.values}
            for t in c.trials
        ],
        "notes": [*c.comparison.notes, *c.notes],
    }


def _trained(folder: Path) -> Run[Any]:
    run = open_any(folder)
    if not run.has_weights:
        raise UserError(f"{folder}: no weights yet; train the run first")
    return run


def _study(path: Path) -> Path | None:
    """Return the folder of a study, from that folder or the study's YAML; None for a run folder."""
    if path.is_file():
        from diffbench.studies.runner import folder_of_study

        return folder_of_study(path, [], load_study(path))
    return path if (path / "study.yaml").is_file() else None


def _comparison(runs: Sequence[Run[Any]], scored: Sequence[list[dict[str, Any]]], config: CompareConfig) -> Comparison:
    unique = {run.folder.resolve(): (run, s) for run, s in zip(runs, scored, strict=True) if run.kind == "denoiser"}
    if not unique:
        raise UserError(f"{runs[0].folder}: a run of kind {runs[0].kind}; reports compare denoisers")
    denoisers = [run for run, _ in unique.values()]
    guided = Counter(guidance(r) for _, records in unique.values() for r in records)
    chosen = "" if guided.get("", 0) == max(guided.values(), default=0) else guided.most_common(1)[0][0]
    trials: list[Trial] = []
    taken: set[tuple[str, int]] = set()
    for (run, records), name in zip(unique.values(), _names(denoisers), strict=True):
        seed = int(run.values["seed"])
        if (name, seed) in taken:  # a copy of a run, or a rerun in another folder
            name = f"{name} ({run.folder})"
        taken.add((name, seed))
        record = next((r for r in records if guidance(r) == chosen), None)
        if run.complete:
            trials.append(Trial(name, seed, "complete", run, record, recipe=recipe_of(run, record, name)))
        else:
            trials.append(Trial(name, seed, "unfinished", run, record, f"stopped at {run.images_seen:,} images"))
    order = list(dict.fromkeys(t.variant for t in trials))
    trials.sort(key=lambda t: (order.index(t.variant) if len(order) < 100 else 0, t.seed))
    by_bound = all(run.last("val/bound") is not None for run in denoisers) or not any(t.record for t in trials)
    primary = config.primary or ("val/bound" if by_bound else "fd")
    backbones = {run.flat.get("denoiser.name") for run in denoisers}
    keys = _differing(denoisers)
    others = [key for key in keys if not key.startswith("denoiser.")] if len(backbones) > 1 else []
    notes = _notes(trials, others)
    if len(denoisers) < len(runs):
        kinds = sorted({run.kind for run in runs if run.kind != "denoiser"})
        left_out = f"runs of kind {listed(kinds)}, and " if kinds else ""
        notes.append(f"Left out: {left_out}folders that were named twice.")
    data = listed(list(dict.fromkeys(str(run.flat.get("data.name")) for run in denoisers)))
    return Comparison(
        title=f"{listed(order) if len(order) <= 4 else counted(len(order), 'variant')} on {data}",
        question=f"Which of these runs has the better {metric_of(primary).title}?",
        trials=trials,
        primary=primary,
        baseline=config.baseline,
        like_for_like=not others,
        notes=notes,
    )


def _differing(runs: Sequence[Run[Any]]) -> list[str]:
    return [key for key in differing([run.flat for run in runs]) if key not in SAME_VARIANT]


def _names(runs: Sequence[Run[Any]]) -> list[str]:
    """Name the variant of each run: its backbone, then the keys in which runs of that backbone differ."""
    by_backbone: dict[str, list[Run[Any]]] = {}
    for run in runs:
        by_backbone.setdefault(str(run.flat.get("denoiser.name")), []).append(run)
    keys_of = {backbone: _differing(alike) for backbone, alike in by_backbone.items()}
    names: list[str] = []
    configs: dict[str, str] = {}
    for run in runs:
        backbone = str(run.flat.get("denoiser.name"))
        keys = keys_of[backbone]
        parts = [f"{key.rsplit('.', 1)[-1]}={_value(run.flat.get(key))}" for key in keys]
        if len(keys) > MOST_KEYS:
            parts = [run.folder.name.removesuffix(f"-s{run.values['seed']}")]
        name = ", ".join([backbone, *parts])
        signature = json.dumps([run.flat.get(key) for key in keys], default=str)
        if configs.setdefault(name, signature) != signature:  # two folders with the same name
            name = f"{name} {hashlib.sha256(signature.encode()).hexdigest()[:6]}"
        names.append(name)
    return names


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)


def _notes(trials: Sequence[Trial], keys: Sequence[str]) -> list[str]:
    notes = []
    if keys:
        more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
        notes.append(f"Besides the backbone, runs differ in {', '.join(keys[:6])}{more}.")
    sizes = sorted(t.cost.gmacs for t in trials if t.cost)
    if sizes and sizes[-1] > 1.1 * sizes[0]:
        notes.append(f"Networks differ in size: {sizes[0]:.4g} to {sizes[-1]:.4g} GMACs.")
    return notes


def report_folder(given: str | None, runs: Sequence[Run[Any]]) -> Path:
    """Return the folder of a report, `given` or named after the runs.

    Raises:
        UserError: if `given` exists and is not a report.
    """
    if given is not None:
        out = Path(given)
        if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "report.html").is_file()):
            raise UserError(f"{COMMAND_LINE}: out: {out} already exists and is not a report; choose another name")
        return out
    root = Path(str(runs[0].values.get("runs_dir", "runs")))
    if root.resolve() not in runs[0].folder.resolve().parents:  # such as a run copied from another machine
        root = Path("runs")
    stems = dict.fromkeys((run.folder.resolve().parent.name, re.sub(r"-s\d+$", "", run.folder.name)) for run in runs)
    groups = {parent: "-".join([parent, *(stem for p, stem in stems if p == parent)]) for parent, _ in stems}
    seeds = ",".join(map(str, sorted({int(run.values["seed"]) for run in runs})))
    name = "-".join([*groups.values(), f"s{seeds}"])
    if len(name) > 80:
        digest = hashlib.sha256("\n".join(sorted(str(run.folder.resolve()) for run in runs)).encode())
        name = f"{name[:60]}+{digest.hexdigest()[:8]}"
    return root / "reports" / name
