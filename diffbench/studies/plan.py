"""What a study will do: every run it trains, with its resolved config, and every evaluation of it."""

import hashlib
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffbench.config.kinds import RunConfig
from diffbench.config.layers import experiments, merge, places
from diffbench.config.load import flatten, from_layers, read_layers, to_dict
from diffbench.core.errors import UserError, suggest
from diffbench.denoisers.flops import Cost
from diffbench.runs import build
from diffbench.studies.config import AVERAGE, EXPERIMENT, StudyConfig, Variant, nested, variants
from diffbench.studies.matching import residual, size_of, sized, told

Rate = Callable[[RunConfig], float]
"""Images a second at which a config trains here."""


@dataclass(frozen=True)
class Group:
    """The variants that share a trained network.

    Attributes:
        name: of the training variant.
        experiment: the YAML it comes from.
        config: resolved, with the study's first seed.
        cost: of its network.
        residual: how much larger than the target of matching, as a share; None without matching.
        sized: the key that matching settled, as "hidden_size=64".
        evaluations: variant -> what it changes of sampling and evaluation.
        at: axis -> label, of the first variant.
    """

    name: str
    experiment: Path
    config: RunConfig
    cost: Cost
    residual: float | None
    sized: str
    evaluations: dict[str, dict[str, Any]]
    at: dict[str, str]

    @property
    def flops(self) -> float:
        """Of training."""
        return self.cost.training_flops(self.config.trainer.max_steps * self.config.trainer.batch_size)


@dataclass(frozen=True)
class Cell:
    """A run to train and evaluate: a group with one seed.

    Attributes:
        name: as the terminal shows it.
        folder: the run folder, the same for equal configs in every study.
        tuning: the grid's values that it tries, or None for a reported run.
        label: of the tuned axis' value.
    """

    name: str
    group: Group
    seed: int
    folder: Path
    tuning: dict[str, Any] | None = None
    label: str = ""

    @property
    def slug(self) -> str:
        """Its name as a file's."""
        return re.sub(r"[^\w.+=,-]+", "_", self.name)

    @property
    def config(self) -> RunConfig:
        return replace(self.group.config, seed=self.seed)


def groups(study: StudyConfig, path: Path, tuned: dict[str, dict[str, Any]], rate: Rate) -> list[Group]:
    """The networks that a study trains, sized and stopped as it says.

    Args:
        study: the study.
        path: its YAML, named in errors.
        tuned: label of the tuned axis -> the values that tuning chose.
        rate: measures how fast a config trains, for `stop.seconds`.

    Raises:
        UserError: one line that names file and key.
    """
    shared: dict[str, list[Variant]] = {}
    for variant in variants(study):
        changes = str(sorted((key, str(value)) for key, value in flatten(variant.trained).items()))  # 007 is not 7
        shared.setdefault(changes, []).append(variant)
    target = _target(study, path, [same[0] for same in shared.values()])
    return [_group(study, path, same, tuned, target, rate) for same in shared.values()]


def _group(
    study: StudyConfig,
    path: Path,
    same: list[Variant],
    tuned: dict[str, dict[str, Any]],
    target: float | None,
    rate: Rate,
) -> Group:
    first = same[0]
    chosen = tuned.get(first.at[study.tune.axis], {}) if study.tune and study.tune.axis else {}
    config = _config(study, path, first, chosen)
    data, _ = build.load_data(config)
    over, settled = None, ""
    if target is not None and study.match.by != "none":
        config = sized(config, data, study.match.by, target, study.match.change)
        over, settled = residual(config, data, study.match.by, target), told(config, study.match.change)
    cost = build.cost_of(config, data)
    images = study.stop.images
    if study.stop.flops is not None:
        images = round(study.stop.flops / cost.training_flops(1))
    if study.stop.seconds is not None:
        images = round(study.stop.seconds * rate(config))
    config = stopped(config, images or 1, _config_layers(study, first, chosen))
    for variant in same:  # what cannot be sampled is found now
        evaluated(config, variant.sampled, str(path))
    names = [v.name for v in same]
    shown = names[0] if len(names) == 1 else _trained_name(study, same)
    return Group(
        shown, experiment_of(study, first), config, cost, over, settled, {v.name: v.sampled for v in same}, first.at
    )


def _trained_name(study: StudyConfig, same: list[Variant]) -> str:
    """The labels that variants of one network have in common."""
    axes = [axis for axis in study.axes if len({v.at[axis] for v in same}) == 1]
    return ", ".join(same[0].at[axis] for axis in axes) or experiment_of(study, same[0]).stem


def experiment_of(study: StudyConfig, variant: Variant) -> Path:
    """The YAML that a variant varies."""
    return Path(str(variant.trained.get(EXPERIMENT, study.experiment)))


def _config_layers(study: StudyConfig, variant: Variant, chosen: dict[str, Any]) -> dict[str, Any]:
    """What a study changes of an experiment, the values of tuning on top."""
    changes = merge(nested(study.set), {k: v for k, v in variant.trained.items() if k != EXPERIMENT})
    return merge(changes, nested(chosen))


def _config(study: StudyConfig, path: Path, variant: Variant, chosen: dict[str, Any]) -> RunConfig:
    experiment = experiment_of(study, variant)
    if not experiment.exists():
        looked = "" if experiment.is_absolute() else f"; looked in {', '.join(map(str, places(path)))}"
        raise UserError(
            f"{path}: experiment: {experiment}: no such file{looked}{suggest(str(experiment), experiments())}"
        )
    layers = [*read_layers(experiment), (str(path), {"runs_dir": study.runs_dir})]
    # Axes are layers of their own, so that a changed name drops the sizes that stood below it.
    layers += [(str(path), nested(study.set))]
    layers += [(f"{path}: {variant.name}", {k: v for k, v in variant.trained.items() if k != EXPERIMENT})]
    config = from_layers([*layers, (f"{path}: tune", nested(chosen)), (str(path), {"seed": study.seeds[0]})])
    if not isinstance(config, RunConfig):
        raise UserError(f"{path}: experiment: {experiment} is no denoiser's; choose one that is")
    return config


def _target(study: StudyConfig, path: Path, trained: list[Variant]) -> float | None:
    """The size that all networks are brought to."""
    if study.match.by == "none" or study.match.to is None:
        return None
    if not isinstance(study.match.to, str):
        return study.match.to
    variant = next((v for v in variants(study) if v.name == study.match.to), trained[0])
    config = _config(study, path, variant, {})
    return size_of(config, build.load_data(config)[0], study.match.by)


def stopped(config: RunConfig, images: int, given: dict[str, Any]) -> RunConfig:
    """The config with this many images, its schedule and cadence brought to that length where nothing else is given."""
    t, o = config.trainer, config.optimizer
    steps = max(1, round(images / t.batch_size))
    images = steps * t.batch_size
    every = {"validate_images": 8, "checkpoint_images": 2, "sample_images": 1, "log_images": 40}
    cadence: dict[str, Any] = {
        k: max(t.batch_size, images // n) for k, n in every.items() if k not in given.get("trainer", {})
    }
    decay = images if o.decay_images is not None else None
    ramp = min(o.warmup_images, images // 10)
    return replace(
        config,
        trainer=replace(t, max_images=images, **cadence),
        optimizer=replace(o, decay_images=decay, warmup_images=ramp),
    )


def evaluated(config: RunConfig, changes: dict[str, Any], origin: str) -> RunConfig:
    """The config as a variant samples and evaluates it.

    Raises:
        UserError: naming what cannot be.
    """
    changes = dict(changes)
    average = changes.pop(AVERAGE, config.ema.decays[0])
    if average not in config.ema.decays:
        raise UserError(f"{origin}: {AVERAGE}: {average} is none of ema.decays={config.ema.decays}")
    changed = from_layers([("config", to_dict(config)), (origin, changes)])
    assert isinstance(changed, RunConfig)
    return changed


def folder_of(group: Group, config: RunConfig) -> Path:
    """The run folder of a config: equal configs meet in it, whichever study asks for them."""
    values = {k: v for k, v in to_dict(config).items() if k not in ("runs_dir", "tag", "seed")}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
    name = f"{group.experiment.resolve().parent.name}-{group.experiment.stem}-{digest}-s{config.seed}"
    return Path(config.runs_dir) / "cells" / name


def cells(study: StudyConfig, found: list[Group]) -> list[Cell]:
    """The reported runs: all groups with one seed, then with the next, so that an unfinished study is a whole one."""
    made = []
    for seed in study.seeds:
        for group in found:
            config = replace(group.config, seed=seed)
            made.append(Cell(f"{group.name} s{seed}", group, seed, folder_of(group, config)))
    return made


def tuning_cells(study: StudyConfig, path: Path, rate: Rate) -> list[Cell]:
    """The runs from which tuning chooses: the grid for each value of the tuned axis, with other axes at their first."""
    if study.tune is None:
        return []
    tune, axis = study.tune, str(study.tune.axis)
    first: dict[str, Variant] = {}
    for variant in variants(study):
        first.setdefault(variant.at[axis], variant)
    target = _target(study, path, list(first.values()))
    made = []
    for label, variant in first.items():
        for values in itertools.product(*tune.grid.values()):
            tried = dict(zip(tune.grid, values, strict=True))
            whole = replace(study, tune=replace(tune, axis=axis))
            group = _group(whole, path, [variant], {label: tried}, target, rate)
            images = round(tune.share * group.config.trainer.max_images)
            config = replace(stopped(group.config, images, nested(study.set)), seed=tune.seed)
            group = replace(group, config=config)
            told = ", ".join(
                f"{key.rsplit('.', 1)[-1]}={value:g}" if isinstance(value, float) else f"{key}={value}"
                for key, value in tried.items()
            )
            made.append(Cell(f"tuning {label} {told}", group, tune.seed, folder_of(group, config), tried, label))
    return made
