"""`diffbench reproduce`: retrain cells of a report from its page alone, and compare every value."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffbench.commands.arguments import build_keys
from diffbench.config.layers import COMMAND_LINE, SHIPPED, located, parse_overrides, resolve_paths
from diffbench.core.errors import UserError, suggest
from diffbench.core.files import digest, finite
from diffbench.core.progress import span
from diffbench.data.facts import DataFacts
from diffbench.denoisers import source
from diffbench.evaluation import records
from diffbench.metrics.registry import metric_of
from diffbench.reports.record import read
from diffbench.reports.results import Trial
from diffbench.reports.statistics import twin_tolerance
from diffbench.reports.text import Rows, as_text, filled
from diffbench.runs.build import load_data
from diffbench.runs.lifecycle import open_any
from diffbench.studies.trials import FOLDER, TrialFile

MOST_CHANGES = 30
"""Largest number of changes of a page to print."""
VERDICTS = ("bit-identical", "within tolerance", "DIFFERENT")


@dataclass
class ReproduceConfig:
    """Keys of `diffbench reproduce`."""

    out: str | None = None
    """Folder of the new runs; null: a folder in runs/reproduced/ named after the report. The same command resumes."""
    data_path: str | None = None
    """Folder of the images on this machine, for data with a path."""


def run(arguments: argparse.Namespace) -> int:
    """Check a report, and rebuild the given cells; return 1 if anything differs."""
    path = Path(arguments.report)
    keys = [arg for arg in arguments.cells if re.match(r"(out|data_path)=", arg)]
    config = build_keys(ReproduceConfig, parse_overrides(keys))
    record, changes = read(path)
    chosen = _chosen(record["cells"], [arg for arg in arguments.cells if arg not in keys])
    _introduce(path, record, changes)
    if not chosen:
        _list(path, record)
        return int(bool(changes))
    out = Path(config.out) if config.out else Path("runs/reproduced") / f"{path.stem}-{record['sha256'][:8]}"
    if out.exists() and any(out.iterdir()) and not (out / FOLDER).is_dir():
        raise UserError(f"{COMMAND_LINE}: out: {out} already exists and has no reproduced cells; choose another name")
    different = 0
    groups: dict[str, list[str]] = {}  # cells that differ only in sampling share a run
    for name in chosen:
        shared = {k: v for k, v in record["cells"][name]["recipe"].items() if k != "evaluations"}
        groups.setdefault(digest(shared), []).append(name)
    for key, names in groups.items():
        trials = _rebuild(path, record, names, out, key[:10], config.data_path)
        for name in names:
            different += _compare(record, name, trials[name])
    return int(bool(different or changes))


def _chosen(cells: dict[str, Any], args: Sequence[str]) -> list[str]:
    chosen: dict[str, None] = {}
    for arg in args:
        names = [name for name, cell in cells.items() if arg in (name, cell["variant"], "all")]
        if not names:
            raise UserError(
                f"{COMMAND_LINE}: no cell {arg!r}; choose from {', '.join([*list(cells)[:20], 'all'])}"
                f"{suggest(arg, cells)}"
            )
        chosen |= dict.fromkeys(names)
    return list(chosen)


def _introduce(path: Path, record: dict[str, Any], changes: Rows) -> None:
    """Print a report's title and command, warn if this machine differs, and list edits made to the page by hand."""
    made, here = record["made"], records.environment(None, torch.device("cpu"))
    print(filled(f"{record['title']}: {len(record['cells'])} cells, reported {made['time'][:10]}"))
    print(filled(f"command: {record['command'] or 'unknown'}; commit {made['commit']}"))
    before, now = ({**x["versions"], **{k: x[k] for k in ("commit", "platform", "processor")}} for x in (made, here))
    for name in before:
        if before[name] != now.get(name):
            print(filled(f"warning: {name} is {now.get(name)} here, {before[name]} in the report"))
    if changes:
        print(f"\n{path}: CHANGED by hand after it was written")
        print(as_text(changes[:MOST_CHANGES]))
        if len(changes) > MOST_CHANGES:
            print(f"and {len(changes) - MOST_CHANGES:,} more")
    else:
        print("the page matches its record, and the record is intact")


def _list(path: Path, record: dict[str, Any]) -> None:
    cells = record["cells"].items()
    seconds = [(cell["seconds"] or 0) + (cell["record"].get("sample") or {}).get("seconds", 0) for _, cell in cells]
    rows = [
        {"cell": n, "images": f"{c['images']:,}", "about": span(s), "values": str(sum(map(len, c["values"].values())))}
        for (n, c), s in zip(cells, seconds, strict=True)
    ]
    first = next(iter(record["cells"]), "all")
    print(f"\n{as_text(rows)}\n\nall of them: about {span(sum(seconds))}")
    print(f'to train cells again, name them, or all: diffbench reproduce {path} "{first}"')


def _rebuild(
    path: Path, record: dict[str, Any], names: Sequence[str], out: Path, key: str, data_path: str | None
) -> dict[str, list[Trial]]:
    """Train the run that some cells share, and score it; return cell -> its results, one for each budget."""
    cells = [record["cells"][name] for name in names]
    first, config = cells[0], resolve_paths(cells[0]["recipe"]["config"], path)
    threads = first["record"].get("threads") or record["made"]["threads"]
    config["trainer"]["threads"] = threads
    evaluations = {k: v for cell in cells for k, v in cell["recipe"]["evaluations"].items()}
    _find_source(config["denoiser"], path, out / FOLDER)
    if data_path is not None:
        config["data"]["path"] = data_path
    name = re.sub(r"\W+", "_", config["denoiser"]["name"])
    file = TrialFile(out / FOLDER / f"{name}-{key}.yaml")
    file.values = first["recipe"] | {"evaluations": evaluations, "folder": str(out / f"{name}-{key}")}
    file.values["config"] = config | {"runs_dir": str(out), "tag": None}
    with located([(str(path), config)]):
        facts = DataFacts.of(load_data(file.config)[0])
    if (found := facts.fingerprint) != first.get("data", found):
        raise UserError(f"{path}: data: the report's images are {first['data']}, those here are {found}")
    print(f"\n{', '.join(names)}: training again on {threads} thread{'s' if threads > 1 else ''}", flush=True)
    file.write().run()
    trials = file.trials()
    if not evaluations:  # the run was never scored
        trials = [Trial(first["variant"], first["seed"], "complete", open_any(file.folder))]
    return {n: [t for t in trials if t.variant == cell["variant"]] for n, cell in zip(names, cells, strict=True)}


def _find_source(denoiser: dict[str, Any], path: Path, folder: Path) -> None:
    """Copy the source of a custom network to where the run finds it: a page stores only its hash, not the code."""
    if denoiser.get("code") is None:
        return
    places = [folder, path.parent, Path.cwd(), *sorted(p for p in SHIPPED.iterdir() if p.is_dir())]
    try:
        source.load(denoiser["name"].partition(":")[0], denoiser["code"], places).keep(folder)
    except ValueError as e:
        raise UserError(f"{path}: denoiser.name: {e}; put the file next to the report") from None


def _compare(record: dict[str, Any], name: str, found: Sequence[Trial]) -> int:
    """Print every value of a cell with its verdict; return how many differ."""
    cell, rows = record["cells"][name], []
    trials = dict(zip([text for _, text in cell["recipe"]["rungs"]] or [""], found, strict=True))
    last = list(cell["values"])[-1]  # the last budget in the report, which the study may not have finished
    other = cell["record"] and records.difference(cell["record"], trials[last].record or {})
    for budget, reported in cell["values"].items():
        now = finite(trials[budget].values)
        allowed = tolerances(record, cell["variant"], budget)
        equal = {k for k in reported if k in now and reported[k] == now[k]}
        for key, a in reported.items():  # another version may measure more
            b = now.get(key)
            # A bit-identical error or distance is no coincidence: rounding is the same, so nothing may differ.
            exact = any(metric_of(k).is_validation == metric_of(key).is_validation and _continuous(k) for k in equal)
            tolerance = 0.0 if exact else allowed.get(key, 0.0)
            close = a is not None and b is not None and abs(a - b) <= tolerance
            verdict = VERDICTS[0 if key in equal else 1 if close else 2]
            at = {"budget": budget} if budget else {}
            row = {
                "value": key,
                "reported": str(a),
                "found": str(b) if key in now else "-",
                "tolerance": f"{tolerance:.2g}",
            }
            rows.append(at | row | {"verdict": verdict})
    counts = {v: sum(row["verdict"] == v for row in rows) for v in VERDICTS}
    print(f"\n{name}\n{as_text(rows)}")
    if other:
        print(filled(f"warning: {name} was measured differently: {other}"))
    print(f"{name}: {', '.join(f'{n} {verdict}' for verdict, n in counts.items() if n)} of {len(rows)} values")
    return counts["DIFFERENT"]


def _continuous(name: str) -> bool:
    """Return whether a metric is an error or a distance, rather than a fraction of samples."""
    metric = metric_of(name)
    return metric.is_validation or (metric.direction == "lower" and not metric.percent)


def tolerances(record: dict[str, Any], variant: str, budget: str) -> dict[str, float]:
    """Return metric -> how much a value may differ if the machine or its threads round differently; 0 if unknown.

    Rounding errors grow during training until a run differs from its twin as much as from another seed (Summers &
    Dinneen 2021). The tolerance is therefore the bound of 95% of the differences between two seeds, by Student's t over
    the variant's seeds, or over those of all variants if it has only one.
    """
    groups: dict[str, dict[str, list[float]]] = {}
    for cell in record["cells"].values():
        for key, value in cell["values"].get(budget, {}).items():
            if value is not None:
                groups.setdefault(key, {}).setdefault(cell["variant"], []).append(value)
    found = {}
    for key, by_variant in groups.items():
        own = by_variant.get(variant, [])
        found[key] = twin_tolerance([own] if len(own) > 1 else by_variant.values()) or 0.0
    return found
