"""The plan of a study: every run that it trains, with its resolved config and its evaluations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffbench.config.kinds import RunConfig
from diffbench.config.layers import experiments, merge, search_folders
from diffbench.config.load import change, flatten, from_layers, read_layers, to_dict
from diffbench.core.errors import UserError, suggest
from diffbench.core.files import digest
from diffbench.denoisers.flops import Cost
from diffbench.metrics.registry import metric_of
from diffbench.reports.results import IMAGES, protocol_difference
from diffbench.runs import build
from diffbench.studies.config import (
    AVERAGE,
    EXPERIMENT,
    SAMPLE_SEED,
    StudyConfig,
    Variant,
    file_name,
    is_sampled,
    nest_keys,
    variants,
)
from diffbench.studies.matching import match_size, size_of, size_text

Rate = Callable[[RunConfig], float]
"""Function that measures the images per second at which a config trains on this machine."""
Tuned = dict[str, dict[str, Any]]
"""Label on the tuned axis -> the keys and values that tuning chose."""


@dataclass(frozen=True)
class TrainingVariant:
    """A run that a study trains, and the variants that share its network.

    Attributes:
        name: what the variants' names have in common.
        experiment: the YAML that the config comes from.
        config: the resolved config; its seed is the study's first until `planned_trials` sets the actual one.
        cost: size and FLOPs of the network.
        residual: size relative to the target of matching, minus 1; None without matching.
        sized: the key that matching chose, such as "hidden_size=64".
        evaluations: variant -> its changes to sampling and evaluation.
        rungs: (images, budget as text) of each point at which the run is scored, rising up to its length.
        cooldown: the last share of each rung, trained as a branch of the run with a decaying learning rate; None if the
            run itself is scored.
        samplings: how many times the run is sampled, each time with a new seed.
        tuning: the grid values that it tries; None for a reported run.
        label: its label on the tuned axis.
    """

    name: str
    experiment: Path
    config: RunConfig
    cost: Cost
    residual: float | None
    sized: str
    evaluations: dict[str, dict[str, Any]]
    rungs: list[tuple[int, str]]
    cooldown: float | None = None
    samplings: int = 1
    tuning: dict[str, Any] | None = None
    label: str = ""

    @property
    def images(self) -> int:
        """Images seen in training."""
        return self.config.trainer.max_steps * self.config.trainer.batch_size

    @property
    def trained_images(self) -> int:
        """Images that one seed trains on, in the run and its branches."""
        branches = sum(round(images * self.cooldown) for images, _ in self.rungs[:-1]) if self.cooldown else 0
        return self.images + branches

    @property
    def flops(self) -> float:
        """Training FLOPs."""
        return self.cost.training_flops(self.images)

    @property
    def title(self) -> str:
        """The name of the run, which ends with the seed if it is a reported one."""
        return f"{self.name} s{self.config.seed}" if self.tuning is None else self.name

    @property
    def slug(self) -> str:
        """The title as a file name."""
        return file_name(self.title)

    @property
    def folder(self) -> Path:
        """The run folder, which all studies with an equal config share."""
        values = {k: v for k, v in to_dict(self.config).items() if k not in ("runs_dir", "tag", "seed")}
        del values["trainer"]["threads"]  # which only changes rounding
        if len(self.rungs) > 1:  # a run of one length cannot be scored at shorter ones
            values["rungs"] = [images for images, _ in self.rungs]
            if self.cooldown is not None:
                values["cooldown"] = self.cooldown
        parent = self.experiment.resolve().parent.name
        name = f"{parent}-{self.experiment.stem}-{digest(values)[:10]}-s{self.config.seed}"
        return Path(self.config.runs_dir) / "trials" / name


def training_variants(study: StudyConfig, path: Path, tuned: Tuned, rate: Rate) -> list[TrainingVariant]:
    """Return the networks that a study trains, matched in size and with their training lengths.

    Args:
        study: the study.
        path: its YAML, which errors name.
        tuned: the choices of tuning so far.
        rate: measures the training rate of a config, for `stop.seconds`.

    Raises:
        UserError: if a variant is invalid, in one line that names the file and key.
    """
    shared: dict[str, list[Variant]] = {}
    for variant in variants(study):
        changes = str(sorted((key, str(value)) for key, value in flatten(variant.trained).items()))  # 007 and 7 differ
        shared.setdefault(changes, []).append(variant)
    target = target_size(study, path)
    found = [training_variant(study, path, sharing, tuned, target, rate) for sharing in shared.values()]
    keys = (*IMAGES, "validation.") if metric_of(study.primary).is_validation else IMAGES
    one, *others = found
    flat = flatten(to_dict(one.config))
    for other in others:
        if differs := protocol_difference(flat, flatten(to_dict(other.config)), keys):
            problem = f"{one.name} and {other.name} are not comparable: {differs}"
            raise UserError(f"{path}: axes: {problem}; write a study for each")
    names: set[str] = set()
    for network in found:
        if (name := file_name(network.name)) in names:
            raise UserError(f"{path}: axes: two networks are called {network.name!r}; rename the axis values")
        names.add(name)
    return found


def training_variant(
    study: StudyConfig,
    path: Path,
    sharing: list[Variant],
    tuned: Tuned,
    target: float | None,
    rate: Rate,
) -> TrainingVariant:
    """Return the run that variants share: with the tuned values, the matched size and the training length."""
    first, match = sharing[0], study.match
    chosen: dict[str, Any] = {}
    if study.tune and study.tune.axis:
        axis = study.tune.axis
        chosen = {key: v for key, v in tuned.get(first.at[axis], {}).items() if not is_sampled(key)}
        tuned_samplings = {
            v.name: {k: x for k, x in tuned.get(v.at[axis], {}).items() if is_sampled(k)} for v in sharing
        }
        sharing = [replace(v, sampled=merge(nest_keys(tuned_samplings[v.name]), v.sampled)) for v in sharing]
    config = config_of(study, path, first, chosen)
    if study.samplings > 1 and config.seeds.sample is not None:
        raise UserError(f"{path}: {SAMPLE_SEED} conflicts with samplings={study.samplings}; set only one of them")
    data, _ = build.load_data(config)
    residual, sized = None, ""
    if target is not None and match.by != "none":
        config = match_size(config, data, match.by, target, match.change)
        residual, sized = size_of(config, data, match.by) / target - 1, size_text(config, match.change)
    cost = build.cost_of(config, data)
    per_unit = {"images": 1.0, "flops": 1 / cost.training_flops(1), "seconds": 0.0}[study.stop.unit] or rate(config)
    lengths = [max(1, round(rung * per_unit)) for rung in study.stop.rungs]
    changes = merge(nest_keys(study.set), {k: v for k, v in first.trained.items() if k != EXPERIMENT})
    config = with_length(config, lengths, merge(changes, nest_keys(chosen)))
    if len(lengths) == 1 and study.stop.cooldown is not None:
        config = with_cooldown(config, study.stop.cooldown)
    batch = config.trainer.batch_size
    rungs = [
        (max(1, round(n / batch)) * batch, study.stop.text(r)) for n, r in zip(lengths, study.stop.rungs, strict=True)
    ]
    name = _name(study, sharing)
    if len(dict(rungs)) < len(rungs):
        images = ", ".join(f"{n:,}" for n, _ in rungs)
        raise UserError(f"{path}: stop.{study.stop.unit}: gives {images} images for {name}; set budgets farther apart")
    for variant in sharing:
        evaluation_config(config, variant.sampled, str(path))  # raises for configs that cannot be sampled
    return TrainingVariant(
        name,
        experiment_of(study, first),
        config,
        cost,
        residual,
        sized,
        {v.name: v.sampled for v in sharing},
        rungs,
        study.stop.cooldown if len(rungs) > 1 else None,
        study.samplings,
    )


def _name(study: StudyConfig, sharing: list[Variant]) -> str:
    """Join the labels that variants of one network share; the first variant's name if others have these labels too."""
    first = sharing[0]
    at = {axis: label for axis, label in first.at.items() if len({v.at[axis] for v in sharing}) == 1}
    if len(sharing) == 1 or sum(at.items() <= v.at.items() for v in variants(study)) > len(sharing):
        return first.name
    return ", ".join(at.values()) or experiment_of(study, first).stem


def experiment_of(study: StudyConfig, variant: Variant) -> Path:
    """Return the experiment YAML that a variant varies."""
    return Path(str(variant.trained.get(EXPERIMENT, study.experiment)))


def config_of(study: StudyConfig, path: Path, variant: Variant, chosen: dict[str, Any]) -> RunConfig:
    """Return the config of a variant with the keys that tuning chose, before matching, with the first seed."""
    experiment = experiment_of(study, variant)
    if not experiment.exists():
        looked = "" if experiment.is_absolute() else f"; looked in {', '.join(map(str, search_folders(path)))}"
        raise UserError(
            f"{path}: experiment: {experiment}: no such file{looked}{suggest(str(experiment), experiments())}"
        )
    layers = [*read_layers(experiment), (str(path), {"runs_dir": study.runs_dir})]
    # Axes are a separate layer, so that changing a name drops the sizes set in the layers below.
    layers += [(str(path), nest_keys(study.set))]
    layers += [(f"{path}: {variant.name}", {k: v for k, v in variant.trained.items() if k != EXPERIMENT})]
    config = from_layers([*layers, (f"{path}: tune", nest_keys(chosen)), (str(path), {"seed": study.seeds[0]})])
    if not isinstance(config, RunConfig):
        raise UserError(f"{path}: experiment: {experiment} is not a denoiser experiment; choose one that is")
    return config


def target_size(study: StudyConfig, path: Path) -> float | None:
    """Return the size to which all networks are matched; None without matching."""
    if study.match.by == "none" or study.match.to is None:
        return None
    if not isinstance(study.match.to, str):
        return study.match.to
    variant = next(v for v in variants(study) if v.name == study.match.to)
    config = config_of(study, path, variant, {})
    return size_of(config, build.load_data(config)[0], study.match.by)


def with_length(config: RunConfig, lengths: Sequence[int], given: dict[str, Any], share: float = 1.0) -> RunConfig:
    """Return the config with its length set to the last of `lengths`, and its schedule and cadence scaled to it.

    Keys in `given` are kept, except that a given schedule is scaled by `share`. With several lengths the learning rate
    is constant, since no rung may be scored while the rate decays towards a later one.
    """
    t, o, kept = config.trainer, config.optimizer, given.get("optimizer", {})
    steps = max(1, round(lengths[-1] / t.batch_size))
    images = steps * t.batch_size
    every = {"validate_images": 8, "checkpoint_images": 2, "sample_images": 1, "log_images": 40}
    cadence: dict[str, Any] = {
        k: max(t.batch_size, images // n) for k, n in every.items() if k not in given.get("trainer", {})
    }
    decay, ramp = o.decay_images, min(o.warmup_images, (images if len(lengths) == 1 else lengths[0]) // 10)
    if len(lengths) > 1 or decay is None:
        decay = None
    elif "decay_images" in kept:
        decay = [round(share * n) for n in decay] if isinstance(decay, list) else round(share * decay)
    else:
        decay = [round(images * decay[0] / decay[1]), images] if isinstance(decay, list) else images
    if "warmup_images" in kept:
        ramp = round(share * o.warmup_images)
    return replace(
        config,
        trainer=replace(t, max_images=images, **cadence),
        optimizer=replace(o, decay_images=decay, warmup_images=ramp),
    )


def with_cooldown(config: RunConfig, share: float) -> RunConfig:
    """Return the config with a learning rate that decays over the last share of its images, rounded to whole steps; the
    warmup ends before the decay starts."""
    t, o = config.trainer, config.optimizer
    end = t.max_steps * t.batch_size
    begin = round((1 - share) * t.max_steps) * t.batch_size
    return replace(config, optimizer=replace(o, decay_images=[begin, end], warmup_images=min(o.warmup_images, begin)))


def evaluation_config(config: RunConfig, changes: dict[str, Any], origin: str) -> RunConfig:
    """Return the config with which a variant is sampled and evaluated.

    Raises:
        UserError: if a change is invalid, naming its key.
    """
    changes = dict(changes)
    average = changes.pop(AVERAGE, config.ema.decays[0])
    if average not in config.ema.decays:
        raise UserError(f"{origin}: {AVERAGE}: {average} is not one of ema.decays={config.ema.decays}")
    return change(config, changes, origin)


def planned_trials(study: StudyConfig, found: list[TrainingVariant]) -> list[TrainingVariant]:
    """Return the reported runs, ordered by seed and then variant, so that a stopped study can compare all variants."""
    return [replace(variant, config=replace(variant.config, seed=seed)) for seed in study.seeds for variant in found]
