"""Published claims checked against the results of studies: confirmed, tied or refuted, each with an interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffbench.config.layers import located, read_yaml
from diffbench.config.load import build
from diffbench.config.types import yaml_text
from diffbench.core.errors import UserError, suggest
from diffbench.metrics.registry import METRICS, metric_of
from diffbench.reports import statistics
from diffbench.reports.results import Comparison, by_seed, full_name
from diffbench.reports.text import counted, number
from diffbench.reports.variance import components, scores
from diffbench.studies.config import load_study, variants


@dataclass
class Claim:
    """A published claim, as data.

    It says that one variant is better than another, or the best of several better than the best of others (a U-curve:
    the middle is better than both ends); that a sampler's error falls with some power of the step size; or that scores
    scatter more over trainings than over samples.
    """

    claim: str = ""
    """The claim, in one sentence."""
    source: str = ""
    """The paper, with its section, table or figure."""
    study: str = ""
    """Name of the study whose results decide."""
    metric: str = "fd"
    """The metric that compares the variants, with or without extractor and count."""
    better: Any = None
    """The variant claimed to be better, or a list of them."""
    worse: Any = None
    """The variant claimed to be worse, or a list of them."""
    order: Any = None
    """Instead of better and worse: variants with N, 2N, 4N, ... steps of a deterministic sampler."""
    retrained: Any = None
    """Instead of these: variants whose scores scatter more over trainings than over samples of one network."""
    above: float = 0.0
    """The value that the order, or the ratio of standard deviations, is claimed to exceed."""

    def __post_init__(self) -> None:
        for name in ("claim", "source", "study"):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing")
        for name in ("better", "worse", "order", "retrained"):
            if (given := getattr(self, name)) is not None:
                setattr(self, name, [str(each) for each in (given if isinstance(given, list) else [given])])
        if [bool(self.order), bool(self.retrained), bool(self.better and self.worse)].count(True) != 1:
            raise ValueError("better: name variants either for better and worse, or for order, or for retrained")
        if self.order and len(self.order) < 4:
            raise ValueError(f"order: needs at least 4 variants, got {len(self.order)}")
        if metric_of(self.metric).direction is None:
            raise ValueError(f"metric: {self.metric} does not rank variants{suggest(self.metric, METRICS)}")

    @property
    def variants(self) -> list[str]:
        """All variants that the claim names."""
        return [*(self.better or ()), *(self.worse or ()), *(self.order or ()), *(self.retrained or ())]


@dataclass(frozen=True)
class Finding:
    """A claim with the verdict of the results."""

    claim: Claim
    verdict: str
    """ "confirmed", "tied", "refuted"; "undecided" with fewer than three seeds, "not run" without results."""
    evidence: str
    """The measurement, as text."""


def load_claims(path: Path, studies: Path) -> list[Claim]:
    """Read the claims in a YAML file, whose studies are the YAMLs in the folder `studies`.

    Raises:
        UserError: if a study, variant or metric does not exist, in one line that names the file and key.
    """
    claims: list[Claim] = []
    entries = read_yaml(path).get("claims") or []
    if not isinstance(entries, list):
        raise UserError(f"{path}: claims: must be a list of claims, got {yaml_text(entries)}")
    for i, values in enumerate(entries):
        with located([(f"{path}: claims[{i}]", values)]):
            if not isinstance(values, dict):
                raise ValueError(f"must be a section with keys, got {yaml_text(values)}")
            claim = build(Claim, values)
            if not (file := studies / f"{claim.study}.yaml").is_file():
                raise ValueError(f"study: no {file}{suggest(claim.study, [p.stem for p in studies.glob('*.yaml')])}")
            names = [variant.name for variant in variants(load_study(file))]
            if unknown := [name for name in claim.variants if name not in names]:
                raise ValueError(f"study: {claim.study} has no variant {unknown[0]!r}{suggest(unknown[0], names)}")
            claims.append(claim)
    return claims


def findings(claims: Sequence[Claim], results: Mapping[str, Comparison]) -> list[Finding]:
    """Check each claim separately against the results of its study (name -> comparison), paired by seed."""
    judged = [_judge(claim, results[claim.study]) if claim.study in results else None for claim in claims]
    missing = "diffbench findings run=true"
    return [found or Finding(claim, "not run", missing) for claim, found in zip(claims, judged, strict=True)]


def _judge(claim: Claim, results: Comparison) -> Finding | None:
    """Judge a claim by the results of its study; None if a variant has no results."""
    if claim.retrained:
        return _scatter(claim, results)
    name = full_name(results.trials, claim.metric) or claim.metric
    metric = metric_of(name)
    seeds = {v: by_seed([t for t in results.trials if t.variant == v], name) for v in claim.variants}
    if not all(seeds.values()):
        return None
    if claim.order:
        shared = sorted(set.intersection(*map(set, seeds.values())))
        values = [_order([seeds[v][seed] for v in claim.order]) - claim.above for seed in shared]
        what, tie, lower = f"order of {metric.title}", 0.0, False
        name = ""
    else:
        means = {v: float(np.mean([*found.values()])) for v, found in seeds.items()}
        choose = min if metric.lower_is_better else max
        first, second = (choose(side, key=means.__getitem__) for side in (claim.better, claim.worse))
        values = statistics.differences(seeds[first], seeds[second])
        what, tie = f"{metric.title} of {first} minus {second}", metric.tie * min(means[first], means[second])
        lower = metric.lower_is_better
    # Choosing the best of several counts as that many comparisons.
    chances = range(max(1, len(claim.better or ()), len(claim.worse or ())))
    pair = statistics.paired({i: [] if i else values for i in chances})[0]
    verdicts = {"first": "confirmed", "second": "refuted", "tie": "tied", "undecided": "undecided"}
    how = f"{what}: {number(pair.mean + claim.above, name, pair.half)}"
    if pair.interval is not None:
        how += f" ({' to '.join(number(end + claim.above, name, pair.half) for end in pair.interval)})"
    images = max(t.images for t in results.trials if t.variant in seeds)
    how += f"; {counted(pair.n, 'seed')}, {images:,} images"
    return Finding(claim, verdicts[statistics.verdict(pair, lower, tie)], how)


def _scatter(claim: Claim, results: Comparison) -> Finding | None:
    """Judge a claim on the ratio of training scatter to sampling scatter, which must hold for every variant named."""
    name, parts, ends, images = full_name(results.trials, claim.metric) or claim.metric, [], [], 0
    few = False
    for variant in claim.retrained:
        trials = [t for t in results.trials if t.variant == variant and t.complete]
        values = scores(trials, name)
        ratio = components(values).ratio if values.ndim == 2 and min(values.shape) > 1 else None
        if ratio is None:
            return None
        images = max(images, *(t.images for t in trials))
        few = few or ratio.interval is None
        ends.append(ratio.interval or (0.0, float("inf")))
        parts.append(f"{variant} {ratio.value:.2g} ({ends[-1][0]:.2g} to {ends[-1][1]:.2g})")
    above, below = min(low for low, _ in ends) > claim.above, max(high for _, high in ends) < claim.above
    what = f"{metric_of(name).title}, standard deviation over trainings by that over samples"
    how = f"{what}: {', '.join(parts)}; {values.shape[0]} x {values.shape[1]} seeds, {images:,} images"
    return Finding(claim, "confirmed" if above else "refuted" if below else "undecided" if few else "tied", how)


def _order(values: Sequence[float]) -> float:
    """Estimate the power p of values C N^-p + limit at N, 2N, 4N, ..., whose differences fall with the same power."""
    gaps = np.log2(np.abs(np.diff(values)))
    return float(-np.polyfit(np.arange(len(gaps)), gaps, 1)[0])
