"""`diffbench train`: train an experiment, score it, and draw a grid; the same command resumes it."""

import argparse
import sys
from pathlib import Path

from diffbench.commands.evaluate import score
from diffbench.config.layers import COMMAND_LINE
from diffbench.core.errors import UserError
from diffbench.data.facts import OtherDataError
from diffbench.reports.results import newest_scores
from diffbench.reports.tables import run_facts, run_table
from diffbench.runs.denoiser import DenoiserRun
from diffbench.runs.evaluate import is_scored
from diffbench.runs.lifecycle import load_any, train


def run(arguments: argparse.Namespace) -> None:
    """Trains the experiment of `arguments.config`."""
    words = [word for word in arguments.overrides if not word.startswith("restart=")]
    restart = [word.partition("=")[2] for word in arguments.overrides if word not in words]
    if restart and restart[-1] not in ("true", "false"):
        raise UserError(f"{COMMAND_LINE}: restart: must be true or false, got {restart[-1]!r}")
    run = train(arguments.config, words, restart=restart[-1:] == ["true"])
    builds_on = getattr(run.config, "autoencoder", None)
    if builds_on is not None and (Path(builds_on) / "config.yaml").is_file():
        autoencoder = load_any(builds_on)
        if not newest_scores(autoencoder):
            score(autoencoder)
    if run.config.kind == "classifier":
        print(f"\n{run_table([(run.folder.name, run_facts(run))])}\n")
        return
    from diffbench.sampling.images import class_columns, save_grid

    grid = run.folder / "samples" / f"final-{run.images_seen:09d}.png"
    if not (is_scored(run) if isinstance(run, DenoiserRun) else newest_scores(run)):
        try:
            score(run)
        except OtherDataError:
            raise
        except UserError as e:  # the run itself is complete
            print(f"not scored: {e}", flush=True)
    if not grid.exists():
        if isinstance(run, DenoiserRun):
            names, columns = run.facts.names, class_columns(len(run.facts.names))
            labels = [i % columns % max(1, len(names)) for i in range(columns * (100 // columns))]
            captions = [names[label] for label in labels] if names else None
            save_grid(run.sample_tensor(len(labels), labels if names else None), columns, grid, captions)
        else:
            save_grid(run.side_by_side(50), 10, grid)
    print(f"\n{run_table([(run.folder.name, run_facts(run))])}\n")
    print(f"samples: {grid}")
    print(f"curves:  {python()} -m tensorboard.main --logdir {run.config.runs_dir}")


def python() -> str:
    """The interpreter as one would type it here."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else "python"
