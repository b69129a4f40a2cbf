"""Run folders as a comparison: what `diffbench compare` takes, prints and writes."""

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffbench.config.layers import COMMAND_LINE, located, parse_overrides
from diffbench.config.load import build
from diffbench.core.errors import UserError
from diffbench.reports.results import Comparison, Result
from diffbench.reports.runs import comparable_scores, facts, guidance_of, table
from diffbench.reports.tables import OWN
from diffbench.reports.wording import counted, listed, title
from diffbench.runs.seen import Seen, look
from diffbench.studies.config import load_study

MOST_COLUMNS = 8
"""Runs that are shown one by one, before their variants."""
PASSING = {*OWN, "data.num_workers"}
"""Keys that make no variant."""
MOST_KEYS = 3
"""Differing keys that a variant's name holds; beyond them it is the run folder's."""


@dataclass
class CompareConfig:
    """What `compare` takes as key=value besides runs."""

    out: str | None = None
    """Folder of the report; null: runs/reports/ and a name made of the runs'."""
    primary: str | None = None
    """Metric that decides; null: val/error where all have it, else fd."""
    baseline: str | None = None
    """Variant that all others are compared with; null for all pairs."""


def run(arguments: argparse.Namespace) -> None:
    """Compares `arguments.runs`."""
    for text in compare(arguments.runs):
        print(text, flush=True)


def compare(words: Sequence[str]) -> Iterator[str]:
    """Compares runs, or a study, given first, then key=value; yields texts for the terminal as they come about.

    Raises:
        UserError: naming a folder that holds no run, records that were measured differently, or a wrong key.
    """
    folders = [Path(word) for word in words if not re.match(r"[A-Za-z_]\w*=", word)]
    values = parse_overrides([word for word in words if re.match(r"[A-Za-z_]\w*=", word)])
    with located([(COMMAND_LINE, values)]):
        asked = build(CompareConfig, values)
    if not folders:
        raise UserError(f"{COMMAND_LINE}: name run folders, as runs/digits/dit-s0; see diffbench compare --help")
    study = _study(folders[0])
    if study is not None:
        from diffbench.studies.collect import comparison_of_study  # imports Lightning

        yield _report(_asked(comparison_of_study(study), asked), Path(asked.out) if asked.out else study)
        return
    runs = [look(folder) for folder in folders]
    scored = comparable_scores(runs)
    if len(runs) <= MOST_COLUMNS:
        titles = [str(folder).removeprefix("runs/") for folder in folders]
        yield table([(name, facts(run, s)) for name, run, s in zip(titles, runs, scored, strict=True)])
    apart = {run.folder.resolve() for run in runs if run.kind == "denoiser"}
    if len(apart) < 2 and asked.out is None:
        return
    try:
        yield _report(_comparison(runs, scored, asked), _out(asked.out, runs), runs)
    except UserError as e:
        if len(runs) > MOST_COLUMNS or values:
            raise
        yield f"\nno report: {e}"


def _report(comparison: Comparison, out: Path, known: Sequence[Seen] = ()) -> str:
    from diffbench.reports.report import write

    return f"\n{write(comparison, out, known)}\n\nreport: {out / 'report.html'}"


def _study(path: Path) -> Path | None:
    """The folder of a study, given as that or as its YAML; None for a run folder.

    Raises:
        UserError: for a YAML that is no study's.
    """
    if path.is_file():
        from diffbench.studies.runner import folder_of_study

        study = load_study(path)
        return folder_of_study(path, [], study)
    return path if (path / "study.yaml").is_file() else None


def _asked(comparison: Comparison, asked: CompareConfig) -> Comparison:
    """The comparison with what was asked for in place of what the study says."""
    return replace(
        comparison, primary=asked.primary or comparison.primary, baseline=asked.baseline or comparison.baseline
    )


def comparison_of(runs: Sequence[Path]) -> Comparison:
    """Run folders grouped by config apart from the seed; variants are named by backbone and what else differs.

    Raises:
        UserError: if a folder holds no run or no weights, or records were measured differently.
    """
    looked = [look(folder) for folder in runs]
    return _comparison(looked, comparable_scores(looked), CompareConfig())


def _comparison(runs: Sequence[Seen], scored: Sequence[list[dict[str, Any]]], asked: CompareConfig) -> Comparison:
    kept = {run.folder.resolve(): (run, s) for run, s in zip(runs, scored, strict=True) if run.kind == "denoiser"}
    if not kept:
        raise UserError(f"{runs[0].folder}: a run of kind {runs[0].kind}; reports compare denoisers")
    denoisers = [run for run, _ in kept.values()]
    guided = Counter(guidance_of(r) for _, records in kept.values() for r in records)
    chosen = "" if guided.get("", 0) == max(guided.values(), default=0) else guided.most_common(1)[0][0]
    names, results = _names(denoisers), []
    taken: set[tuple[str, int]] = set()
    for (run, records), name in zip(kept.values(), names, strict=True):
        seed = int(run.values["seed"])
        if (name, seed) in taken:  # a copy, or a rerun elsewhere
            name = f"{name} ({run.folder})"
        taken.add((name, seed))
        record = next((r for r in records if guidance_of(r) == chosen), None)
        done = run.complete
        why = "" if done else f"stopped at {run.images_seen:,} images"
        results.append(Result(name, seed, "complete" if done else "unfinished", run.folder, record, why))
    order = list(dict.fromkeys(r.variant for r in results))
    results.sort(key=lambda r: (order.index(r.variant) if len(order) < 100 else 0, r.seed))
    primary = asked.primary or _primary(denoisers, results)
    backbones = list(dict.fromkeys(str(run.flat.get("denoiser.name")) for run in denoisers))
    besides = _besides(denoisers) if len(backbones) > 1 else []
    notes = _notes(denoisers, besides)
    if len(denoisers) < len(runs):
        others = sorted({run.kind for run in runs if run.kind != "denoiser"})
        notes.append(f"Left out: runs of kind {listed(others)}, and folders that were named twice.")
    data = listed(list(dict.fromkeys(str(run.flat.get("data.name")) for run in denoisers)))
    return Comparison(
        title=f"{listed(order) if len(order) <= 4 else counted(len(order), 'variant')} on {data}",
        question=f"Which of these runs has the better {title(primary)}?",
        results=results,
        primary=primary,
        baseline=asked.baseline,
        like_for_like=not besides,
        notes=notes,
    )


def _names(runs: Sequence[Seen]) -> list[str]:
    """A variant's name for each run: its backbone, then the keys in which runs of that backbone differ."""
    differing: dict[str, list[str]] = {}
    for backbone in dict.fromkeys(str(run.flat.get("denoiser.name")) for run in runs):
        flats = [run.flat for run in runs if str(run.flat.get("denoiser.name")) == backbone]
        keys = dict.fromkeys(key for flat in flats for key in flat)
        differing[backbone] = [k for k in keys if k not in PASSING and any(f.get(k) != flats[0].get(k) for f in flats)]
    names: list[str] = []
    configs: dict[str, str] = {}
    for run in runs:
        backbone = str(run.flat.get("denoiser.name"))
        own = differing[backbone]
        told = [f"{k.rsplit('.', 1)[-1]}={_value(run.flat.get(k))}" for k in own]
        if len(own) > MOST_KEYS:
            told = [re.sub(rf"-s{run.values['seed']}$", "", run.folder.name)]
        name = ", ".join([backbone, *told])
        signature = json.dumps([run.flat.get(k) for k in own], default=str)
        if configs.setdefault(name, signature) != signature:  # as where a folder's name says too little
            name = f"{name} {hashlib.sha256(signature.encode()).hexdigest()[:6]}"
        names.append(name)
    return names


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)


def _primary(runs: Sequence[Seen], results: Sequence[Result]) -> str:
    if all(run.last("val/error") is not None for run in runs) or not any(r.record for r in results):
        return "val/error"
    return "fd"


def _besides(runs: Sequence[Seen]) -> list[str]:
    """Keys outside of the network in which runs differ."""
    first, keys = runs[0].flat, dict.fromkeys(key for run in runs for key in run.flat)
    outside = [k for k in keys if k not in PASSING and not k.startswith("denoiser.")]
    return [k for k in outside if any(run.flat.get(k) != first.get(k) for run in runs)]


def _notes(runs: Sequence[Seen], besides: Sequence[str]) -> list[str]:
    notes = []
    if besides:
        more = f" and {len(besides) - 6} more" if len(besides) > 6 else ""
        notes.append(f"Besides the backbone, runs differ in {', '.join(besides[:6])}{more}.")
    try:
        sizes = sorted({run.cost.gmacs for run in runs})
    except (UserError, ValueError, OSError):
        return notes
    if sizes[-1] > 1.1 * sizes[0]:
        notes.append(f"Networks differ in size: {sizes[0]:.4g} to {sizes[-1]:.4g} GMACs.")
    return notes


def _out(given: str | None, runs: Sequence[Seen]) -> Path:
    """The report's folder.

    Raises:
        UserError: if something else than a report lies there.
    """
    if given is not None:
        out = Path(given)
        if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "report.html").is_file()):
            raise UserError(f"{COMMAND_LINE}: out: {out} exists already and holds no report; choose another name")
        return out
    root = Path(str(runs[0].values.get("runs_dir", "runs")))
    if root.resolve() not in runs[0].folder.resolve().parents:  # as of a run from another machine
        root = Path("runs")
    words = dict.fromkeys([run.folder.resolve().parent.name for run in runs])
    words |= dict.fromkeys(re.sub(r"-s\d+$", "", run.folder.name) for run in runs)
    name = "-".join(words)
    if len(name) > 80:
        digest = hashlib.sha256("\n".join(sorted(str(run.folder.resolve()) for run in runs)).encode())
        name = f"{name[:60]}+{digest.hexdigest()[:8]}"
    return root / "reports" / name
