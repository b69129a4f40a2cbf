"""The conclusion of a comparison: summaries of every variant, paired differences, the answer in a sentence or two."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import Literal

import numpy as np

from diffbench.core.errors import UserError
from diffbench.metrics.registry import Metric, metric_of
from diffbench.reports import statistics
from diffbench.reports.results import Comparison, Trial, check_comparable, full_name, validation_difference
from diffbench.reports.statistics import LEAST, Paired, Summary, Verdict
from diffbench.reports.text import counted, listed, mean_text, number, percent

MOST_IN_PAIRS = 16
"""Variants beyond which not every pair is tested: a baseline is named then."""
MOST_RESAMPLED = 12
"""Pairs whose interval over images is checked by the bootstrap."""


@dataclass(frozen=True)
class PairedTest:
    """Two variants by the primary metric, first minus second.

    Attributes:
        first, second: the variants.
        paired: their differences, seed by seed.
        verdict: which one is better.
        detectable: the smallest true difference that would have been found, at least what counts as a tie.
        by_image: differences of validation bounds, paired by image and noise, seeds averaged: how sure the difference
            is for these trained networks.
        resampled: the bootstrap's 95% interval of the same.
    """

    first: str
    second: str
    paired: Paired
    verdict: Verdict
    detectable: float | None
    by_image: Paired | None = None
    resampled: tuple[float, float] | None = None

    @property
    def winner(self) -> str | None:
        """The better one, or None."""
        return {"first": self.first, "second": self.second}.get(self.verdict)

    @property
    def bootstrap_agrees(self) -> bool:
        """Whether the bootstrap over images finds a difference exactly where the t test does."""
        assert self.resampled is not None and self.by_image is not None
        return (self.resampled[0] > 0 or self.resampled[1] < 0) == self.by_image.found

    def other(self, name: str) -> str:
        """The variant that `name` is tested against."""
        return self.second if name == self.first else self.first

    def gap(self, name: str) -> str:
        """The size of the difference, to the digits that its interval leaves."""
        return number(abs(self.paired.mean), name, self.paired.half)


@dataclass
class Conclusion:
    """A comparison with its answer.

    Attributes:
        comparison: what was asked.
        name: the primary metric's full name, or as it was asked for where no trial has it yet.
        variants: name -> its trials.
        summaries: variant -> full name of a metric -> over complete seeds.
        tests: pairs by the primary metric.
        outcome: of the comparison.
        answer: in a sentence or two.
        luck: below which difference by the primary metric nothing is found, in a sentence; empty where it is not known.
        notes: what the statistics have to say besides the comparison's own notes.
        rungs: budget -> the conclusion there, rising, where runs pass several budgets; the last is this one.
    """

    comparison: Comparison
    name: str
    variants: dict[str, list[Trial]]
    summaries: dict[str, dict[str, Summary]]
    tests: list[PairedTest] = field(default_factory=list)
    outcome: Literal["winner", "disputed", "tie", "partly", "not decided"] = "not decided"
    answer: str = ""
    luck: str = ""
    notes: list[str] = field(default_factory=list)
    rungs: "dict[str, Conclusion]" = field(default_factory=dict)

    @property
    def trials(self) -> list[Trial]:
        """All trials, in the order of tables."""
        return self.comparison.trials

    @property
    def metric(self) -> Metric:
        """The primary metric."""
        return metric_of(self.name)

    @cached_property
    def metrics(self) -> list[str]:
        """The full names of all metrics that some variant has."""
        return list(dict.fromkeys(name for found in self.summaries.values() for name in found))

    def ranked(self, name: str | None = None) -> list[str]:
        """Variants that have a metric, by default the primary one, the best mean first."""
        name = name or self.name
        sign = 1 if metric_of(name).lower_is_better else -1
        having = [v for v in self.variants if name in self.summaries[v]]
        return sorted(having, key=lambda v: sign * self.summaries[v][name].mean)

    def by_seed(self, variant: str, name: str) -> dict[int, float]:
        """Seed -> value of the complete trials."""
        return {t.seed: t.values[name] for t in self.variants[variant] if t.complete and name in t.values}

    def tests_of(self, variant: str) -> dict[str, PairedTest]:
        """Other variant -> its test against this one."""
        return {x.other(variant): x for x in self.tests if variant in (x.first, x.second)}

    def mean(self, variant: str, name: str | None = None) -> str:
        """A variant with its mean and interval: "dit (0.1074 ± 0.0009)"."""
        name = name or self.name
        return f"{variant} ({mean_text(self.summaries[variant][name], name)})"


def conclude(comparison: Comparison) -> Conclusion:
    """Draw the conclusion of a comparison.

    Raises:
        UserError: if values were measured differently, or the baseline is not a variant.
    """
    trials = comparison.trials
    check_comparable(trials, comparison.primary)
    name = full_name(trials, comparison.primary) or comparison.primary
    if metric_of(name).is_validation and (differing := validation_difference(trials)) is not None:
        raise UserError(f"validations were measured differently: {differing}; choose another primary metric")
    variants: dict[str, list[Trial]] = {}
    for trial in trials:
        variants.setdefault(trial.variant, []).append(trial)
    if comparison.baseline is not None and comparison.baseline not in variants:
        raise UserError(f"baseline: {comparison.baseline} is not a variant; choose from {', '.join(variants)}")
    c = Conclusion(comparison, name, variants, {v: _summaries(found) for v, found in variants.items()})
    c.tests = _tests(c)
    if comparison.baseline is not None and c.ranked() and c.tests:
        _answer_against(c, comparison.baseline)
    else:
        _answer(c)
    if crossings := _crossings(c):
        c.answer += f" Along the noise levels they cross: {'; '.join(crossings[:3])}."
    if disputed := _disputed(c):
        c.answer += f" Other measures disagree: {'; '.join(disputed)}."
        c.outcome = "disputed" if c.outcome == "winner" else c.outcome
    for budget, rung in comparison.rungs.items():
        c.rungs[budget] = conclude(replace(comparison, trials=rung, rungs={}))
    if c.rungs:
        c.answer = f"At {list(c.rungs)[-1]}: {c.answer} {_at_each_rung(c)}"
    return c


def holds_at(c: Conclusion, x: PairedTest) -> list[str]:
    """The budgets of a ladder at which a pair has the same verdict, the same variant better."""
    same = []
    for budget, rung in c.rungs.items():
        tests = (y for y in rung.tests if (y.first, y.second) == (x.first, x.second))
        if any((y.verdict, y.winner) == (x.verdict, x.winner) for y in tests):
            same.append(budget)
    return same


def _at_each_rung(c: Conclusion) -> str:
    """Who is best at each budget, and against how many others that is decided."""
    parts = []
    for budget, rung in c.rungs.items():
        if ranked := rung.ranked():
            won = sum(x.winner == ranked[0] for x in rung.tests_of(ranked[0]).values())
            parts.append(f"{ranked[0]} at {budget} (decided against {won} of {len(rung.variants) - 1})")
    return f"The best by budget: {', '.join(parts)}." if parts else ""


def _summaries(trials: Sequence[Trial]) -> dict[str, Summary]:
    complete = [t.values for t in trials if t.complete]
    names = dict.fromkeys(name for values in complete for name in values)
    return {name: statistics.summary([v[name] for v in complete if name in v]) for name in names}


def _tests(c: Conclusion) -> list[PairedTest]:
    base, names = c.comparison.baseline, list(c.variants)
    if base is not None:
        pairs = [(name, base) for name in names if name != base]
    elif len(names) <= MOST_IN_PAIRS:
        pairs = list(combinations(names, 2))
    else:
        c.notes.append(
            f"{len(names)} variants make {len(names) * (len(names) - 1) // 2:,} pairs, too many to test: name a"
            " baseline, and each is compared with it."
        )
        return []
    seeds = {name: c.by_seed(name, c.name) for name in names}
    rows = {(a, b): statistics.differences(seeds[a], seeds[b]) for a, b in pairs}
    tested = statistics.paired(rows)
    c.luck = _luck(c, list(rows.values()))
    images = _by_image(c, pairs)
    by_image = statistics.paired({pair: row.tolist() for pair, row in images.items()})
    found = []
    for (a, b), paired in tested.items():
        shared = sorted(seeds[a].keys() & seeds[b].keys())
        tie = c.metric.tie * min((float(np.mean([seeds[v][s] for s in shared])) for v in (a, b) if shared), default=0.0)
        verdict = statistics.verdict(paired, c.metric.lower_is_better, tie)
        detectable = None if paired.detectable is None else max(paired.detectable, tie)
        resampled = None
        if (a, b) in images and len(images) <= MOST_RESAMPLED:
            resampled = statistics.bootstrap(images[a, b], "bound by image")
        found.append(PairedTest(a, b, paired, verdict, detectable, by_image.get((a, b)), resampled))
    return found


def _luck(c: Conclusion, rows: Sequence[Sequence[float]]) -> str:
    """The smallest difference that so many seeds find, at least what counts as a tie, in a sentence."""
    if (least := statistics.luck(rows)) is None:
        return ""
    means = [abs(s[c.name].mean) for s in c.summaries.values() if c.name in s]
    least = max(least, c.metric.tie * min(means))
    seeds = min(map(len, rows))
    return (
        f"With {seeds} seeds, a difference in {c.metric.title} below {number(least, c.name, least)} is luck:"
        f" only a larger one is found in {percent(statistics.POWER)} of such studies"
        f" ({percent(1 - statistics.ALPHA / len(rows))} confidence, {counted(len(rows), 'pair')})."
    )


def _by_image(c: Conclusion, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], np.ndarray]:
    """Pair -> (images,) differences of the bound, averaged over the seeds that both have."""
    bounds: dict[str, dict[int, np.ndarray]] = {}
    for variant, trials in c.variants.items():
        measured = {t.seed: t.image_bounds for t in trials if t.complete}
        bounds[variant] = {seed: b for seed, b in measured.items() if b is not None and np.isfinite(b).all()}
    rows = {}
    for a, b in pairs:
        shapes = {bounds[v][seed].shape for seed in bounds[a].keys() & bounds[b].keys() for v in (a, b)}
        if len(shapes) == 1 and network_key(c.variants[a]) != network_key(c.variants[b]):
            rows[a, b] = statistics.by_image(bounds[a], bounds[b])
    return rows


def network_key(trials: Sequence[Trial]) -> tuple[str, ...]:
    """The run folders of a variant, which variants that only sample differently share; its name without any."""
    return tuple(sorted({str(t.run.folder) for t in trials if t.run})) or (trials[0].variant,)


def _answer(c: Conclusion) -> None:
    """Fill in outcome and answer, all pairs tested."""
    what, ranked = c.metric.title, c.ranked()
    if not ranked:
        c.answer = f"Not decided: no result has {what} yet."
        return
    best, against = ranked[0], c.tests_of(ranked[0])
    word = "lowest" if c.metric.lower_is_better else "highest"
    if len(ranked) == 1:
        c.answer = f"Not decided: {c.mean(best)} is the only variant with {what}."
        return
    if not c.tests:
        c.answer = f"Not decided: {c.mean(best)} has the {word} {what}, untested: too many variants for all pairs."
        return
    won = [v for v in c.variants if v in against and against[v].winner == best]
    lost = [v for v in c.variants if v in against and against[v].winner == v]
    tied = [v for v in c.variants if v in against and against[v].verdict == "tie"]
    undecided = [v for v in c.variants if v in against and against[v].verdict == "undecided"]
    sentences = [f"{c.mean(best)} has the {word} {what}"]
    if len(won) == len(c.variants) - 1:
        c.outcome = "winner"
        gaps = sorted((against[v] for v in won), key=lambda x: abs(x.paired.mean))
        ends = dict.fromkeys(x.gap(c.name) for x in (gaps[0], gaps[-1]))
        sentences[0] += f", better than {won[0] if len(won) == 1 else 'every other variant'} by {' to '.join(ends)}"
    elif tied:
        c.outcome = "partly" if won else "tie"
        found = all(against[v].paired.found for v in tied)
        why = f"gaps under {percent(c.metric.tie)} decide nothing" if found else "these seeds do not tell them apart"
        sentences[0] += f", but ties with {listed([c.mean(v) for v in tied])}: {why}"
    elif won:
        c.outcome = "partly"
    if c.outcome == "partly" and won:
        sentences.append(f"{best} is better than {listed(won)}")
    if lost:
        sentences.append(f"On the seeds that both have, {listed(lost)} did better")
    if undecided:
        sentences.append(f"Not decided against {listed(undecided)}: fewer than {LEAST} shared seeds")
    c.answer = ". ".join(sentences) + "."


def _answer_against(c: Conclusion, base: str) -> None:
    """Fill in outcome and answer, each variant tested against the baseline."""
    undecided = f"not decided (fewer than {LEAST} shared seeds)"
    groups: dict[str, list[str]] = {"better": [], "worse": [], "no difference found": [], undecided: []}
    for x in c.tests:
        if x.winner is None:
            groups["no difference found" if x.verdict == "tie" else undecided].append(x.first)
        else:
            groups["better" if x.winner == x.first else "worse"].append(f"{x.first} (by {x.gap(c.name)})")
    if groups["better"] or groups["worse"]:
        c.outcome = "partly"
    elif groups["no difference found"]:
        c.outcome = "tie"
    parts = [f"{words}: {listed(names)}" for words, names in groups.items() if names]
    mean = c.mean(base) if c.name in c.summaries[base] else base
    c.answer = f"Against {mean} by {c.metric.title}: {'; '.join(parts)}."


def _disputed(c: Conclusion) -> list[str]:
    """By which other measures some variant is better than the best by the primary one, Holm's correction over them."""
    best = next(iter(c.ranked()), None)
    rivals: dict[tuple[str, str], list[float]] = {}
    for name in c.metrics:
        ranked = c.ranked(name)
        if metric_of(name).watched and name != c.name and best in ranked and ranked[0] != best:
            rivals[ranked[0], name] = statistics.differences(c.by_seed(ranked[0], name), c.by_seed(best, name))
    found = []
    for (rival, name), paired in statistics.paired(rivals).items():
        metric = metric_of(name)
        tie = metric.tie * c.summaries[rival][name].mean
        if best is not None and statistics.verdict(paired, metric.lower_is_better, tie) == "first":
            found.append(f"by {metric.title} {c.mean(rival, name)} is better than {c.mean(best, name)}")
    return found


def levels_of(names: Iterable[str], part: str = "val") -> dict[str, float]:
    """Name -> log-SNR of the errors at single noise levels, rising."""
    start = f"{part}/level/"
    found = {name: float(name.removeprefix(start)) for name in names if name.startswith(start)}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _crossings(c: Conclusion) -> list[str]:
    """Which variants predict the noise better than the best by the primary metric at some noise levels and worse at
    others, Holm's correction over all levels and variants.
    """
    best, levels = next(iter(c.ranked()), None), levels_of(c.metrics)
    if best is None or len({network_key(trials) for trials in c.variants.values()}) < 2:
        return []
    pairs = {
        (rival, level): statistics.differences(c.by_seed(rival, name), c.by_seed(best, name))
        for rival in c.variants
        if network_key(c.variants[rival]) != network_key(c.variants[best])
        for name, level in levels.items()
    }
    better: dict[str, dict[str, list[str]]] = {}
    for (rival, level), paired in statistics.paired(pairs).items():
        verdict = statistics.verdict(paired, lower_is_better=True)
        better.setdefault(rival, {}).setdefault(verdict, []).append(f"{level:g}")
    return [
        f"{rival} is better at log-SNR {listed(at['first'])}, {best} at {listed(at['second'])}"
        for rival, at in better.items()
        if at.keys() >= {"first", "second"}
    ]


def confidence(tests: Sequence[PairedTest]) -> str:
    """The confidence of intervals: 95%, or 95% to 98.3%."""
    levels = sorted({x.paired.confidence for x in tests if x.paired.confidence is not None})
    return " to ".join(dict.fromkeys(percent(level) for level in (levels[0], levels[-1]))) if levels else ""
