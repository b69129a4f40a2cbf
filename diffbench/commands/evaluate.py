"""`diffbench evaluate`: score samples of a run, or anyone's images."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffbench.core.errors import UserError
from diffbench.evaluation.records import values
from diffbench.reports.tables import run_facts, run_table
from diffbench.runs import evaluate
from diffbench.runs.evaluate_images import evaluate_images
from diffbench.runs.lifecycle import load_any


def run(arguments: argparse.Namespace) -> None:
    """Score the run or the images of `arguments.what`."""
    overrides = list(arguments.overrides)
    if "--against" in overrides[:-1]:  # argparse leaves what follows the folder to the overrides
        arguments.against = overrides.pop(overrides.index("--against") + 1)
        overrides.remove("--against")
    if arguments.against is not None:
        record = evaluate_images(Path(arguments.what), Path(arguments.against), overrides)
        print("\n".join(f"{name:<40} {value:>12.6g}" for name, value in values(record).items()))
        if record["compression"]:
            print(f"note: {record['compression']}")
        return
    run = load_any(arguments.what)
    score(run, overrides)
    print(run_table([(run.folder.name, run_facts(run))]))


def score(run: Any, overrides: Sequence[str] = ()) -> None:
    """Append a run's scores to its records, as its kind is scored."""
    kinds: dict[str, tuple[str, Callable[[Any, Sequence[str]], Any]]] = {
        "denoiser": ("drawing and scoring samples", evaluate.evaluate),
        "autoencoder": ("scoring reconstructions", evaluate.evaluate_autoencoder),
    }
    if run.config.kind not in kinds:
        raise UserError(f"{run.folder}: a run of kind {run.config.kind}; choose a denoiser's or an autoencoder's")
    what, scored = kinds[run.config.kind]
    print(f"{run.folder}: {what}", flush=True)
    scored(run, overrides)
