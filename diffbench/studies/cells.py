"""One cell of a study, apart from all others: a file that says what to train and evaluate, and what does it."""

import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from diffbench.config.kinds import RunConfig
from diffbench.config.layers import dump, read_yaml
from diffbench.config.load import from_dict, to_dict
from diffbench.core.errors import UserError
from diffbench.core.files import locked, write_text
from diffbench.evaluation import records
from diffbench.evaluation.validation_error import as_metrics, denoising_error
from diffbench.reports.results import IMAGE_ERRORS, Status, Trial, save_image_errors
from diffbench.runs import weights
from diffbench.runs.denoiser import DenoiserRun
from diffbench.runs.folder import SAVED, read_config
from diffbench.runs.lifecycle import look
from diffbench.studies.config import AVERAGE
from diffbench.studies.plan import Cell, evaluated
from diffbench.training.checkpoint import newest, step_of

KIND = "cell"


def write_cell(folder: Path, cell: Cell, order: int) -> Path:
    """Writes a cell's file into a study's folder, unless it stands there already."""
    path = folder / "cells" / f"{cell.slug}.yaml"
    values = {
        "kind": KIND,
        "order": order,
        "name": cell.name,
        "group": cell.group.name,
        "seed": cell.seed,
        "folder": str(cell.folder),
        "tuning": cell.tuning,
        "label": cell.label,
        "evaluations": {} if cell.tuning else cell.group.evaluations,
        "config": to_dict(cell.config),
    }
    text = dump(values)
    if not path.exists() or path.read_text() != text:
        write_text(path, text)
    return path


def run_cell(path: Path) -> None:
    """Trains a cell's run where it is not trained, and makes the evaluations that are missing; notes a failure.

    Raises:
        UserError: for what the user can mend.
        SystemExit: 143 or 130 after SIGTERM or SIGINT, with the state saved.
    """
    path.with_suffix(".json").unlink(missing_ok=True)
    try:
        _train_and_evaluate(path)
    except Exception as e:
        ended(path, 2, " ".join(str(e).split())[:300])
        raise


def _train_and_evaluate(path: Path) -> None:
    from diffbench.runs.evaluate import evaluate_as
    from diffbench.runs.lifecycle import train_in

    cell = read_yaml(path)
    config = from_dict(cell["config"], str(path))
    assert isinstance(config, RunConfig)
    folder = Path(cell["folder"])
    with locked(folder.parent, wait=True, name=f".{folder.name}.lock"):  # another study may share the run
        run = train_in(folder, config, [(str(path), cell["config"])])
        save_image_errors(run)
        for variant, changes in cell["evaluations"].items():
            started = time.perf_counter()
            run.use_average(changes.get(AVERAGE, config.ema.decays[0]))
            evaluate_as(
                run, evaluated(config, changes, str(path)), partial(_errors, run) if AVERAGE in changes else dict
            )
            print(f"{variant}: scored in {time.perf_counter() - started:.1f} s", flush=True)


def _errors(run: DenoiserRun) -> dict[str, float]:
    """The validation error of the average that the run holds; metrics.jsonl has that of the first one."""
    return as_metrics("error", denoising_error(run.network, run.process, run.sets[1], run.config.validation.log_snr))


def is_trained(folder: Path, config: RunConfig) -> bool:
    """Whether a run has come to its end, its averages exported."""
    checkpoint = newest(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    images = config.trainer.max_steps * config.trainer.batch_size
    exported = all(weights.exported_images(folder, decay) == images for decay in config.ema.decays)
    return checkpoint is not None and step_of(checkpoint) >= config.trainer.max_steps and exported


def trials_of(path: Path) -> list[Trial]:
    """What a cell has brought so far, one trial for each variant evaluated on its run."""
    cell = read_yaml(path)
    folder, seed = Path(cell["folder"]), int(cell["seed"])
    config = from_dict(cell["config"], str(path))
    assert isinstance(config, RunConfig)
    trained, why = is_trained(folder, config), failure(path)
    run = look(folder) if (folder / SAVED).exists() else None
    trials = []
    for variant, changes in cell["evaluations"].items():
        found = (r for r in reversed(run.results if run else []) if trained and answers(r, config, changes))
        record = next(found, None)
        status: Status = "complete" if record else "failed" if why else "unfinished" if run else "not begun"
        trials.append(Trial(variant, seed, status, run, record, "" if record else why))
    return trials


def answers(record: Mapping[str, Any], config: RunConfig, changes: Mapping[str, Any]) -> bool:
    """Whether a record is the evaluation that a variant asks for."""
    from diffbench.runs.evaluate import scores_as

    wanted = evaluated(config, dict(changes), "study")
    return scores_as(record, wanted, changes.get(AVERAGE, config.ema.decays[0]))


def is_complete(path: Path) -> bool:
    """Whether nothing of a cell is left to do."""
    cell = read_yaml(path)
    config = from_dict(cell["config"], str(path))
    assert isinstance(config, RunConfig)
    folder = Path(cell["folder"])
    if not is_trained(folder, config) or not (folder / IMAGE_ERRORS).exists():
        return False
    return all(r.status == "complete" for r in trials_of(path))


def ended(path: Path, code: int, last: str) -> None:
    """Notes how a cell's process ended."""
    write_text(path.with_suffix(".json"), json.dumps({"exit": code, "last": last}) + "\n")


def failure(path: Path) -> str:
    """Why a cell's last try failed, in one line; nothing where it did not."""
    try:
        how = json.loads(path.with_suffix(".json").read_text())
    except (FileNotFoundError, ValueError):
        return ""
    if how["exit"] == 0:
        return ""
    killed = f"ended by signal {-how['exit']}" if how["exit"] < 0 else f"exit code {how['exit']}"
    return f"{killed}: {how['last']}" if how["last"] else killed


def validation_error(folder: Path) -> float:
    """The last validation error of a run.

    Raises:
        UserError: if it has none.
    """
    errors = [m["val/error"] for m in records.metrics(folder) if "val/error" in m]
    if not errors:
        raise UserError(f"{folder}: no validation error in metrics.jsonl")
    return float(errors[-1])


def config_of(path: Path) -> RunConfig:
    """The config of a cell's run."""
    cell = read_yaml(path)
    config = read_config(Path(cell["folder"]))
    assert isinstance(config, RunConfig)
    return config
