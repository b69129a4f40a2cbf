"""`diffbench train`: train an experiment, score it, and draw a grid; the same command resumes it."""

import argparse
import sys
from pathlib import Path
from typing import Any

from diffbench.config.layers import COMMAND_LINE
from diffbench.config.load import load
from diffbench.core.errors import UserError
from diffbench.core.progress import span


def run(arguments: argparse.Namespace) -> None:
    """Trains the experiment of `arguments.config`."""
    words = list(arguments.overrides)
    restart = _switch(words, "restart", "true", "false") == "true"
    scored = _switch(words, "evaluate", "null", "false") is None
    load(arguments.config, words)  # whose errors need not wait for what comes next
    from diffbench.reports.runs import newest_scores, run_facts, run_table
    from diffbench.runs.denoiser import DenoiserRun
    from diffbench.runs.drawing import drawing_seconds
    from diffbench.runs.evaluate import is_scored
    from diffbench.runs.lifecycle import look, train

    run = train(arguments.config, words, restart=restart)
    builds_on = getattr(run.config, "autoencoder", None)
    if builds_on is not None and (Path(builds_on) / "config.yaml").is_file():
        autoencoder = look(builds_on).use_average()
        if scored and not newest_scores(autoencoder):
            _score(autoencoder)
    if run.config.kind == "classifier":
        print(f"\n{run_table([(run.folder.name, run_facts(run))])}\n")
        return
    from diffbench.sampling.images import class_columns, save_grid

    grid = run.folder / "samples" / f"final-{run.images_seen:09d}.png"
    patience = max(60.0, run.seconds)
    if scored and not (is_scored(run) if isinstance(run, DenoiserRun) else newest_scores(run)):
        if isinstance(run, DenoiserRun) and (seconds := drawing_seconds(run)) > patience:
            print(
                f"not scored: {run.config.evaluate.count:,} samples would take about {span(seconds)}, longer than"
                f" training; to draw and score them: {python()} -m diffbench evaluate {run.folder}",
                flush=True,
            )
        else:
            _score(run)
    if not grid.exists():
        if isinstance(run, DenoiserRun):
            names, columns = run.label_names, class_columns(len(run.label_names))
            each = drawing_seconds(run) / run.config.evaluate.count
            rows = max(1, min(10, 100 // columns, int(patience / max(columns * each, 1e-9))))
            captions = [names[i % columns % len(names)] for i in range(columns * rows)] if names else None
            save_grid(run.sample_tensor(columns * rows, captions), columns, grid, captions)
        else:
            save_grid(run.side_by_side(50), 10, grid)
    print(f"\n{run_table([(run.folder.name, run_facts(run))])}\n")
    print(f"samples: {grid}")
    print(f"curves:  {python()} -m tensorboard.main --logdir {run.config.runs_dir}")
    print("         then http://localhost:6006/?smoothing=0")
    if isinstance(run, DenoiserRun):
        print(f"more:    {python()} -m diffbench evaluate {run.folder} sample.steps=50")
        if run.null_label is not None and not run.config.sample.guided:
            print(f"         {python()} -m diffbench sample {run.folder} guidance=3   (classes stand out more)")


def _score(run: Any) -> None:
    """Score a run, which is complete whether or not that can be done."""
    from diffbench.commands.evaluate import score
    from diffbench.data.facts import OtherDataError

    try:
        score(run)
    except OtherDataError:
        raise
    except UserError as e:
        print(f"not scored: {e}", flush=True)


def _switch(words: list[str], name: str, *allowed: str) -> str | None:
    """The last value that a word of the command alone has, which is taken out of the overrides; None without one."""
    given = [word.partition("=")[2] for word in words if word.partition("=")[0] == name]
    if given and given[-1] not in allowed:
        raise UserError(f"{COMMAND_LINE}: {name}: must be {' or '.join(allowed)}, got {given[-1]!r}")
    words[:] = [word for word in words if word.partition("=")[0] != name]
    return given[-1] if given else None


def python() -> str:
    """The interpreter as one would type it here."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else "python"
