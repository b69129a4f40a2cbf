"""`diffbench curves`: write an experiment's reference curves from runs that differ only in their seed."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from diffbench.commands.arguments import split_arguments
from diffbench.config.layers import COMMAND_LINE
from diffbench.core.errors import UserError
from diffbench.evaluation.curves import LEAST, bands_of, write_curves
from diffbench.metrics.registry import METRICS, metric_of
from diffbench.reports.results import differing
from diffbench.reports.text import counted
from diffbench.runs.folder import is_free
from diffbench.runs.lifecycle import open_any

NAMES = ["train/loss", *(metric.name for metric in METRICS.values() if metric.is_validation and metric.direction)]
"""Metrics whose reference curve is a band over runs."""


@dataclass
class CurvesConfig:
    """Keys of `diffbench curves`."""

    out: str | None = None
    """CSV file; null: in curves/ next to the runs' experiment, e.g. experiments/digits/curves/dit.csv."""


def run(arguments: argparse.Namespace) -> None:
    """Write the curves of `arguments.runs`, which may differ only in their seed."""
    folders, config = split_arguments(arguments.runs, CurvesConfig, "curves")
    runs = {(run := open_any(folder)).folder.resolve(): run for folder in folders}.values()
    if len(runs) < LEAST:
        raise UserError(
            f"{COMMAND_LINE}: {counted(len(runs), 'run')}; a band needs at least {LEAST}, with different seeds"
        )
    first, *others = runs
    for other in others:
        if changed := sorted(k for k in differing([first.flat, other.flat]) if k != "seed" and not is_free(k)):
            raise UserError(f"{first.folder} and {other.folder}: differ in {', '.join(changed[:4])}; only the seed may")
    if len({run.values["seed"] for run in runs}) < len(runs):
        raise UserError(f"{COMMAND_LINE}: two of these runs have the same seed; a band needs different ones")
    if unfinished := [str(run.folder) for run in runs if not run.complete]:
        raise UserError(f"{unfinished[0]}: not complete; finish training it first")
    stem = first.folder.name.removesuffix(f"-s{first.values['seed']}")
    default = Path("experiments") / first.folder.resolve().parent.name / "curves" / f"{stem}.csv"
    out = default if config.out is None else Path(config.out)
    bands = bands_of([run.metrics for run in runs], NAMES)
    write_curves(out, bands)
    for name, band in bands.items():
        title, last = metric_of(name).title, f"{band.low[-1]:.4g} to {band.high[-1]:.4g}"
        print(f"{title}: {len(band.images)} points, at {band.images[-1]:,} images {last}")
    print(f"{out}: band of {len(runs)} runs")
