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
from diffbench.config.types import shown
from diffbench.core.errors import check, suggest
from diffbench.metrics.registry import RANKING, metric_of

AVERAGE = "average"
"""Key of a variant: the average that it evaluates, one of ema.decays or a share of ema.half_life."""
EVALUATED = ("sample", "evaluate", AVERAGE)
"""Sections that change no weights: axes over them reuse the trained runs."""
SAMPLE_SEED = "seeds.sample"
APART = 1_000_000
"""Between the sampling seeds of one trained network, so that no two networks share any; seeds lie below it."""
BUDGETS = ("images", "flops", "seconds")
"""Keys of `stop`, of which one says when training ends."""
EXPERIMENT = "experiment"
"""Key of a variant: the YAML that it varies in place of the study's."""


def is_sampled(key: str) -> bool:
    """Whether a dotted key changes samples alone, not the weights."""
    return key == SAMPLE_SEED or key.split(".")[0] in EVALUATED


@dataclass
class StopConfig:
    """The end of training: one of images, flops and seconds, alike for all variants; a rising list is a ladder, whose
    rungs one run passes at a constant rate, each of them scored."""

    images: float | list[float] | None = None
    """Images seen."""
    flops: float | list[float] | None = None
    """Training FLOPs: 2 a multiply-accumulate, 3 forward passes an image."""
    seconds: float | list[float] | None = None
    """Seconds of training, turned into images by each variant's rate, which the plan measures."""
    cooldown: float | None = None
    """The last share of each rung, over which a branch of the run decays its rate (cosine) and is scored in the run's
    place: what a run of that length alone would be (Hägele et al. 2024). null: the run itself, its weights averaged."""

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"stop: must hold one of images, flops and seconds, got {', '.join(given) or 'none'}")
        check(self, "stop", "lie in 0.01 to 0.9 or be null", lambda v: 0.01 <= v <= 0.9, "cooldown")
        rungs = self.rungs
        numbers = ", ".join(f"{rung:g}" for rung in rungs)
        if not rungs or rungs[0] <= 0 or sorted(set(rungs)) != rungs:
            raise ValueError(f"stop.{self.unit}: must be a positive number or a rising list, got [{numbers}]")

    @property
    def unit(self) -> str:
        """images, flops or seconds."""
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def rungs(self) -> list[float]:
        """The budgets, one or several, rising."""
        value = getattr(self, self.unit)
        return value if isinstance(value, list) else [value]

    def text(self, rung: float) -> str:
        """A budget in words."""
        words = {"images": f"{rung:,.0f} images", "flops": f"{rung:.3g} training FLOPs", "seconds": f"{rung:g} seconds"}
        return words[self.unit]


@dataclass
class MatchConfig:
    """Networks of equal size: parameters or multiply-accumulates."""

    by: Literal["none", "parameters", "gmacs"] = "none"
    to: str | float | None = None
    """A number (parameters, or GMACs), or a variant, whose own size is the target."""
    change: Literal["width", "depth"] = "width"
    """The dimension of a network that is changed for it; the denoiser registry knows the keys."""

    def __post_init__(self) -> None:
        if (self.by == "none") != (self.to is None):
            raise ValueError(f"match.to: must be a variant or a number where match.by={self.by} is not none, else null")
        if isinstance(self.to, int | float) and not self.to > 0:
            raise ValueError(f"match.to: must be positive, got {self.to:g}")


@dataclass
class TuneConfig:
    """A grid that is tried alike for each value of an axis, and chosen from by the validation bound; keys of sampling
    (sample.guidance, average) are chosen after training, by the primary metric."""

    axis: str | None = None
    """Whose values are tuned, each by itself; null takes the first axis."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Keys and the values to try, as optimizer.lr: [1e-3, 2e-3, 4e-3]; all combinations are. From three rising values
    on the grid grows for all where one's best stands at its edge, by its ratio there and up to two values."""
    seed: int = 1000
    """Seed of the tuning runs, which is not reported."""
    share: float = 1.0
    """Length of a tuning run, and of a schedule that is given, as a share of a reported one's."""

    def __post_init__(self) -> None:
        for key, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"tune.grid.{key}: must be a list of values to try, got {shown(values)}")
        if not self.grid:
            raise ValueError("tune.grid: must name keys and the values to try, as optimizer.lr: [1e-3, 2e-3]")
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
    """Keys that all variants have besides."""
    axes: dict[str, Any] = field(default_factory=dict)
    """A config key with a list of values, or any name with variants: name -> the keys it sets, `experiment` among them.
    Axes over `sample` and `evaluate` alone reuse the trained runs."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    samplings: int = 1
    """Times that each trained network is sampled and scored, each with another seed: its scores are their means,
    and the report says how much of the variance is training's and how much sampling's."""
    stop: StopConfig = field(default_factory=lambda: StopConfig(images=100_000))
    match: MatchConfig = field(default_factory=MatchConfig)
    tune: TuneConfig | None = None
    primary: str = "val/bound"
    """The metric that decides: val/bound, or a score as fd, kid, label_accuracy."""
    baseline: str | None = None
    """The variant that all others are compared with; null compares all pairs."""
    like_for_like: bool = True
    """False where variants differ in more than the question: the report then says so in its title."""
    jobs: int = 1
    """Runs at a time on this machine, which share its cores."""
    runs_dir: str = "runs"

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format: must be {FORMAT}, got {self.format}")
        if not self.experiment:
            raise ValueError("experiment: missing; name the YAML of an experiment, as experiments/digits/dit.yaml")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: must be different whole numbers of at least 0, got {self.seeds}")
        ends = {"trainer.max_images": "stop says when training ends", "seed": "seeds lists them"}
        if self.stop.cooldown is not None or len(self.stop.rungs) > 1:
            ends["optimizer.decay_images"] = "the rate of a ladder is constant, or decays over stop.cooldown"
        given = [self.set, *(v.trained for v in variants(self)), self.tune.grid if self.tune else {}]
        if double := next((key for keys in given for key in flatten(nested(keys)) if key in ends), None):
            raise ValueError(f"{double}: cannot stand in set, axes or tune.grid; {ends[double]}")
        if self.samplings < 1:
            raise ValueError(f"samplings: must be at least 1, got {self.samplings}")
        if self.samplings > 1 and max(self.seeds) >= APART:
            raise ValueError(f"seeds: must lie below {APART:,} with samplings={self.samplings}, got {max(self.seeds)}")
        if self.samplings > 1 and any(SAMPLE_SEED in flatten(v.sampled) for v in variants(self)):
            raise ValueError(f"axes: {SAMPLE_SEED} stands beside samplings={self.samplings}; give one of the two")
        if metric_of(self.primary).direction is None:
            raise ValueError(f"primary: {self.primary} does not rank variants; choose from {', '.join(RANKING)}")
        if self.jobs < 1:
            raise ValueError(f"jobs: must be at least 1, got {self.jobs}")
        if self.jobs > 1 and self.stop.seconds is not None:
            raise ValueError(f"jobs: {self.jobs} runs at a time would share what stop.seconds measures; leave it at 1")
        if self.tune is not None:
            if self.tune.seed in self.seeds:
                raise ValueError(f"tune.seed: {self.tune.seed} is reported (seeds={self.seeds}); choose another")
            if self.tune.axis is None:
                self.tune.axis = next(iter(self.axes), None)
            unseen = [key for key in self.tune.grid if is_sampled(key) and key != AVERAGE]
            if unseen and metric_of(self.primary).is_validation:
                raise ValueError(f"tune.grid.{unseen[0]}: changes samples, which primary={self.primary} is not of")
            if self.tune.axis not in self.axes:
                raise ValueError(f"tune.axis: must be one of the axes {', '.join(self.axes)}, got {self.tune.axis}")
        self._check_names()

    def _check_names(self) -> None:
        names = [v.name for v in variants(self)]
        if len(set(names)) < len(names):
            double = next(n for n in names if names.count(n) > 1)
            raise ValueError(f"axes: two variants are called {double!r}; name them apart")
        files: dict[str, str] = {}
        for variant in names:
            if (other := files.setdefault(file_name(variant), variant)) != variant:
                raise ValueError(f"axes: the files of {other!r} and {variant!r} would have one name; name them apart")
        for key, name in (("baseline", self.baseline), ("match.to", self.match.to)):
            if isinstance(name, str) and name not in names:
                raise ValueError(f"{key}: no variant {name!r}; choose from {', '.join(names)}{suggest(name, names)}")


@dataclass(frozen=True)
class Variant:
    """A combination of the axes' values.

    Attributes:
        name: as tables have it.
        trained: what it changes of training, nested keys; `experiment` replaces the study's.
        sampled: what it changes of sampling and evaluation.
        at: axis -> the label of its value.
    """

    name: str
    trained: dict[str, Any]
    sampled: dict[str, Any]
    at: dict[str, str]


def variants(study: StudyConfig) -> list[Variant]:
    """Every combination of the axes' values, the last axis fastest.

    Raises:
        ValueError: if an axis is neither a list of values nor a section of variants.
    """
    found = []
    for chosen in itertools.product(*(_values(axis, given) for axis, given in study.axes.items())):
        changes: dict[str, Any] = {}
        for _, keys in chosen:
            changes = merge(changes, keys)
        sampled = {section: changes.pop(section) for section in EVALUATED if section in changes}
        seeds = dict(changes.pop("seeds", {}))  # others may share it
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
        return [(named(axis, value), nested({axis: value})) for value in given]
    if not isinstance(given, dict) or not given:
        raise ValueError(f"axes.{axis}: must be a list of values or a section of variants, got {shown(given)}")
    for label, keys in given.items():
        if keys is not None and not isinstance(keys, dict):
            raise ValueError(f"axes.{axis}.{label}: must be a section of keys, or empty, got {shown(keys)}")
        if not re.fullmatch(r"[\w.+:()=/ -]{1,60}", str(label)):
            raise ValueError(f"axes.{axis}: {label!r} is not a name; allowed: up to 60 letters, digits and ._+:()=/- ")
    return [(str(label), nested(keys or {})) for label, keys in given.items()]


def file_name(name: str) -> str:
    """The name of a variant or a trial as a file's."""
    return re.sub(r"[^\w.+=,-]+", "_", name)


def named(key: str, value: Any) -> str:
    """A key with its value in the name of a variant: "lr=0.001"."""
    listed = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{key.rsplit('.', 1)[-1]}={f'{value:g}' if isinstance(value, float) else listed}"


def nested(keys: dict[str, Any]) -> dict[str, Any]:
    """Turn {"a.b": 1} and {"a": {"b": 1}} alike into {"a": {"b": 1}}.

    Raises:
        ValueError: if a key stands twice.
    """
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        inner = nested(value) if isinstance(value, dict) else value
        for part in reversed(str(key).split(".")):
            inner = {part: inner}
        if twice := flatten(tree).keys() & flatten(inner).keys():
            raise ValueError(f"{min(twice)}: stands twice in one section of the study")
        tree = merge(tree, inner)
    return tree


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study's YAML with its bases and overrides.

    Raises:
        UserError: one line that names file and key.
    """
    stack = [*read_chain(Path(path)), (COMMAND_LINE, parse_overrides(overrides))]
    merged: dict[str, Any] = {}
    with located(stack):
        for _, values in stack:
            stop, base = values.get("stop"), merged.get("stop")
            if isinstance(stop, dict) and isinstance(base, dict) and any(key in stop for key in BUDGETS):
                # Another budget takes the place of the base's, it does not stand beside it.
                merged["stop"] = {key: value for key, value in base.items() if key not in BUDGETS}
            if isinstance(values.get("set"), dict):
                values = values | {"set": nested(values["set"])}
            merged = merge(merged, values)
        if merged.get("kind") != "study":
            raise ValueError(f"kind: must be study, got {shown(merged.get('kind'))}")
        hints: dict[str, type] = {"stop": StopConfig, "match": MatchConfig}
        if merged.get("tune") is not None:
            hints["tune"] = TuneConfig
        study = build(StudyConfig, merged, kinds=hints)
    assert isinstance(study, StudyConfig)
    return study
