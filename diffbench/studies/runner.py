"""Studies: planned, estimated, run cell by cell, resumed."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffbench.config.layers import dump, parse_overrides
from diffbench.core.errors import UserError
from diffbench.core.files import locked, write_text
from diffbench.core.progress import span
from diffbench.runs.slurm import LauncherConfig, sized, submit, summary
from diffbench.studies import cells as cell_files
from diffbench.studies.budget import Probe
from diffbench.studies.config import StudyConfig, load_study
from diffbench.studies.notes import notes_of, plan_text
from diffbench.studies.plan import Cell, Group, cells, groups, tuning_cells

UNNAMED = ("jobs", "runs_dir", "seeds")
"""Overrides that make no other study."""
HERE = LauncherConfig()


def folder_of_study(path: Path, overrides: Sequence[str], study: StudyConfig) -> Path:
    """runs/studies/<yaml stem>[-<overrides>]."""
    changed = [o for o in overrides if next(iter(parse_overrides([o]))) not in UNNAMED]
    tag = re.sub(r"[^\w.+=,-]+", "_", "-".join(changed))[:80]
    return Path(study.runs_dir) / "studies" / (f"{path.stem}-{tag}" if tag else path.stem)


def run_study(
    path: str | Path, overrides: Sequence[str] = (), dry_run: bool = False, launcher: LauncherConfig = HERE
) -> Path:
    """Plans a study, says what it will cost, and runs what is missing of it; returns its folder.

    Complete cells are skipped, failed ones tried again; one that fails does not stop the others.

    Args:
        path: the study's YAML.
        overrides: key=value for its keys.
        dry_run: stop after the plan.
        launcher: hands the cells to SLURM in place of running them; they and their results are the same. The same
            command again hands over what is neither complete nor in the queue, after tuning the cells themselves.

    Raises:
        UserError: one line that names file and key.
        SystemExit: 143 after SIGTERM, with the cells' states saved.
    """
    path = Path(path)
    study = load_study(path, overrides)
    if launcher.name == "slurm" and study.stop.seconds is not None:
        raise UserError(f"{path}: stop.seconds: is measured on this machine, not SLURM's; choose images or flops")
    folder = folder_of_study(path, overrides, study)
    with locked(folder):
        probe = Probe(folder / "rates.json", study.jobs)
        tuning = tuning_cells(study, path, probe.training_rate)
        tuned, chosen_all = _tuned(folder, tuning)
        found = groups(study, path, tuned, probe.training_rate)
        _on_one_machine(path, found, launcher)
        print(plan_text(study, folder, found, tuning, probe), flush=True)
        if dry_run:
            return folder
        write_text(folder / "study.yaml", dump(dataclasses.asdict(study)))
        _autoencoders(found, launcher)
        if not chosen_all:
            if not _run(folder, tuning, study.jobs, launcher):
                return folder
            tuned, _ = _tuned(folder, tuning)
            for label, values in tuned.items():
                print(f"tuning chose {', '.join(f'{k}={v}' for k, v in values.items())} for {label}", flush=True)
            found = groups(study, path, tuned, probe.training_rate)
        made = cells(study, found)
        write_text(folder / "notes.json", json.dumps(notes_of(study, found, tuning, tuned), ensure_ascii=False) + "\n")
        _forget(folder, [*tuning, *made])
        _run(folder, made, study.jobs, launcher)
    return folder


def _on_one_machine(path: Path, found: Iterable[Group], launcher: LauncherConfig) -> None:
    """A cell is one command, which starts the processes of its run itself.

    Raises:
        UserError: if a cell's run, or the launcher, asks for more machines or commands.
    """
    most = max(group.config.trainer.num_nodes for group in found)
    if most > 1:
        raise UserError(f"{path}: trainer.num_nodes: {most} is too many, a cell trains on one machine; allowed: 1")
    for key in ("nodes", "ntasks_per_node"):
        if (getattr(launcher, key) or 1) > 1:
            raise UserError(f"launcher.{key}: a cell is one process, which starts those of trainer.devices; allowed: 1")


def _tuned(folder: Path, tuning: Iterable[Cell]) -> tuple[dict[str, dict[str, Any]], bool]:
    """What tuning chose for each label so far, and whether it is done: the least validation error of the grid."""
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    complete = True
    for cell in tuning:
        if not cell_files.is_trained(cell.folder, cell.config):
            complete = False
            continue
        error = cell_files.validation_error(cell.folder)
        if cell.label not in best or error < best[cell.label][0]:
            best[cell.label] = error, cell.tuning or {}
    return {label: values for label, (_, values) in best.items()}, complete


def _autoencoders(found: Iterable[Group], launcher: LauncherConfig) -> None:
    """Trains the autoencoders that experiments name before any cell, which would train them side by side.

    Raises:
        UserError: if one is missing and this machine is not to train it.
    """
    from diffbench.runs.lifecycle import autoencoder_missing, with_autoencoder

    for config in {repr(g.config.data): g.config for g in found if g.config.autoencoder is not None}.values():
        if launcher.name == "slurm" and (command := autoencoder_missing(config)):
            raise UserError(f"{command[0]}: not trained yet; first: diffbench train {' '.join(command)} launcher=slurm")
        with_autoencoder(config)


def _forget(folder: Path, plan: Iterable[Cell]) -> None:
    """Removes the files of cells that the plan no longer has; their runs stay."""
    kept = {cell.slug for cell in plan}
    for path in (folder / "cells").glob("*.yaml"):
        if path.stem not in kept:
            path.unlink()


def _run(folder: Path, plan: Sequence[Cell], jobs: int, launcher: LauncherConfig) -> bool:
    """Runs the cells that are not complete, `jobs` at a time, each in a process of its own with its own log.

    Returns:
        Whether all have had their turn: not those that SLURM was given, or has already.
    """
    paths = [cell_files.write_cell(folder, cell, order) for order, cell in enumerate(plan)]
    names = {path: cell.name for path, cell in zip(paths, plan, strict=True)}
    waiting = deque(path for path in paths if not cell_files.is_complete(path))
    skipped = len(paths) - len(waiting)
    if skipped:
        print(f"{skipped} of {len(paths)} cells are complete already", flush=True)
    if launcher.name == "slurm":
        if waiting:
            trainers = {path: cell.config.trainer for path, cell in zip(paths, plan, strict=True)}
            _hand_over(folder, [(path, sized(launcher, trainers[path])) for path in waiting])
        return not waiting
    total, started, done = len(waiting), time.monotonic(), 0
    running: dict[subprocess.Popen[bytes], tuple[Path, float]] = {}
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                path = waiting.popleft()
                running[_start(path, jobs)] = path, time.monotonic()
            time.sleep(0.1)
            for process in [p for p in running if p.poll() is not None]:
                path, begun = running.pop(process)
                cell_files.ended(path, process.returncode, _last_line(path.with_suffix(".log")))
                done += 1
                left = (time.monotonic() - started) / done * (total - done)
                how = cell_files.failure(path)
                said = f"FAILED ({how}; {path.with_suffix('.log')})" if how else "done"
                took = span(time.monotonic() - begun)
                print(f"[{done}/{total}] {names[path]}: {said} in {took}, {span(left)} to go", flush=True)
    finally:
        for process in running:
            process.terminate()  # saves its state
        for process in running:
            process.wait()
        signal.signal(signal.SIGTERM, previous)
    return True


def _hand_over(folder: Path, asked: Sequence[tuple[Path, LauncherConfig]]) -> None:
    """Gives cells to SLURM, those that ask for the same as an array; those that wait or run there stay as they are."""
    logs, jobs = slurm_folder(folder, asked[0][1]), []
    for cpus in dict.fromkeys(launcher.cpus_per_task for _, launcher in asked):
        alike = [(path, launcher) for path, launcher in asked if launcher.cpus_per_task == cpus]
        launcher = dataclasses.replace(alike[0][1], folder=str(logs))
        jobs += submit([["study", str(path)] for path, _ in alike], launcher, folder.name)
    print(f"{summary(jobs, logs)}\nthen: the same command again, or diffbench compare {folder}", flush=True)


def slurm_folder(folder: Path, launcher: LauncherConfig) -> Path:
    """Where the scripts and logs of a study's jobs lie."""
    return Path(launcher.folder or folder / "slurm")


def _start(path: Path, jobs: int) -> "subprocess.Popen[bytes]":
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    environment = (
        {"OMP_NUM_THREADS": threads, **os.environ} if jobs == 1 else {**os.environ, "OMP_NUM_THREADS": threads}
    )
    path.with_suffix(".json").unlink(missing_ok=True)
    with path.with_suffix(".log").open("ab") as log:
        command = [sys.executable, "-m", "diffbench", "study", str(path)]
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )


def _stop(number: int, frame: Any) -> None:
    print("stopped; the same command goes on", file=sys.stderr)
    raise SystemExit(128 + number)


def _last_line(log: Path) -> str:
    """The last line of a log's end."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]
