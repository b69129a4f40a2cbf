"""The config of a study: a base experiment, the axes that vary it, and what keeps the variants comparable."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffbench.config.kinds import FORMAT
from diffbench.config.layers import COMMAND_LINE, located, merge, parse_overrides, read_chain
from diffbench.config.load import build, flatten
from diffbench.config.types import yaml_text
from diffbench.core.errors import check, suggest
from diffbench.metrics.registry import RANKING, metric_of

AVERAGE = "average"
"""Key of a variant: the EMA that it evaluates, one of ema.decays or of the shares in ema.half_life."""
EVALUATED = ("sample", "evaluate", AVERAGE)
"""Sections that do not change the weights: axes over them reuse the trained runs."""
SAMPLE_SEED = "seeds.sample"
SAMPLE_SEED_STRIDE = 1_000_000
"""Distance between the sampling seeds of one network; `seeds` are below it, so no two networks share one."""
BUDGETS = ("images", "flops", "seconds")
"""Keys of `stop`, exactly one of which is set."""
EXPERIMENT = "experiment"
"""Key of a variant: the experiment YAML that replaces the study's."""


def is_sampled(key: str) -> bool:
    """Return whether a dotted key changes only samples, not the weights."""
    return key == SAMPLE_SEED or key.split(".")[0] in EVALUATED


@dataclass
class StopConfig:
    """The end of training: one of images, flops and seconds, the same for all variants. A rising list is a ladder: one
    run passes its rungs at a constant learning rate, and is scored at each."""

    images: float | list[float] | None = None
    """Images seen."""
    flops: float | list[float] | None = None
    """Training FLOPs: 2 per multiply-accumulate, 3 forward passes per image."""
    seconds: float | list[float] | None = None
    """Seconds of training, converted to images by each variant's rate, which is measured for the plan."""
    cooldown: float | None = None
    """The last share of each rung, over which a branch decays its learning rate (cosine) and is scored instead of the
    run, as if trained to that length alone (Hägele et al. 2024). null: score the run itself, with averaged weights."""

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"stop: must set one of images, flops and seconds, got {', '.join(given) or 'none'}")
        check(self, "stop", "lie between 0.01 and 0.9, or be null", lambda v: 0.01 <= v <= 0.9, "cooldown")
        rungs = self.rungs
        numbers = ", ".join(f"{rung:g}" for rung in rungs)
        if not rungs or rungs[0] <= 0 or sorted(set(rungs)) != rungs:
            raise ValueError(f"stop.{self.unit}: must be a positive number or a rising list, got [{numbers}]")

    @property
    def unit(self) -> str:
        """The key that is set: images, flops or seconds."""
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def rungs(self) -> list[float]:
        """The budgets in rising order; a single one without a ladder."""
        value = getattr(self, self.unit)
        return value if isinstance(value, list) else [value]

    def text(self, rung: float) -> str:
        """Format a budget with its unit."""
        texts = {"images": f"{rung:,.0f} images", "flops": f"{rung:.3g} training FLOPs", "seconds": f"{rung:g} seconds"}
        return texts[self.unit]


@dataclass
class MatchConfig:
    """Matching of network sizes, by parameters or multiply-accumulates."""

    by: Literal["none", "parameters", "gmacs"] = "none"
    to: str | float | None = None
    """The target: a number (of parameters or GMACs), or a variant, whose own size is used."""
    change: Literal["width", "depth"] = "width"
    """The dimension of the networks that is changed; the denoiser registry knows its keys."""

    def __post_init__(self) -> None:
        if (self.by == "none") != (self.to is None):
            raise ValueError(f"match.to: must be null if match.by=none, else a variant or a number; match.by={self.by}")
        if isinstance(self.to, int | float) and not self.to > 0:
            raise ValueError(f"match.to: must be positive, got {self.to:g}")


@dataclass
class TuneConfig:
    """A grid tried for each value of an axis, from which the validation bound chooses. Sampling keys (sample.guidance,
    average) are chosen after training, by the primary metric."""

    axis: str | None = None
    """The axis whose values are tuned, each separately; null: the first axis."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Keys and the values to try, such as optimizer.lr: [1e-3, 2e-3, 4e-3], in all combinations. With three or more
    rising values, a best value at an edge extends the grid for all labels, at the ratio there, by up to two values."""
    seed: int = 1000
    """Seed of the tuning runs, which must not be a reported one."""
    share: float = 1.0
    """Length of a tuning run relative to a reported run; schedules that are set explicitly scale with it."""

    def __post_init__(self) -> None:
        for key, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"tune.grid.{key}: must be a list of values to try, got {yaml_text(values)}")
        if not self.grid:
            raise ValueError("tune.grid: must name keys and the values to try, such as optimizer.lr: [1e-3, 2e-3]")
        if not 0 < self.share <= 1:
            raise ValueError(f"tune.share: must lie in (0, 1], got {self.share:g}")


@dataclass
class StudyConfig:
    """A study: every combination of its axes, with every seed."""

    format: int = FORMAT
    kind: Literal["study"] = "study"
    title: str = ""
    question: str = ""
    """The question that the report answers, in a sentence or two."""
    experiment: str = ""
    """YAML of the experiment that is varied."""
    set: dict[str, Any] = field(default_factory=dict)
    """Keys that all variants set in addition."""
    axes: dict[str, Any] = field(default_factory=dict)
    """A config key with a list of values, or any name with variants: name -> the keys it sets, possibly `experiment`.
    Axes over nothing but `sample`, `evaluate` and `average` reuse the trained runs."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    samplings: int = 1
    """Number of times that each trained network is sampled and scored, each with a new seed. Scores are averaged, and
    the report splits their variance into training and sampling."""
    stop: StopConfig = field(default_factory=lambda: StopConfig(images=100_000))
    match: MatchConfig = field(default_factory=MatchConfig)
    tune: TuneConfig | None = None
    primary: str = "val/bound"
    """The metric that decides: val/bound, or a score such as fd, kid or label_accuracy."""
    baseline: str | None = None
    """The variant that all others are compared with; null: compare all pairs."""
    like_for_like: bool = True
    """False if variants differ in more than the question; the report then says so below its title."""
    jobs: int = 1
    """Number of runs at a time on this machine, which share its cores."""
    runs_dir: str = "runs"

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format: must be {FORMAT}, got {self.format}")
        if not self.experiment:
            raise ValueError("experiment: missing; name the YAML of an experiment, such as experiments/digits/dit.yaml")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: must be distinct whole numbers of at least 0, got {self.seeds}")
        ends = {"trainer.max_images": "stop says when training ends", "seed": "seeds lists them"}
        if self.stop.cooldown is not None or len(self.stop.rungs) > 1:
            ends["optimizer.decay_images"] = "the learning rate of a ladder is constant, or decays over stop.cooldown"
        given = [self.set, *(v.trained for v in variants(self)), self.tune.grid if self.tune else {}]
        if duplicate := next((key for keys in given for key in flatten(nest_keys(keys)) if key in ends), None):
            raise ValueError(f"{duplicate}: not allowed in set, axes or tune.grid; {ends[duplicate]}")
        if self.samplings < 1:
            raise ValueError(f"samplings: must be at least 1, got {self.samplings}")
        if self.samplings > 1 and max(self.seeds) >= SAMPLE_SEED_STRIDE:
            raise ValueError(
                f"seeds: must be below {SAMPLE_SEED_STRIDE:,} with samplings={self.samplings}, got {max(self.seeds)}"
            )
        if self.samplings > 1 and any(SAMPLE_SEED in flatten(v.sampled) for v in variants(self)):
            raise ValueError(f"axes: {SAMPLE_SEED} conflicts with samplings={self.samplings}; set only one of them")
        if metric_of(self.primary).direction is None:
            raise ValueError(f"primary: {self.primary} does not rank variants; choose from {', '.join(RANKING)}")
        if self.jobs < 1:
            raise ValueError(f"jobs: must be at least 1, got {self.jobs}")
        if self.jobs > 1 and self.stop.seconds is not None:
            raise ValueError(f"jobs: must be 1 with stop.seconds, since parallel runs distort timing, got {self.jobs}")
        if self.tune is not None:
            if self.tune.seed in self.seeds:
                raise ValueError(f"tune.seed: {self.tune.seed} is a reported seed (seeds={self.seeds}); choose another")
            if self.tune.axis is None:
                self.tune.axis = next(iter(self.axes), None)
            unseen = [key for key in self.tune.grid if is_sampled(key) and key != AVERAGE]
            if unseen and metric_of(self.primary).is_validation:
                raise ValueError(f"tune.grid.{unseen[0]}: changes only samples, not primary={self.primary}")
            if self.tune.axis not in self.axes:
                raise ValueError(f"tune.axis: must be one of the axes {', '.join(self.axes)}, got {self.tune.axis}")
        self._check_names()

    def _check_names(self) -> None:
        names = [v.name for v in variants(self)]
        if len(set(names)) < len(names):
            duplicate = next(n for n in names if names.count(n) > 1)
            raise ValueError(f"axes: two variants are called {duplicate!r}; give them different names")
        files: dict[str, str] = {}
        for variant in names:
            if (other := files.setdefault(file_name(variant), variant)) != variant:
                raise ValueError(f"axes: {other!r} and {variant!r} would share a file name; give them different names")
        for key, name in (("baseline", self.baseline), ("match.to", self.match.to)):
            if isinstance(name, str) and name not in names:
                raise ValueError(f"{key}: no variant {name!r}; choose from {', '.join(names)}{suggest(name, names)}")


@dataclass(frozen=True)
class Variant:
    """One combination of the axes' values.

    Attributes:
        name: its name in tables.
        trained: its changes to training, as nested keys; `experiment` replaces the study's.
        sampled: its changes to sampling and evaluation, as nested keys.
        at: axis -> the label of its value.
    """

    name: str
    trained: dict[str, Any]
    sampled: dict[str, Any]
    at: dict[str, str]


def variants(study: StudyConfig) -> list[Variant]:
    """Return every combination of the axes' values, with the last axis varying fastest.

    Raises:
        ValueError: if an axis is neither a list of values nor a section of variants.
    """
    found = []
    for chosen in itertools.product(*(_values(axis, given) for axis, given in study.axes.items())):
        changes: dict[str, Any] = {}
        for _, keys in chosen:
            changes = merge(changes, keys)
        sampled = {section: changes.pop(section) for section in EVALUATED if section in changes}
        seeds = dict(changes.pop("seeds", {}))  # copied, since variants may share it
        if "sample" in seeds:
            sampled["seeds"] = {"sample": seeds.pop("sample")}
        changes |= {"seeds": seeds} if seeds else {}
        labels = [label for label, _ in chosen]
        found.append(
            Variant(", ".join(labels) or "as it is", changes, sampled, dict(zip(study.axes, labels, strict=True)))
        )
    return found


def _values(axis: str, given: Any) -> list[tuple[str, dict[str, Any]]]:
    if isinstance(given, list) and given:
        return [(key_label(axis, value), nest_keys({axis: value})) for value in given]
    if not isinstance(given, dict) or not given:
        raise ValueError(f"axes.{axis}: must be a list of values or a section of variants, got {yaml_text(given)}")
    for label, keys in given.items():
        if keys is not None and not isinstance(keys, dict):
            raise ValueError(f"axes.{axis}.{label}: must be a section of keys, or empty, got {yaml_text(keys)}")
        if not re.fullmatch(r"[\w.+:()=/ -]{1,60}", str(label)):
            raise ValueError(f"axes.{axis}: {label!r} is not a name; allowed: up to 60 letters, digits and ._+:()=/- ")
    return [(str(label), nest_keys(keys or {})) for label, keys in given.items()]


def file_name(name: str) -> str:
    """Convert the name of a variant or trial to a file name."""
    return re.sub(r"[^\w.+=,-]+", "_", name)


def key_label(key: str, value: Any) -> str:
    """Format a key and its value for the name of a variant: "lr=0.001"."""
    listed = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{key.rsplit('.', 1)[-1]}={f'{value:g}' if isinstance(value, float) else listed}"


def nest_keys(keys: dict[str, Any]) -> dict[str, Any]:
    """Nest dotted keys: both {"a.b": 1} and {"a": {"b": 1}} become {"a": {"b": 1}}.

    Raises:
        ValueError: if a key is set twice.
    """
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        inner = nest_keys(value) if isinstance(value, dict) else value
        for part in reversed(str(key).split(".")):
            inner = {part: inner}
        if twice := flatten(tree).keys() & flatten(inner).keys():
            raise ValueError(f"{min(twice)}: set twice in one section of the study")
        tree = merge(tree, inner)
    return tree


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study from its YAML, with its bases and overrides.

    Raises:
        UserError: if the study is invalid, in one line that names the file and key.
    """
    stack = [*read_chain(Path(path)), (COMMAND_LINE, parse_overrides(overrides))]
    merged: dict[str, Any] = {}
    with located(stack):
        for _, values in stack:
            stop, base = values.get("stop"), merged.get("stop")
            if isinstance(stop, dict) and isinstance(base, dict) and any(key in stop for key in BUDGETS):
                # A budget replaces that of the base, even if it is of another unit.
                merged["stop"] = {key: value for key, value in base.items() if key not in BUDGETS}
            if isinstance(values.get("set"), dict):
                values = values | {"set": nest_keys(values["set"])}
            if isinstance(tune := values.get("tune"), dict) and isinstance(tune.get("grid"), dict):
                values = values | {"tune": tune | {"grid": flatten(nest_keys(tune["grid"]))}}
            merged = merge(merged, values)
        if merged.get("kind") != "study":
            raise ValueError(f"kind: must be study, got {yaml_text(merged.get('kind'))}")
        hints: dict[str, type] = {"stop": StopConfig, "match": MatchConfig}
        if merged.get("tune") is not None:
            hints["tune"] = TuneConfig
        study = build(StudyConfig, merged, kinds=hints)
    assert isinstance(study, StudyConfig)
    return study
