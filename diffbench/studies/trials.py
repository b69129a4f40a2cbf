"""The trials of a study on disk: files that describe what to train and evaluate, with their runs and results."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from diffbench.config.documents import dump
from diffbench.config.kinds import RunConfig
from diffbench.config.layers import Layer, read_yaml
from diffbench.config.load import flatten, from_dict, to_dict
from diffbench.core.errors import UserError
from diffbench.core.files import locked, write_text
from diffbench.denoisers import registry
from diffbench.evaluation.records import compares_with_all, values
from diffbench.evaluation.validation_error import bound_metrics, denoising_error, validation_sets
from diffbench.metrics import EXTRACTORS
from diffbench.reports.image_errors import IMAGE_ERRORS, save_image_errors
from diffbench.reports.results import Status, Trial, TriedPoint, full_name
from diffbench.runs.base import Run
from diffbench.runs.evaluate import evaluate_as, scores_as
from diffbench.runs.folder import CONFIG_FILE
from diffbench.runs.lifecycle import branch, open_any, train_in
from diffbench.studies.config import AVERAGE, SAMPLE_SEED_STRIDE
from diffbench.studies.plan import TrainingVariant, evaluation_config, with_cooldown

KIND = "trial"
"""The `kind` in a trial file."""
FOLDER = "trials"
"""The folder of trial files, in the folder of a study."""


def run_of(folder: Path) -> Run[Any] | None:
    """Return the run in a folder; None if none has started."""
    return open_any(folder) if (folder / CONFIG_FILE).is_file() else None


def is_trained(folder: Path) -> bool:
    """Return whether the run in a folder is complete, with its averaged weights exported."""
    run = run_of(folder)
    return run is not None and run.complete


def trial_values(
    name: str, config: dict[str, Any], folder: Path, evaluations: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Return the content of a trial file; `more` replaces the defaults of keys that a study plans."""
    return {
        "kind": KIND,
        "order": 0,
        "name": name,
        "seed": config["seed"],
        "folder": str(folder),
        "tuning": None,
        "label": "",
        "samplings": 1,
        "evaluations": evaluations,
        "rungs": [],
        "cooldown": None,
        "config": config,
    } | more


def recipe_of(run: Run[Any], record: Mapping[str, Any] | None, variant: str) -> dict[str, Any]:
    """Return the content of a trial file for a run outside of any study, with the settings that scored a record."""
    changes: dict[str, Any] = {}
    if record is not None:
        own, extractor = run.values.get("evaluate") or {}, record["extractor"]["name"]
        count = next(int(name.rpartition("@")[2]) for name in values(record))
        changes["evaluate"] = {"count": count, "reference": "all" if compares_with_all(record, count) else "same"}
        requested = record["extractor"].get("asked", extractor if extractor in EXTRACTORS else None)
        if requested is not None and requested != own.get("extractor"):
            changes["evaluate"]["extractor"] = requested
        if (judge := (record.get("judge") or {}).get("run")) != own.get("judge"):
            changes["evaluate"]["judge"] = judge
        if (infinity := any("_infinity" in name for name in values(record))) != own.get("infinity", False):
            changes["evaluate"]["infinity"] = infinity
        if (weights := record["extractor"].get("file")) is not None:
            changes["evaluate"]["weights"] = weights
        changes["sample"] = {k: v for k, v in record["sample"].items() if k in run.values["sample"]}
        changes["seeds"] = {"sample": record["sample"]["seed"]}
    evaluations = {variant: changes} if record is not None else {}
    return trial_values(f"{variant} s{run.values['seed']}", run.values, run.folder, evaluations)


class TrialFile:
    """A trial as described by its file, independent of the study that planned it and of other trials."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, study: Path, trial: TrainingVariant, order: int = 0) -> "TrialFile":
        """Return the file of a trial in a study's folder, without writing it; `order` is its place in the plan."""
        file = cls(study / FOLDER / f"{trial.slug}.yaml")
        file.values = trial_values(
            trial.title,
            to_dict(trial.config),
            trial.folder,
            trial.evaluations,
            order=order,
            tuning=trial.tuning,
            label=trial.label,
            samplings=trial.samplings,
            rungs=[list(rung) for rung in trial.rungs] if len(trial.rungs) > 1 else [],
            cooldown=trial.cooldown,
        )
        file.config = trial.config
        return file

    def write(self) -> "TrialFile":
        """Write the file unless it is up to date, and next to it the source of a custom network."""
        registry.keep_source(self.config.denoiser, self.path.parent)
        text = dump(self.values)
        if not self.path.exists() or self.path.read_text() != text:
            write_text(self.path, text)
        return self

    @cached_property
    def values(self) -> dict[str, Any]:
        """The content of the file."""
        return read_yaml(self.path)

    @cached_property
    def config(self) -> RunConfig:
        """The config of the run, with its seed."""
        config = from_dict(self.values["config"], str(self.path))
        assert isinstance(config, RunConfig)
        return config

    @cached_property
    def lengths(self) -> list[RunConfig]:
        """The config at each rung of the ladder, shortest first; only the trial's config without a ladder."""
        images = [n for n, _ in self.values["rungs"]] or [self.config.trainer.max_images]
        found = [replace(self.config, trainer=replace(self.config.trainer, max_images=n)) for n in images]
        share = self.values.get("cooldown")
        return found if share is None else [with_cooldown(config, share) for config in found]

    def folder_of(self, config: RunConfig) -> Path:
        """Return the folder of the run that is scored at a rung: the trial's own run, or the rung's cooldown branch."""
        branch = self.folder.with_name(f"{self.folder.name}-to-{config.trainer.max_images}")
        return self.folder if self.values.get("cooldown") is None else branch

    def sampling_changes(self, changes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the changes for each sampling of a variant: the variant's own, plus a new seed from the second on."""
        first = self.config.seed_of("sample")
        more = [{"seeds": {"sample": first + k * SAMPLE_SEED_STRIDE}} for k in range(1, self.values["samplings"])]
        return [dict(changes), *({**changes, **seeds} for seeds in more)]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.values["folder"])

    def run(self) -> None:
        """Train the run if it is not complete, and make the missing evaluations; a failure is recorded.

        Raises:
            UserError: for errors that the user can fix.
            SystemExit: 143 or 130 after SIGTERM or SIGINT, with the state saved.
        """
        self.forget_end()
        try:
            with locked(self.folder.parent, wait=True, name=f".{self.folder.name}.lock"):  # studies may share the run
                self._train_and_evaluate()
        except Exception as e:
            self.ended(2, " ".join(str(e).split())[:300])
            raise

    def _train_and_evaluate(self) -> None:
        for config in self.lengths:
            folder = self.folder_of(config)
            known = run_of(folder)
            if known is None and folder != self.folder:
                self._branch(folder, config)
            if known is None or known.images_seen <= config.trainer.max_images:
                self._train_to(folder, config)  # otherwise the run has passed this rung and was scored at it

    def _branch(self, folder: Path, config: RunConfig) -> None:
        """Train to where a rung's learning rate starts to decay, and start the rung's own run from there."""
        assert config.optimizer.decay is not None
        # One step earlier, since a checkpoint stores the learning rate of the next step.
        images = config.optimizer.decay[0] - config.trainer.batch_size
        known = run_of(self.folder)
        if images <= 0 or (known is not None and known.images_seen > images):
            return  # the rung's run trains from scratch, to the same weights
        trunk = replace(self.config, trainer=replace(config.trainer, max_images=images))
        branch(train_in(self.folder, trunk, self._layers).folder, folder, config)

    @property
    def _layers(self) -> list[Layer]:
        return [(str(self.path), self.values["config"])]

    def _train_to(self, folder: Path, config: RunConfig) -> None:
        run = train_in(folder, config, self._layers)
        save_image_errors(run)
        for variant, changes in self.values["evaluations"].items():
            started = time.perf_counter()
            run.use_average(changes.get(AVERAGE, self.config.ema.decays[0]))

            def errors() -> dict[str, float]:
                # metrics.jsonl has these only for the first average
                found: dict[str, float] = {}
                for part, data in validation_sets(run.sets[1], run.sets[0]).items():
                    levels = run.config.validation.log_snr
                    found |= bound_metrics(part, denoising_error(run.network, run.process, data, levels))
                return found

            for way in self.sampling_changes(changes):
                evaluate_as(run, evaluation_config(config, way, str(self.path)), errors if AVERAGE in changes else dict)
            print(f"{variant}: scored in {time.perf_counter() - started:.1f} s", flush=True)

    def trials(self) -> list[Trial]:
        """Return the results of the trial so far: one per rung and variant evaluated on its run."""
        found = []
        read = {folder: self._read(folder) for folder in dict.fromkeys(map(self.folder_of, self.lengths))}
        for config in self.lengths:
            run, why, records = read[self.folder_of(config)]
            at = config.trainer.max_images if self.values["rungs"] else None
            if at and run and run.images_seen > at:
                why = why or f"trained past {at:,} images before this sampling was requested"
            for variant, changes in self.values["evaluations"].items():
                answers = [
                    next((r for r in records if self._matches(r, config, w)), None)
                    for w in self.sampling_changes(changes)
                ]
                scored = [r for r in answers if r is not None]
                done = len(scored) == len(answers)
                status: Status = "complete" if done else "failed" if why else "unfinished" if run else "not begun"
                seed, reason, first = int(self.values["seed"]), "" if done else why, scored[0] if scored else None
                recipe = self.values | {"evaluations": {variant: changes}}
                found.append(Trial(variant, seed, status, run, first, reason, at, recipe, scored[1:]))
        return found

    def _read(self, folder: Path) -> tuple[Run[Any] | None, str, list[dict[str, Any]]]:
        """Return the run in a folder, the reason why it failed, and its records, newest first."""
        run = run_of(folder)
        try:
            records = list(reversed(run.results)) if run and (run.complete or self.values["rungs"]) else []
        except UserError as e:  # a damaged file of one run does not stop the report of the others
            return None, str(e), []
        return run, self.failure, records

    def _matches(self, record: Mapping[str, Any], config: RunConfig, changes: Mapping[str, Any]) -> bool:
        """Return whether a record is the evaluation that a variant requires, of a run of this length."""
        wanted = evaluation_config(config, dict(changes), str(self.path))
        return scores_as(record, wanted, changes.get(AVERAGE, self.config.ema.decays[0]))

    def points(self, primary: str) -> list[TriedPoint]:
        """Return the measurements of a tuning run: its bound, then the primary metric for each way of sampling it."""
        label, run, trials = self.values["label"], run_of(self.folder), self.trials()
        missing = math.inf if self.failure else None
        bound = TriedPoint(label, self.values["tuning"], "val/bound", missing)
        if run and run.complete:
            flops, last = run.cost.training_flops(run.images_seen), run.last("val/bound")
            measured = last if last is not None and math.isfinite(last) else math.inf
            bound = replace(bound, value=measured, flops=flops, seconds=run.seconds)
        points = [bound]
        name = full_name(trials, primary) or primary
        for trial, changes in zip(trials, self.values["evaluations"].values(), strict=True):
            value = trial.values.get(name, missing) if trial.complete else missing
            points.append(TriedPoint(label, flatten(changes), name, value))
        return points

    @property
    def complete(self) -> bool:
        """Whether all training and evaluation is done."""
        last = self.folder_of(self.lengths[-1])
        measured = is_trained(last) and (last / IMAGE_ERRORS).exists()
        return measured and all(trial.complete for trial in self.trials())

    @property
    def log(self) -> Path:
        """The log file of the trial's process."""
        return self.path.with_suffix(".log")

    def ended(self, code: int, last: str) -> None:
        """Record how the trial's process ended: its exit code and last line of output."""
        write_text(self.path.with_suffix(".json"), json.dumps({"exit": code, "last": last}) + "\n")

    def forget_end(self) -> None:
        """Delete the record of how an earlier process ended."""
        self.path.with_suffix(".json").unlink(missing_ok=True)

    @property
    def failure(self) -> str:
        """The reason why the last attempt failed, in one line; empty if it did not."""
        try:
            end = json.loads(self.path.with_suffix(".json").read_text())
        except (FileNotFoundError, ValueError):
            return ""
        if end["exit"] == 0:
            return ""
        killed = f"ended by signal {-end['exit']}" if end["exit"] < 0 else f"exit code {end['exit']}"
        return f"{killed}: {end['last']}" if end["last"] else killed
