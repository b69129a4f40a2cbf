"""Run a study: plan it, print what it will cost, and run the trials that are missing."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from diffbench.config.documents import dump
from diffbench.config.layers import located, parse_overrides, read_yaml
from diffbench.config.load import to_dict
from diffbench.core.distributed import threads_each
from diffbench.core.errors import UserError
from diffbench.core.files import locked, write_text
from diffbench.core.progress import span
from diffbench.runs.build import load_data
from diffbench.runs.checks import check_evaluation
from diffbench.runs.denoiser import DenoiserRun
from diffbench.runs.folder import check_place, short
from diffbench.runs.launcher import LauncherConfig
from diffbench.runs.lifecycle import autoencoder_arguments, with_autoencoder
from diffbench.runs.slurm import sized, submit, summary
from diffbench.studies.budget import Probe
from diffbench.studies.config import StudyConfig, file_name, load_study
from diffbench.studies.notes import notes_of, plan_text
from diffbench.studies.plan import TrainingVariant, evaluation_config, planned_trials, training_variants
from diffbench.studies.trials import FOLDER, TrialFile
from diffbench.studies.tuning import tuning_so_far

UNNAMED = ("jobs", "runs_dir", "seeds")
"""Overrides that do not change the folder of the study."""
HERE = LauncherConfig()


def folder_of_study(path: Path, overrides: Sequence[str], study: StudyConfig) -> Path:
    """Return the folder of a study: runs/studies/<yaml stem>[-<overrides>]."""
    changed = [o for o in overrides if next(iter(parse_overrides([o]))) not in UNNAMED]
    tag = short(file_name("-".join(changed)))
    return Path(study.runs_dir) / "studies" / (f"{path.stem}-{tag}" if tag else path.stem)


def run_study(
    path: str | Path,
    overrides: Sequence[str] = (),
    dry_run: bool = False,
    launcher: LauncherConfig = HERE,
    only: Collection[str] = (),
) -> Path:
    """Plan a study, print what it will cost, run the trials that are missing, and return the study's folder.

    Complete trials are skipped and failed ones are tried again; a trial that fails does not stop the others.

    Args:
        path: the study's YAML.
        overrides: key=value overrides of its keys.
        dry_run: stop after the plan.
        launcher: with SLURM, trials are submitted instead of run here, with the same results. Running the same command
            again submits what is neither complete nor in the queue; the reported trials follow once tuning is complete.
        only: variants to train and evaluate; all if empty.

    Raises:
        UserError: if the study is invalid, in one line that names the file and key.
        SystemExit: 143 after SIGTERM, once the trials have saved their state.
    """
    path, only = Path(path), set(only)
    study = load_study(path, overrides)

    def planned() -> tuple[list[TrainingVariant], list[TrainingVariant]]:
        every = training_variants(study, path, tuning.chosen, probe.training_rate)
        return every, [variant for variant in every if not only or only & variant.evaluations.keys()]

    if launcher.name == "slurm" and study.stop.seconds is not None:
        raise UserError(f"{path}: stop.seconds: is measured on this machine, not SLURM's; choose images or flops")
    folder = folder_of_study(path, overrides, study)
    with located([(str(path), {"runs_dir": study.runs_dir})]):
        check_place(folder)
    with locked(folder):
        _check_source(folder, path)
        probe = Probe(folder / "rates.json", study.jobs)
        with located([(str(path), {})]):
            tuning = tuning_so_far(study, path, probe.training_rate, folder)
            every, found = planned()
        _check(path, found, launcher)
        print(plan_text(study, folder, found, tuning, probe), flush=True)
        if dry_run:
            return folder
        command = shlex.join(["diffbench", "study", str(path), *overrides])
        write_text(
            folder / "study.yaml", dump(dataclasses.asdict(study) | {"source": str(path.resolve()), "command": command})
        )
        _autoencoders(found, launcher)
        tried: set[str] = set()
        while todo := [trial for trial in tuning.todo if repr(trial) not in tried]:
            if not _run(folder, tuning.trials, study.jobs, launcher):
                return folder
            tried |= {repr(trial) for trial in todo}  # a trial that fails again is not retried
            tuning = tuning_so_far(study, path, probe.training_rate, folder)
            every, found = planned()
        for label, values in tuning.chosen.items():
            print(f"tuning chose {', '.join(f'{k}={v}' for k, v in values.items())} for {label}", flush=True)
        for label, keys in tuning.failed.items():
            print(f"tuning failed for {label}, which keeps its {', '.join(keys)}", flush=True)
        write_text(folder / "notes.json", json.dumps(notes_of(study, found, tuning), ensure_ascii=False) + "\n")
        kept = [TrialFile.of(folder, trial, order) for order, trial in enumerate(planned_trials(study, every))]
        _clear(folder, kept, {trial.slug for trial in tuning.trials})
        _run(folder, planned_trials(study, found), study.jobs, launcher)
    return folder


def _clear(folder: Path, kept: Iterable[TrialFile], tuning: Collection[str]) -> None:
    """Update the trial files of an earlier plan, and remove those that are no longer planned; their runs stay."""
    planned = {file.path: file for file in kept}
    for path in (folder / FOLDER).glob("*.yaml"):
        if path in planned:
            planned[path].write()
        elif path.stem not in tuning:
            path.unlink()


def _check_source(folder: Path, path: Path) -> None:
    """Refuse a folder that belongs to the study of another YAML with the same name."""
    source = read_yaml(folder / "study.yaml").get("source") if (folder / "study.yaml").is_file() else None
    if source is not None and Path(source).is_file() and not path.samefile(source):
        raise UserError(f"{folder}: belongs to the study {source}; give one of the two YAMLs another name or runs_dir")


def _check(path: Path, found: Iterable[TrainingVariant], launcher: LauncherConfig) -> None:
    """Refuse, before anything is trained, whatever would otherwise fail only once its trial starts.

    A trial is one command on one machine, which itself starts the processes of its run.
    """
    for variant in found:
        if (nodes := variant.config.trainer.num_nodes) > 1:
            raise UserError(
                f"{path}: trainer.num_nodes: {nodes} is too many, a trial trains on one machine; allowed: 1"
            )
        if launcher.name == "slurm":  # SLURM's machines may have what this one lacks
            continue
        with located([(f"{path}: {variant.name}", to_dict(variant.config))]):
            DenoiserRun.check(variant.config)
            for changes in variant.evaluations.values():
                check_evaluation(evaluation_config(variant.config, changes, str(path)), load_data(variant.config)[0])
    for key in ("nodes", "ntasks_per_node"):
        if (getattr(launcher, key) or 1) > 1:
            raise UserError(
                f"launcher.{key}: a trial is one process, which starts those of trainer.devices; allowed: 1"
            )


def _autoencoders(found: Iterable[TrainingVariant], launcher: LauncherConfig) -> None:
    """Train the autoencoders that experiments name before any trial, since parallel trials would each train them."""
    for config in {repr(v.config.data): v.config for v in found if v.config.autoencoder is not None}.values():
        if launcher.name == "slurm" and (command := autoencoder_arguments(config)):
            raise UserError(f"{command[0]}: not trained; first run diffbench train {' '.join(command)} launcher=slurm")
        with_autoencoder(config)


def _run(folder: Path, plan: Sequence[TrainingVariant], jobs: int, launcher: LauncherConfig) -> bool:
    """Run the trials that are not complete, `jobs` at a time, each in its own process with its own log.

    Returns False if trials are left to SLURM, otherwise True once all have run, even if some failed.
    """
    files = [TrialFile.of(folder, trial, order).write() for order, trial in enumerate(plan)]
    waiting = deque(file for file in files if not file.complete)
    if len(waiting) < len(files):
        print(f"{len(files) - len(waiting)} of {len(files)} trials are already complete", flush=True)
    if launcher.name == "slurm":
        if waiting:
            _submit(folder, [(file.path, sized(launcher, file.config.trainer)) for file in waiting])
        return not waiting
    total, started, done = len(waiting), time.monotonic(), 0
    running: dict[subprocess.Popen[bytes], tuple[TrialFile, float]] = {}
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                file = waiting.popleft()
                running[_start(file, jobs)] = file, time.monotonic()
            time.sleep(0.1)
            for process in [p for p in running if p.poll() is not None]:
                file, begun = running.pop(process)
                file.ended(process.returncode, _last_line(file.log))
                done += 1
                left = (time.monotonic() - started) / done * (total - done)
                how = f"FAILED ({file.failure}; {file.log})" if file.failure else "done"
                took = span(time.monotonic() - begun)
                print(f"[{done}/{total}] {file.values['name']}: {how} in {took}, {span(left)} to go", flush=True)
    finally:
        try:
            _terminate(running)
        except (KeyboardInterrupt, SystemExit):
            _terminate(running)  # the second signal makes trials stop without saving
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)
    return True


def _terminate(running: Iterable[subprocess.Popen[bytes]]) -> None:
    """Stop the trials, which then save their state, and wait for them."""
    for process in running:
        process.terminate()
    for process in running:
        process.wait()


def _submit(folder: Path, requests: Sequence[tuple[Path, LauncherConfig]]) -> None:
    """Submit trials to SLURM, an array for each set of resources; trials queued or running there are skipped."""
    logs, jobs = slurm_folder(folder, requests[0][1]), []
    for cpus in dict.fromkeys(launcher.cpus_per_task for _, launcher in requests):
        alike = [(path, launcher) for path, launcher in requests if launcher.cpus_per_task == cpus]
        launcher = dataclasses.replace(alike[0][1], folder=str(logs))
        jobs += submit([["study", str(path)] for path, _ in alike], launcher, folder.name)
    print(f"{summary(jobs, logs)}\nthen run the same command again, or diffbench compare {folder}", flush=True)


def slurm_folder(folder: Path, launcher: LauncherConfig) -> Path:
    """Return the folder for the scripts and logs of a study's SLURM jobs."""
    return Path(launcher.folder or folder / "slurm")


def _start(file: TrialFile, jobs: int) -> "subprocess.Popen[bytes]":
    environment = dict(os.environ)
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(threads_each(jobs))
    file.forget_end()
    with file.log.open("ab") as log:
        command = [sys.executable, "-m", "diffbench", "study", str(file.path)]
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )


def _stop(number: int, frame: Any) -> None:
    print("stopped; run the same command again to resume", file=sys.stderr)
    raise SystemExit(128 + number)


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]
