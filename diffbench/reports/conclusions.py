"""The conclusion of a comparison: summaries of every variant, paired tests, and the answer in a sentence or two."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import Literal

from diffbench.core.errors import UserError
from diffbench.metrics.registry import Metric, metric_of
from diffbench.reports import statistics
from diffbench.reports.pairs import PairedTest, paired_tests
from diffbench.reports.results import (
    Comparison,
    Trial,
    by_seed,
    check_comparable,
    full_name,
    levels_of,
    network_key,
    validation_difference,
)
from diffbench.reports.statistics import LEAST, Summary
from diffbench.reports.text import counted, listed, mean_text, number, percent

MOST_IN_PAIRS = 16
"""Largest number of variants for which every pair is tested; with more, a baseline has to be named."""


@dataclass
class Conclusion:
    """A comparison with its answer.

    Attributes:
        comparison: the trials and settings it was drawn from.
        name: the primary metric's full name, or the name as configured if no trial has a value yet.
        variants: name -> its trials.
        summaries: variant -> full name of a metric -> its summary over complete seeds.
        tests: paired tests by the primary metric.
        outcome: the verdict on the whole comparison.
        answer: the verdict in a sentence or two.
        luck: a sentence on the smallest difference in the primary metric that can be found; empty if unknown.
        notes: remarks of the statistics, in addition to the comparison's own notes.
        rungs: budget -> the conclusion there, in rising order, if runs pass several budgets; the last is this one.
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
        """All trials, in the order of the tables."""
        return self.comparison.trials

    @property
    def metric(self) -> Metric:
        """The primary metric."""
        return metric_of(self.name)

    @cached_property
    def metrics(self) -> list[str]:
        """Full names of all metrics that at least one variant has."""
        return list(dict.fromkeys(name for found in self.summaries.values() for name in found))

    def ranked(self, name: str | None = None) -> list[str]:
        """Return the variants that have a metric (default: the primary one), best mean first, non-finite means last."""
        name = name or self.name
        sign = 1 if metric_of(name).lower_is_better else -1
        having = [v for v in self.variants if name in self.summaries[v]]
        means = {v: self.summaries[v][name].mean for v in having}
        return sorted(having, key=lambda v: (not math.isfinite(means[v]), sign * means[v]))

    def by_seed(self, variant: str, name: str) -> dict[int, float]:
        """Return seed -> value of a metric for the complete trials of a variant."""
        return by_seed(self.variants[variant], name)

    def tests_of(self, variant: str) -> dict[str, PairedTest]:
        """Return the tests of a variant, keyed by the other variant."""
        return {x.other(variant): x for x in self.tests if variant in (x.first, x.second)}

    def mean(self, variant: str, name: str | None = None) -> str:
        """Format a variant with its mean and interval: "dit (0.1074 ± 0.0009)"."""
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
    c.tests = paired_tests(variants, name, _pairs(c))
    c.luck = _luck(c)
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
        c.rungs[budget] = c if rung is trials else conclude(replace(comparison, trials=rung, rungs={}))
    if c.rungs:
        c.answer = f"At {list(c.rungs)[-1]}: {c.answer} {_at_each_rung(c)}"
    return c


def holds_at(c: Conclusion, x: PairedTest) -> list[str]:
    """Return the budgets of a ladder at which a pair has the same verdict and the same winner."""
    same = []
    for budget, rung in c.rungs.items():
        tests = (y for y in rung.tests if (y.first, y.second) == (x.first, x.second))
        if any((y.verdict, y.winner) == (x.verdict, x.winner) for y in tests):
            same.append(budget)
    return same


def _at_each_rung(c: Conclusion) -> str:
    """Say which variant is best at each budget, and against how many others that is decided."""
    parts = []
    for budget, rung in c.rungs.items():
        if ranked := rung.ranked():
            tests = rung.tests_of(ranked[0]).values()
            won = sum(x.winner == ranked[0] for x in tests)
            parts.append(f"{ranked[0]} at {budget} (decided against {won} of {len(tests)})")
    return f"The best by budget: {', '.join(parts)}." if parts else ""


def _summaries(trials: Sequence[Trial]) -> dict[str, Summary]:
    complete = [t.values for t in trials if t.complete]
    names = dict.fromkeys(name for values in complete for name in values)
    return {name: statistics.summary([v[name] for v in complete if name in v]) for name in names}


def _pairs(c: Conclusion) -> list[tuple[str, str]]:
    base, names = c.comparison.baseline, list(c.variants)
    if base is not None:
        return [(name, base) for name in names if name != base]
    if len(names) <= MOST_IN_PAIRS:
        return list(combinations(names, 2))
    c.notes.append(
        f"{len(names)} variants make {len(names) * (len(names) - 1) // 2:,} pairs, too many to test: name a"
        " baseline, and each is compared with it."
    )
    return []


def _luck(c: Conclusion) -> str:
    """Return a sentence on the smallest difference that this many seeds can find; empty if it is unknown."""
    rows = [x.differences for x in c.tests]
    if (smallest := statistics.detectable_by_pairs(rows)) is None:
        return ""
    means = [abs(s[c.name].mean) for s in c.summaries.values() if c.name in s]
    smallest = max(smallest, c.metric.tie * min(means))
    seeds = min(map(len, rows))
    return (
        f"With {seeds} seeds, a difference in {c.metric.title} below {number(smallest, c.name, smallest)} is luck:"
        f" only a larger one is found in {percent(statistics.POWER)} of such studies"
        f" ({percent(1 - statistics.ALPHA / len(rows))} confidence, {counted(len(rows), 'pair')})."
    )


def _answer(c: Conclusion) -> None:
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
    found: dict[str, list[str]] = {"won": [], "lost": [], "tie": [], "undecided": []}
    for v in (v for v in c.variants if v in against):
        decided = {best: "won", v: "lost"}.get(against[v].winner or "", against[v].verdict)
        found[decided].append(v)
    won = found["won"]
    answer = f"{c.mean(best)} has the {word} {what}"
    c.outcome = "partly" if won else "tie" if found["tie"] else "not decided"
    if len(won) == len(c.variants) - 1:
        c.outcome = "winner"
        gaps = sorted((against[v] for v in won), key=lambda x: abs(x.paired.mean))
        ends = dict.fromkeys(x.gap(c.name) for x in (gaps[0], gaps[-1]))
        answer += f", better than {won[0] if len(won) == 1 else 'every other variant'} by {' to '.join(ends)}"
    elif found["tie"]:
        too_near = all(against[v].paired.found for v in found["tie"])
        why = f"gaps under {percent(c.metric.tie)} decide nothing" if too_near else "these seeds do not tell them apart"
        answer += f", but ties with {listed([c.mean(v) for v in found['tie']])}: {why}"
    if c.outcome == "partly":
        answer += f". {best} is better than {listed(won)}"
    if found["lost"]:
        answer += f". On the seeds that both have, {listed(found['lost'])} did better"
    for why in dict.fromkeys(_undecided(against[v]) for v in found["undecided"]):
        names = [v for v in found["undecided"] if _undecided(against[v]) == why]
        answer += f". Not decided against {listed(names)}: {why}"
    c.answer = f"{answer}."


def _undecided(x: PairedTest) -> str:
    return f"fewer than {LEAST} shared seeds" if x.paired.finite else "a value is not finite"


def _answer_against(c: Conclusion, base: str) -> None:
    groups: dict[str, list[str]] = {"better": [], "worse": [], "no difference found": []}
    for x in c.tests:
        if x.winner is None:
            what = "no difference found" if x.verdict == "tie" else f"not decided ({_undecided(x)})"
            groups.setdefault(what, []).append(x.first)
        else:
            groups["better" if x.winner == x.first else "worse"].append(f"{x.first} (by {x.gap(c.name)})")
    if groups["better"] or groups["worse"]:
        c.outcome = "partly"
    elif groups["no difference found"]:
        c.outcome = "tie"
    parts = [f"{group}: {listed(names)}" for group, names in groups.items() if names]
    mean = c.mean(base) if c.name in c.summaries[base] else base
    c.answer = f"Against {mean} by {c.metric.title}: {'; '.join(parts)}."


def _disputed(c: Conclusion) -> list[str]:
    """Return a clause for each other metric by which some variant beats the best, with Holm's correction over them."""
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


def _crossings(c: Conclusion) -> list[str]:
    """Return a clause for each variant that predicts the noise better than the best variant at some levels and worse at
    others, with Holm's correction over all levels and variants.
    """
    best, levels = next(iter(c.ranked()), None), levels_of(c.metrics)
    if best is None or len({network_key(trials) for trials in c.variants.values()}) < 2:
        return []
    networks = {network_key(c.variants[rival]): rival for rival in reversed(c.variants)}  # one variant per network
    del networks[network_key(c.variants[best])]
    pairs = {
        (rival, level): statistics.differences(c.by_seed(rival, name), c.by_seed(best, name))
        for rival in reversed(networks.values())
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
