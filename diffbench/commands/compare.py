"""`diffbench compare`: a table and a report of several runs, or of a study."""

import argparse
import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from diffbench.config.layers import COMMAND_LINE, located, parse_overrides
from diffbench.config.load import build
from diffbench.core.errors import UserError
from diffbench.core.files import write_text
from diffbench.metrics.registry import metric_of
from diffbench.reports.conclusions import Conclusion
from diffbench.reports.export import check_export, exported
from diffbench.reports.results import Comparison, Trial, differing
from diffbench.reports.runs import comparable_scores, guidance, run_facts, run_table, run_values, settings
from diffbench.reports.tables import IDENTITY, for_terminal
from diffbench.reports.text import counted, listed
from diffbench.runs.base import Run
from diffbench.runs.lifecycle import look
from diffbench.studies.comparison import comparison_of_study
from diffbench.studies.config import load_study
from diffbench.studies.trials import recipe_of

MOST_COLUMNS = 8
"""Runs that are shown one by one, before their variants."""
SAME_VARIANT = {*IDENTITY, "data.num_workers"}
"""Keys that do not make another variant."""
MOST_KEYS = 3
"""Differing keys in a variant's name; beyond them it is named after the run folder."""

T = TypeVar("T")


@dataclass
class CompareConfig:
    """Keys of `compare` besides runs."""

    out: str | None = None
    """Folder of the report; null: runs/reports/ and a name made of the runs'."""
    primary: str | None = None
    """Metric that decides; null: val/bound where all have it, else fd."""
    baseline: str | None = None
    """Variant that all others are compared with; null for all pairs."""
    export: str | None = None
    """File for the main tables, .tex (booktabs) or .md; null writes none."""


def run(arguments: argparse.Namespace) -> None:
    """Compare `arguments.runs`."""
    print(compare(arguments.runs)[0])


def as_json(arguments: argparse.Namespace) -> dict[str, Any]:
    """The runs, and the conclusion where there is one, as values."""
    return compare(arguments.runs)[1]


def split_words(words: Sequence[str], keys: type[T], verb: str) -> tuple[list[Path], T]:
    """The folders among a command's words, and its keys as a dataclass.

    Raises:
        UserError: if there is no folder, or a key is wrong.
    """
    given = [word for word in words if re.match(r"[A-Za-z_]\w*=", word)]
    folders = [Path(word) for word in words if word not in given]
    if not folders:
        raise UserError(f"{COMMAND_LINE}: name run folders, as runs/digits/dit-s0; see diffbench {verb} --help")
    return folders, asked_for(keys, parse_overrides(given))


def asked_for(keys: type[T], values: dict[str, Any]) -> T:
    """A command's keys as a dataclass; a wrong one is a UserError that names it."""
    with located([(COMMAND_LINE, values)]):
        return build(keys, values)


def compare(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Compare runs, or a study, given first, then key=value; return the text for the terminal, and values for scripts.

    Raises:
        UserError: naming a folder without a run, records that were measured differently, or a wrong key.
    """
    folders, asked = split_words(words, CompareConfig, "compare")
    if asked.export is not None:
        check_export(Path(asked.export))
    study = _study(folders[0])
    if study is not None:
        if len(folders) > 1:
            raise UserError(f"{COMMAND_LINE}: {folders[1]}: a study is reported alone; compare runs with runs")
        found = comparison_of_study(study)
        pairs = any(word.startswith("baseline=") for word in words)  # null is all of them
        baseline = asked.baseline if pairs else found.baseline
        found = replace(found, primary=asked.primary or found.primary, baseline=baseline)
        return _report(found, report_folder(asked.out, []) if asked.out else study, asked.export)
    runs = [_trained(folder) for folder in folders]
    scored = comparable_scores(runs)
    values = {"runs": [run_values(run) for run in runs]}
    if len({run.folder.resolve() for run in runs if run.kind == "denoiser"}) < 2 and asked == CompareConfig():
        return _side_by_side(folders, runs, scored), values
    table = _side_by_side(folders, runs, scored) if len(runs) <= MOST_COLUMNS else None
    try:
        comparison = _comparison(runs, scored, asked)
        once = len({t.variant for t in comparison.trials}) == len(runs)  # no means over seeds to show
        comparison = replace(comparison, command=shlex.join(["diffbench", "compare", *words]))
        text, more = _report(comparison, report_folder(asked.out, runs), asked.export, table if once else None)
    except UserError as e:
        if table is None or asked != CompareConfig():
            raise
        return f"{table}\n\nno report: {e}", values
    return text, values | more


def _side_by_side(folders: Sequence[Path], runs: Sequence[Run[Any]], scored: Sequence[list[dict[str, Any]]]) -> str:
    titles = [str(folder).removeprefix("runs/") for folder in folders]
    labels: dict[tuple[bool, str], str] = {}  # of the first run's records, so that what is alike shares a row
    for record in (record for records in scored for record in records):
        labels.setdefault(_sampling(record), settings(record))
    facts = [run_facts(run, s, lambda r: labels[_sampling(r)]) for run, s in zip(runs, scored, strict=True)]
    return run_table(list(zip(titles, facts, strict=True)))


def _sampling(record: dict[str, Any]) -> tuple[bool, str]:
    """The subject of a record: samples or reconstructions, and their guidance."""
    return "sample" in record, guidance(record)


def _report(
    comparison: Comparison, out: Path, export: str | None, runs: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Write the report and tables; return its text, with a table of `runs` where that says more, and its values."""
    from diffbench.reports.html import write

    page, conclusion = out / "report.html", write(comparison, out)
    if export is not None:
        write_text(Path(export), exported(conclusion, Path(export).suffix))
    return f"{for_terminal(conclusion, runs)}\n\nreport: {page}", _plain(conclusion) | {"report": str(page)}


def _plain(c: Conclusion) -> dict[str, Any]:
    """The answer, every variant's means, the tests between them, the trials, as values for scripts."""
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
    run = look(folder)
    if not run.has_weights:
        raise UserError(f"{folder}: no weights yet; train the run first")
    return run


def _study(path: Path) -> Path | None:
    """The folder of a study, given as that or as its YAML; None for a run folder."""
    if path.is_file():
        from diffbench.studies.runner import folder_of_study

        return folder_of_study(path, [], load_study(path))
    return path if (path / "study.yaml").is_file() else None


def _comparison(runs: Sequence[Run[Any]], scored: Sequence[list[dict[str, Any]]], asked: CompareConfig) -> Comparison:
    kept = {run.folder.resolve(): (run, s) for run, s in zip(runs, scored, strict=True) if run.kind == "denoiser"}
    if not kept:
        raise UserError(f"{runs[0].folder}: a run of kind {runs[0].kind}; reports compare denoisers")
    denoisers = [run for run, _ in kept.values()]
    guided = Counter(guidance(r) for _, records in kept.values() for r in records)
    chosen = "" if guided.get("", 0) == max(guided.values(), default=0) else guided.most_common(1)[0][0]
    trials: list[Trial] = []
    taken: set[tuple[str, int]] = set()
    for (run, records), name in zip(kept.values(), _names(denoisers), strict=True):
        seed = int(run.values["seed"])
        if (name, seed) in taken:  # a copy, or a rerun elsewhere
            name = f"{name} ({run.folder})"
        taken.add((name, seed))
        record = next((r for r in records if guidance(r) == chosen), None)
        if run.complete:
            trials.append(Trial(name, seed, "complete", run, record, recipe=recipe_of(run, record, name)))
        else:
            trials.append(Trial(name, seed, "unfinished", run, record, f"stopped at {run.images_seen:,} images"))
    order = list(dict.fromkeys(t.variant for t in trials))
    trials.sort(key=lambda t: (order.index(t.variant) if len(order) < 100 else 0, t.seed))
    measured = all(run.last("val/bound") is not None for run in denoisers) or not any(t.record for t in trials)
    primary = asked.primary or ("val/bound" if measured else "fd")
    backbones = {run.flat.get("denoiser.name") for run in denoisers}
    keys = _differing(denoisers)
    besides = [key for key in keys if not key.startswith("denoiser.")] if len(backbones) > 1 else []
    notes = _notes(trials, besides)
    if len(denoisers) < len(runs):
        others = sorted({run.kind for run in runs if run.kind != "denoiser"})
        kinds = f"runs of kind {listed(others)}, and " if others else ""
        notes.append(f"Left out: {kinds}folders that were named twice.")
    data = listed(list(dict.fromkeys(str(run.flat.get("data.name")) for run in denoisers)))
    return Comparison(
        title=f"{listed(order) if len(order) <= 4 else counted(len(order), 'variant')} on {data}",
        question=f"Which of these runs has the better {metric_of(primary).title}?",
        trials=trials,
        primary=primary,
        baseline=asked.baseline,
        like_for_like=not besides,
        notes=notes,
    )


def _differing(runs: Sequence[Run[Any]]) -> list[str]:
    return [key for key in differing([run.flat for run in runs]) if key not in SAME_VARIANT]


def _names(runs: Sequence[Run[Any]]) -> list[str]:
    """A variant's name for each run: its backbone, then the keys in which runs of that backbone differ."""
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
        if configs.setdefault(name, signature) != signature:  # two folders of one name
            name = f"{name} {hashlib.sha256(signature.encode()).hexdigest()[:6]}"
        names.append(name)
    return names


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)


def _notes(trials: Sequence[Trial], besides: Sequence[str]) -> list[str]:
    notes = []
    if besides:
        more = f" and {len(besides) - 6} more" if len(besides) > 6 else ""
        notes.append(f"Besides the backbone, runs differ in {', '.join(besides[:6])}{more}.")
    sizes = sorted(t.cost.gmacs for t in trials if t.cost)
    if sizes and sizes[-1] > 1.1 * sizes[0]:
        notes.append(f"Networks differ in size: {sizes[0]:.4g} to {sizes[-1]:.4g} GMACs.")
    return notes


def report_folder(given: str | None, runs: Sequence[Run[Any]]) -> Path:
    """The report's folder.

    Raises:
        UserError: if something other than a report is there.
    """
    if given is not None:
        out = Path(given)
        if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "report.html").is_file()):
            raise UserError(f"{COMMAND_LINE}: out: {out} exists already and holds no report; choose another name")
        return out
    root = Path(str(runs[0].values.get("runs_dir", "runs")))
    if root.resolve() not in runs[0].folder.resolve().parents:  # as of a run from another machine
        root = Path("runs")
    named = dict.fromkeys((run.folder.resolve().parent.name, re.sub(r"-s\d+$", "", run.folder.name)) for run in runs)
    groups = {parent: "-".join([parent, *(stem for p, stem in named if p == parent)]) for parent, _ in named}
    seeds = ",".join(map(str, sorted({int(run.values["seed"]) for run in runs})))
    name = "-".join([*groups.values(), f"s{seeds}"])
    if len(name) > 80:
        digest = hashlib.sha256("\n".join(sorted(str(run.folder.resolve()) for run in runs)).encode())
        name = f"{name[:60]}+{digest.hexdigest()[:8]}"
    return root / "reports" / name
