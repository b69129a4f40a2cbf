"""`diffbench evaluate`: score samples from a run, or any images."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffbench.core.errors import UserError
from diffbench.evaluation.records import values
from diffbench.reports.runs import run_facts, run_table
from diffbench.runs.autoencoder import AutoencoderRun
from diffbench.runs.denoiser import DenoiserRun
from diffbench.runs.evaluate import evaluate
from diffbench.runs.evaluate_images import evaluate_images
from diffbench.runs.lifecycle import open_any


def run(arguments: argparse.Namespace) -> None:
    """Score the run or the images of `arguments.what`."""
    (record, *_), scored = _evaluate(arguments)
    if scored is not None:
        print(run_table([(scored.folder.name, run_facts(scored))]))
        return
    print("\n".join(f"{name:<40} {value:>12.6g}" for name, value in values(record).items()))
    if record["compression"]:
        print(f"note: {record['compression']}")


def as_json(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Score as `run` does; return the records of the scores."""
    return _evaluate(arguments)[0]


def _evaluate(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], Any]:
    """Score a run or images; return the new records and the run, or None for images."""
    overrides: list[str] = []
    for word in arguments.overrides:  # argparse leaves an --against that follows the folder in here
        overrides += word.split("=", 1) if word.startswith("--against=") else [word]
    if "--against" in overrides[:-1]:
        arguments.against = overrides.pop(overrides.index("--against") + 1)
        overrides.remove("--against")
    if arguments.against is not None:
        return [evaluate_images(Path(arguments.what), Path(arguments.against), overrides)], None
    run = open_any(arguments.what).use_average()
    return score(run, overrides), run


def score(run: Any, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Score a denoiser's samples or an autoencoder's reconstructions; append the records to the run and return them."""
    if isinstance(run, DenoiserRun):
        print(f"{run.folder}: drawing and scoring samples", flush=True)
        return evaluate(run, overrides)
    if isinstance(run, AutoencoderRun):
        print(f"{run.folder}: scoring reconstructions", flush=True)
        return [run.score(overrides)]
    raise UserError(f"{run.folder}: a run of kind {run.kind}; choose a denoiser's or an autoencoder's")
