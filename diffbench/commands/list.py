"""`diffbench list`: list backbones, presets and experiments, or the runs in folders.

Listing the presets takes less than two seconds, because modules that read runs are imported only where needed.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffbench.config.layers import experiments
from diffbench.core.errors import UserError
from diffbench.core.terminal import two_columns
from diffbench.denoisers import DENOISERS, PRESETS

UNREADABLE = (UserError, ValueError, OSError)
"""Errors that reading a damaged run folder raises."""


def run(arguments: argparse.Namespace) -> None:
    """List the runs in `arguments.folders`, or without folders what can be trained."""
    folders = [Path(folder) for folder in arguments.folders]
    for line in runs(folders) if folders else catalogue(only_models=arguments.models):
        print(line, flush=True)


def as_json(arguments: argparse.Namespace) -> Any:
    """Return the same as values: a list of runs, or backbones, presets and experiments."""
    if arguments.folders:
        return [_values_or_error(folder) for folder in run_folders([Path(folder) for folder in arguments.folders])]
    presets = {name: {"parameters": p.cost.parameters, "gmacs": p.cost.gmacs} for name, p in PRESETS.items()}
    if arguments.models:
        return {"presets": presets}
    backbones = {name: entry.summary for name, entry in DENOISERS.items()}
    return {"backbones": backbones, "presets": presets, "experiments": {path: _purpose(path) for path in experiments()}}


def catalogue(only_models: bool = False) -> Iterator[str]:
    """Yield lines that list backbones, presets and experiments, or only the presets."""
    if not only_models:
        yield "backbones (denoiser.name)"
        yield from (two_columns(f"  {name:<14}", entry.summary) for name, entry in DENOISERS.items())
        yield ""
    yield two_columns("presets", "(denoiser.preset), each counted at its own input size; papers call GMACs Gflops")
    for name, preset in PRESETS.items():
        size = f"{preset.cost.parameters:>12,} parameters  {preset.cost.gmacs:>7.2f} GMACs"
        yield two_columns(f"  {name:<24} {size} ", f"({preset.source})")
    if only_models:
        return
    yield "\nexperiments"
    paths = experiments()
    if not paths:
        yield "  none here; `diffbench init` copies the shipped ones"
    for path in paths:
        yield two_columns(f"  {path:<{max(map(len, paths))}}", _purpose(path))


def _purpose(path: str) -> str:
    line = Path(path).read_text("utf-8-sig", errors="replace").partition("\n")[0]
    return line.lstrip("# ") if line.startswith("#") else ""


def run_folders(tops: Sequence[Path]) -> list[Path]:
    """Find the run folders in and below some folders, which may be run folders themselves; sort them by name.

    Raises:
        UserError: if one of `tops` is not a folder, or there is no run.
    """
    found: dict[Path, None] = {}
    for top in tops:
        if not top.is_dir():
            raise UserError(f"{top}: no such folder; train first, or name a folder that contains runs")
        seen: set[str] = set()
        for folder, below, files in os.walk(top, followlinks=True):
            below.sort()
            if (here := os.path.realpath(folder)) in seen:  # a link to a folder that was visited, perhaps a loop
                below.clear()
                continue
            seen.add(here)
            if "config.yaml" in files:
                below.clear()
                found[Path(folder)] = None
    if not found:
        raise UserError(f"{', '.join(map(str, tops))}: no run folder here or below (none has a config.yaml)")
    return list(found)


def runs(tops: Sequence[Path]) -> list[str]:
    """Format a table of the runs below some folders, followed by the folders that cannot be read, and why.

    Raises:
        UserError: if there is no run.
    """
    from diffbench.reports.runs import run_row
    from diffbench.reports.text import as_text
    from diffbench.runs.lifecycle import open_any

    rows, unreadable = [], []
    for folder in run_folders(tops):
        try:
            rows.append(run_row(open_any(folder)))
        except UNREADABLE as e:
            unreadable.append(f"{folder}  {' '.join(str(e).split()).removeprefix(f'{folder}: ')}")
    return [*([as_text(rows, ("last change", "of"), rule=False)] if rows else []), *unreadable]


def _values_or_error(folder: Path) -> dict[str, Any]:
    from diffbench.reports.runs import run_values
    from diffbench.runs.lifecycle import open_any

    try:
        return run_values(open_any(folder))
    except UNREADABLE as e:
        return {"run": str(folder), "error": str(e)}
