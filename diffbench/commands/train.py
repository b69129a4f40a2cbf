"""`diffbench train`: train an experiment, score it, and draw a grid of samples; the same command resumes it."""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from diffbench.config.layers import COMMAND_LINE
from diffbench.config.load import load
from diffbench.core.errors import UserError
from diffbench.core.progress import span


def run(arguments: argparse.Namespace) -> None:
    """Train the experiment `arguments.config`."""
    overrides = list(arguments.overrides)
    restart = _switch(overrides, "restart", "true", "false") == "true"
    scored = _switch(overrides, "evaluate", "null", "false") is None
    load(arguments.config, overrides)  # report errors before the slow imports below
    from diffbench.reports.runs import run_facts, run_table
    from diffbench.runs.lifecycle import open_any, train

    run = train(arguments.config, overrides, restart=restart)
    path = getattr(run.config, "autoencoder", None)
    if scored and path is not None and (Path(path) / "config.yaml").is_file():
        _score_once(open_any(path).use_average())
    if scored and run.kind != "classifier":
        _score_once(run)
    grid = None if run.kind == "classifier" else _draw_grid(run)
    print(f"\n{run_table([(run.folder.name, run_facts(run))])}\n")
    if grid is not None:
        _print_hints(run, grid)


def _score_once(run: Any) -> None:
    """Score a run unless it is scored, or drawing its samples would take longer than training."""
    from diffbench.reports.runs import newest_scores
    from diffbench.runs.denoiser import DenoiserRun
    from diffbench.runs.drawing import drawing_seconds
    from diffbench.runs.evaluate import is_scored

    if is_scored(run) if isinstance(run, DenoiserRun) else newest_scores(run):
        return
    if isinstance(run, DenoiserRun) and (seconds := drawing_seconds(run)) > _patience(run):
        print(
            f"not scored: {run.config.evaluate.count:,} samples would take about {span(seconds)}, longer than"
            f" training; to draw and score them: {python()} -m diffbench evaluate {run.folder}",
            flush=True,
        )
        return
    _score(run)


def _patience(run: Any) -> float:
    """Return the seconds that drawing samples may take: as long as training, at least a minute."""
    return max(60.0, float(run.seconds))


def _draw_grid(run: Any) -> Path:
    """Draw a grid of samples, or of reconstructions, unless it exists; return its path."""
    from diffbench.runs.denoiser import DenoiserRun
    from diffbench.runs.drawing import drawing_seconds
    from diffbench.sampling.images import class_columns, save_grid

    grid: Path = run.folder / "samples" / f"final-{run.images_seen:09d}.png"
    if grid.exists():
        return grid
    if isinstance(run, DenoiserRun):
        names, columns = run.label_names, class_columns(len(run.label_names))
        per_sample = drawing_seconds(run) / run.config.evaluate.count
        rows = max(1, min(10, 100 // columns, int(_patience(run) / max(columns * per_sample, 1e-9))))
        captions = [names[i % columns % len(names)] for i in range(columns * rows)] if names else None
        save_grid(run.sample_tensor(columns * rows, captions), columns, grid, captions)
    else:
        save_grid(run.side_by_side(50), 10, grid)
    return grid


def _print_hints(run: Any, grid: Path) -> None:
    """Print where the samples and curves are, and commands to continue with."""
    print(f"samples: {grid}")
    print(f"curves:  {python()} -m tensorboard.main --logdir {run.config.runs_dir}")
    print("         then http://localhost:6006/?smoothing=0")
    if run.kind == "denoiser":
        print(f"more:    {python()} -m diffbench evaluate {run.folder} sample.steps=50")
        if run.null_label is not None and not run.config.sample.guided:
            print(f"         {python()} -m diffbench sample {run.folder} guidance=3   (classes stand out more)")


def _score(run: Any) -> None:
    """Score a run; only print a note if it cannot be scored, since its training is complete."""
    from diffbench.commands.evaluate import score
    from diffbench.data.facts import OtherDataError

    try:
        score(run)
    except OtherDataError:
        raise
    except UserError as e:
        print(f"not scored: {e}", flush=True)


def _switch(overrides: list[str], name: str, *allowed: str) -> str | None:
    """Remove a key that is not part of the config from the overrides; return its last value, None if it is not set."""
    values = [o.partition("=")[2] for o in overrides if o.partition("=")[0] == name]
    if values and values[-1] not in allowed:
        raise UserError(f"{COMMAND_LINE}: {name}: must be {' or '.join(allowed)}, got {values[-1]!r}")
    overrides[:] = [o for o in overrides if o.partition("=")[0] != name]
    return values[-1] if values else None


def python() -> str:
    """Return the command that starts this Python interpreter from the working folder."""
    path = Path(sys.executable)
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return "python" if shutil.which("python") == str(path) else str(path)
