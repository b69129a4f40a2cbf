"""`diffbench study`: train every variant of a study with every seed, and write its report."""

import argparse
from pathlib import Path

from diffbench.config.layers import read_yaml
from diffbench.reports.html import write
from diffbench.reports.tables import for_terminal
from diffbench.runs import slurm
from diffbench.studies.comparison import comparison_of_study
from diffbench.studies.runner import run_study, slurm_folder
from diffbench.studies.trials import KIND, TrialFile


def run(arguments: argparse.Namespace) -> int:
    """Run the study, or the single trial of a study, in `arguments.study`; return 1 if a trial is incomplete."""
    path, overrides = Path(arguments.study), [o for o in arguments.overrides if o != "--dry-run"]
    if path.is_file() and read_yaml(path).get("kind") == KIND:
        TrialFile(path).run()
        return 0
    dry_run, launcher = "--dry-run" in arguments.overrides, arguments.launcher
    folder = run_study(path, overrides, dry_run, launcher)
    if dry_run or (launcher.name == "slurm" and slurm.queued(slurm_folder(folder, launcher))):
        return 0
    comparison = comparison_of_study(folder)
    print(f"\n{for_terminal(write(comparison, folder))}\n\nreport: {folder / 'report.html'}")
    rungs = [comparison.trials, *comparison.rungs.values()]
    return int(any(trial.status != "complete" for trials in rungs for trial in trials))
