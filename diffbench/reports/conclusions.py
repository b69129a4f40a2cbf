"""What a comparison comes to: summaries of every variant, paired differences, and the answer in a sentence or two."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import numpy as np

from diffbench.core.errors import UserError
from diffbench.reports import statistics
from diffbench.reports.entries import Entry, common_data, entries, resolved
from diffbench.reports.results import Comparison
from diffbench.reports.statistics import FRECHET_TIE, LEAST, Paired, Summary, Verdict
from diffbench.reports.wording import is_frechet, listed, lower_is_better, number, percent, short, spread, title
from diffbench.runs.seen import Seen

MOST_IN_PAIRS = 16
"""Variants beyond which not every pair is tested: a baseline is named then."""
WATCHED = ("val/error", "fd", "fid", "kid", "label_accuracy", "coverage")
"""Measures that may disagree with the primary one."""
MOST_RESAMPLED = 12
"""Pairs whose interval over images is checked by the bootstrap."""


@dataclass(frozen=True)
class Contest:
    """Two variants by the primary metric, first minus second."""

    first: str
    second: str
    paired: Paired
    verdict: Verdict
    detectable: float | None
    """The smallest true difference that would have been found, no less than what is a tie by itself."""
    by_image: Paired | None = None
    """Of validation errors, paired by image and noise, seeds averaged: how sure for these trained networks."""
    resampled: tuple[float, float] | None = None
    """The bootstrap's 95% interval of the same."""

    @property
    def winner(self) -> str | None:
        """The better one, or None."""
        return {"first": self.first, "second": self.second}.get(self.verdict)


@dataclass
class Conclusion:
    """A comparison with its answer.

    Attributes:
        comparison: what was asked.
        entries: every result.
        metric: the primary metric's full name, or as it was asked for where nothing has it yet.
        variants: name -> its results.
        summaries: variant -> full name -> over complete seeds.
        contests: pairs by the primary metric.
        outcome: of the whole.
        answer: in a sentence or two.
        notes: what the statistics have to say besides the comparison's own notes.
    """

    comparison: Comparison
    entries: list[Entry]
    metric: str
    variants: dict[str, list[Entry]]
    summaries: dict[str, dict[str, Summary]]
    contests: list[Contest] = field(default_factory=list)
    outcome: Literal["winner", "disputed", "tie", "partly", "not decided"] = "not decided"
    answer: str = ""
    notes: list[str] = field(default_factory=list)

    def ranked(self) -> list[str]:
        """Variants that have the primary metric, the best mean first."""
        having = [v for v in self.variants if self.metric in self.summaries[v]]
        sign = 1 if lower_is_better(self.metric) else -1
        return sorted(having, key=lambda v: sign * self.summaries[v][self.metric].mean)

    def by_seed(self, variant: str, name: str) -> dict[int, float]:
        """Seed -> value of the complete results."""
        return {e.result.seed: e.values[name] for e in self.variants[variant] if e.complete and name in e.values}


def conclude(comparison: Comparison, known: Sequence[Seen] = ()) -> Conclusion:
    """Reads every result once and draws the conclusion; run folders that are `known` are not read again.

    Raises:
        UserError: if values were measured differently, or the baseline is no variant.
    """
    found = entries(comparison, known)
    metric = resolved(found, comparison.primary) or comparison.primary
    variants: dict[str, list[Entry]] = {}
    for entry in found:
        variants.setdefault(entry.result.variant, []).append(entry)
    if metric == "val/error" and (told := common_data(found)) is not None:
        raise UserError(f"validation errors were measured differently: {told}; choose another primary metric")
    c = Conclusion(comparison, found, metric, variants, {v: _summaries(e) for v, e in variants.items()})
    if comparison.baseline is not None and comparison.baseline not in variants:
        raise UserError(f"baseline: {comparison.baseline} is no variant; choose from {', '.join(variants)}")
    c.contests = _contests(c)
    _answer(c)
    disputed = _disputed(c)
    if disputed:
        c.answer += f" Other measures disagree: {'; '.join(disputed)}."
        c.outcome = "disputed" if c.outcome == "winner" else c.outcome
    return c


def _summaries(found: Sequence[Entry]) -> dict[str, Summary]:
    complete = [e.values for e in found if e.complete]
    names = dict.fromkeys(name for values in complete for name in values)
    return {name: statistics.summary([v[name] for v in complete if name in v]) for name in names}


def _contests(c: Conclusion) -> list[Contest]:
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
    seeds = {name: c.by_seed(name, c.metric) for name in names}
    tested = statistics.paired({(a, b): statistics.differences(seeds[a], seeds[b]) for a, b in pairs})
    images = _by_image(c, pairs)
    sure = statistics.paired({pair: row.tolist() for pair, row in images.items()})
    resampled = {
        pair: statistics.bootstrap(row, "validation error by image")
        for pair, row in (images.items() if len(images) <= MOST_RESAMPLED else ())
    }
    found = []
    for pair, paired in tested.items():
        smaller = None
        if is_frechet(c.metric) and paired.n:
            shared = sorted(seeds[pair[0]].keys() & seeds[pair[1]].keys())
            smaller = min(float(np.mean([seeds[v][s] for s in shared])) for v in pair)
        decided = statistics.verdict(paired, lower_is_better(c.metric), smaller)
        least = paired.detectable
        if least is not None and smaller is not None:
            least = max(least, FRECHET_TIE * smaller)
        found.append(Contest(*pair, paired, decided, least, sure.get(pair), resampled.get(pair)))
    return found


def _by_image(c: Conclusion, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], np.ndarray]:
    """Pair -> (images,) differences of validation error, averaged over noise levels and the seeds that both have."""
    errors = {v: image_errors(found) for v, found in c.variants.items()}
    rows = {}
    for a, b in pairs:
        one, two = errors[a], errors[b]
        shared = one.keys() & two.keys()
        shapes = {x[s].shape for x in (one, two) for s in shared}
        apart = {e.result.folder for e in c.variants[a]} != {e.result.folder for e in c.variants[b]}
        if len(shapes) == 1 and apart:
            rows[a, b] = statistics.by_image(one, two).mean(axis=0)
    return rows


def image_errors(found: Sequence[Entry]) -> dict[int, np.ndarray]:
    """Seed -> (levels, images) validation errors of complete results; results of one run hold the same array."""
    kept: dict[int, np.ndarray] = {}
    for entry in found:
        errors = entry.image_errors if entry.complete and entry.seen is not None else None
        if errors is not None and np.isfinite(errors.error).all():
            kept[entry.result.seed] = errors.error
    return kept


def _answer(c: Conclusion) -> None:
    """Fills in outcome and answer."""
    what, base, ranked = title(c.metric), c.comparison.baseline, c.ranked()
    if not ranked:
        c.answer = f"Not decided: no result has {what} yet."
        return
    means = {v: f"{v} ({spread(c.summaries[v][c.metric], c.metric)})" for v in ranked}
    best = ranked[0]
    word = "lowest" if lower_is_better(c.metric) else "highest"
    if len(ranked) == 1:
        c.answer = f"Not decided: {means[best]} is the only variant with {what}."
        return
    if not c.contests:
        c.answer = f"Not decided: {means[best]} has the {word} {what}, untested: too many variants for all pairs."
        return
    if base is not None:
        _answer_baseline(c, means, base)
        return
    against = {(x.second if x.first == best else x.first): x for x in c.contests if best in (x.first, x.second)}
    groups: dict[str, list[str]] = {"won": [], "lost": [], "tie": [], "undecided": []}
    for name in c.variants:
        if name != best:
            contest = against[name]
            decided = {best: "won", name: "lost"}.get(contest.winner or "", contest.verdict)
            groups[decided].append(name)
    won, tied = groups["won"], groups["tie"]
    told = [f"{means[best]} has the {word} {what}"]
    if len(won) == len(c.variants) - 1:
        c.outcome = "winner"
        gaps = sorted((against[v] for v in won), key=lambda x: abs(x.paired.mean))
        ends = dict.fromkeys(gap(x, c.metric) for x in (gaps[0], gaps[-1]))
        told[0] += f", better than {won[0] if len(won) == 1 else 'every other variant'} by {' to '.join(ends)}"
    elif tied:
        c.outcome = "partly" if won else "tie"
        why = "these seeds do not tell them apart"
        if all(against[v].paired.found for v in tied):
            why = "gaps under 1.3% decide nothing"
        told[0] += f", but ties with {listed([means[v] for v in tied])}: {why}"
    elif won:
        c.outcome = "partly"
    if c.outcome == "partly" and won:
        told.append(f"{best} is better than {listed(won)}")
    if groups["lost"]:
        told.append(f"On the seeds that both have, {listed(groups['lost'])} did better")
    if groups["undecided"]:
        told.append(f"Not decided against {listed(groups['undecided'])}: fewer than {LEAST} shared seeds")
    c.answer = ". ".join(told) + "."


def _answer_baseline(c: Conclusion, means: dict[str, str], base: str) -> None:
    groups: dict[str, list[str]] = {"better": [], "worse": [], "tie": [], "open": []}
    for x in c.contests:
        if x.verdict == "undecided":
            groups["open"].append(x.first)
        elif x.verdict == "tie":
            groups["tie"].append(x.first)
        else:
            groups["better" if x.winner == x.first else "worse"].append(f"{x.first} (by {gap(x, c.metric)})")
    told = []
    for key, words in (("better", "better"), ("worse", "worse")):
        if groups[key]:
            told.append(f"{words}: {listed(groups[key])}")
    if groups["tie"]:
        told.append(f"no difference found: {listed(groups['tie'])}")
    if groups["open"]:
        told.append(f"not decided (fewer than {LEAST} shared seeds): {listed(groups['open'])}")
    found = groups["better"] or groups["worse"]
    c.outcome = "not decided" if not (found or groups["tie"]) else "partly" if found else "tie"
    c.answer = f"Against {means.get(base, base)} by {title(c.metric)}: {'; '.join(told)}."


def _disputed(c: Conclusion) -> list[str]:
    """By which other measures some variant is better than the best by the primary one, Holm's correction over them."""
    ranked = c.ranked()
    watched = {n: short(n) for v in c.variants for n in c.summaries[v] if short(n) in WATCHED and n != c.metric}
    rivals: dict[tuple[str, str], list[float]] = {}
    for name in watched if ranked else ():
        sign = 1 if lower_is_better(name) else -1
        having = [v for v in c.variants if name in c.summaries[v]]
        rival = min(having, key=lambda v: sign * c.summaries[v][name].mean)
        if rival != ranked[0] and ranked[0] in having:
            rivals[rival, name] = statistics.differences(c.by_seed(rival, name), c.by_seed(ranked[0], name))
    told = []
    for (rival, name), paired in statistics.paired(rivals).items():
        smaller = c.summaries[rival][name].mean if is_frechet(name) else None
        if statistics.verdict(paired, lower_is_better(name), smaller) == "first":
            means = [spread(c.summaries[v][name], name) for v in (rival, ranked[0])]
            told.append(f"by {title(name)} {rival} ({means[0]}) is better than {ranked[0]} ({means[1]})")
    return told


def gap(x: Contest, name: str) -> str:
    """The size of a difference, to the digits that its interval leaves."""
    low, high = x.paired.interval or (0.0, 0.0)
    return number(abs(x.paired.mean), name, (high - low) / 2 or None)


def interval(x: Paired, name: str) -> str:
    """The interval of a difference, "-0.0071 to -0.0045"; in words where there is none."""
    if x.interval is None:
        return f"none: {x.n} shared seed{'' if x.n == 1 else 's'}"
    half = (x.interval[1] - x.interval[0]) / 2
    low, high = (number(v, name, half or None) for v in x.interval)
    return f"{low} to {high}"


def confidence(contests: Sequence[Contest]) -> str:
    """At what confidence intervals stand: 95%, or from 95% to 98.3%."""
    levels = sorted({x.paired.confidence for x in contests if x.paired.confidence is not None})
    if not levels:
        return ""
    return percent(levels[0]) if len(levels) == 1 else f"{percent(levels[0])} to {percent(levels[-1])}"
