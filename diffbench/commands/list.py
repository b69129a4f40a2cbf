"""`diffbench list`: backbones, presets and experiments, or the runs in folders.

The presets are listed within two seconds: what reads runs is imported where it is needed.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffbench.core.errors import UserError
from diffbench.denoisers import DENOISERS, PRESETS

if TYPE_CHECKING:
    from diffbench.runs.base import Run


def run(arguments: argparse.Namespace) -> None:
    """List the runs in `arguments.folders`, or what there is to train."""
    folders = [Path(folder) for folder in arguments.folders]
    for line in runs(folders) if folders else catalogue(only_models=arguments.models):
        print(line, flush=True)


def catalogue(only_models: bool = False) -> Iterator[str]:
    """Lines on backbones, presets and experiments, or on the presets alone."""
    if not only_models:
        yield "backbones (denoiser.name)"
        yield from (f"  {name:<14} {entry.summary}" for name, entry in DENOISERS.items())
        yield ""
    yield "presets (denoiser.preset), each counted at its own input; GMACs are what papers call Gflops"
    for name, preset in PRESETS.items():
        size = f"{preset.cost.parameters:>12,} parameters  {preset.cost.gmacs:>7.2f} GMACs"
        yield f"  {name:<24} {size}  ({preset.source})"
    if only_models:
        return
    from diffbench.config.layers import experiments

    yield "\nexperiments"
    paths = experiments()
    for path in paths:
        lines = Path(path).read_text().splitlines()
        purpose = lines[0].lstrip("# ") if lines and lines[0].startswith("#") else ""
        yield f"  {path:<{max(map(len, paths))}} {purpose}"


def run_folders(top: Path) -> Iterator[Path]:
    """The run folders below a folder, in the order of their names; it may be one itself.

    Raises:
        UserError: if there is no such folder.
    """
    if not top.is_dir():
        raise UserError(f"{top}: no such folder; name one that holds runs, as runs")
    for folder, below, files in os.walk(top):
        below.sort()
        if "config.yaml" in files:
            below.clear()
            yield Path(folder)


def runs(tops: Sequence[Path]) -> list[str]:
    """A line for each run below the folders, under a headline; below it what cannot be read, and why.

    Raises:
        UserError: if there is no run.
    """
    from diffbench.reports.tables import aligned
    from diffbench.runs.lifecycle import look

    folders = list(dict.fromkeys(folder for top in tops for folder in run_folders(top)))
    if not folders:
        raise UserError(f"{', '.join(map(str, tops))}: no run folder here or below (none has a config.yaml)")
    rows, unreadable = [], []
    for folder in folders:
        try:
            rows.append(_row(look(folder)))
        except (UserError, ValueError, OSError) as e:
            unreadable.append(f"{folder}  {' '.join(str(e).split()).removeprefix(f'{folder}: ')}")
    return [*(aligned(rows) if rows else []), *unreadable]


def _row(run: "Run[Any]") -> dict[str, str]:
    from diffbench.evaluation.records import values
    from diffbench.metrics.registry import metric_of
    from diffbench.reports.results import newest_scores, settings

    trainer, bound = run.values["trainer"], run.last("val/bound")
    batch = int(trainer["batch_size"])
    scored = [
        f"{name} {value:.4g}" + (f" ({how})" if (how := settings(record)) else "")
        for record in newest_scores(run)
        for name, value in values(record).items()
        if metric_of(name).listed
    ]
    changed = max(p.stat().st_mtime for p in (*run.folder.glob("*.jsonl"), run.folder / "config.yaml"))
    return {
        "run": str(run.folder),
        "images": f"{run.images_seen:,}",
        "of": f"{-(-int(trainer['max_images']) // batch) * batch:,}",
        "validation bound": "-" if bound is None else f"{bound:.4f}",
        "newest score": next(iter(scored), "-"),
        "last change": f"{datetime.fromtimestamp(changed):%Y-%m-%d %H:%M}",
    }
