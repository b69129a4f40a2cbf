"""Tables of a conclusion: those that the terminal and the report page share, and the CSV with a row per trial."""

import math
from collections.abc import Sequence
from typing import Any

from diffbench.evaluation.records import values
from diffbench.metrics.registry import metric_of
from diffbench.reports import variance
from diffbench.reports.conclusions import Conclusion, holds_at
from diffbench.reports.pairs import PairedTest
from diffbench.reports.results import Trial, differing, levels_of, network_key
from diffbench.reports.runs import copies, real_count, real_score
from diffbench.reports.text import Rows, as_text, filled, interval_text, mean_text, number, percent, transposed

WIDEST = 6
"""Largest number of variants shown as columns of a table; with more, they are its rows."""
PAIRS_SHOWN = 12
"""Largest number of pairs for which the terminal shows all, not only those of the best variant."""
LEAST_RANKED = 5
"""Fewest results for which ranks are correlated."""
VERDICTS = {
    "winner": "A winner",
    "disputed": "Measures disagree",
    "tie": "A tie",
    "partly": "Partly decided",
    "not decided": "Not decided",
}
IDENTITY = ("seed", "tag", "runs_dir", "format", "kind", "debug")
"""Config keys in which runs of one variant may differ."""


def shown(c: Conclusion) -> list[str]:
    """Return the full names of the metrics shown in tables, the primary one first."""
    if len(c.variants) > 1 and len({network_key(trials) for trials in c.variants.values()}) == 1:
        names = [name for name in c.metrics if not metric_of(name).is_validation]  # one network, sampled differently
    else:
        names = c.metrics
    return sorted((n for n in names if n == c.name or metric_of(n).shown), key=lambda n: n != c.name)


def quality(c: Conclusion) -> Rows:
    """Return a row for each variant: complete seeds, then mean ± half of the 95% interval; real images come last.

    The share of copies is over the samples of all seeds together, with its exact interval.
    """
    rows = []
    for variant, trials in c.variants.items():
        done = sum(t.complete for t in trials)
        row = {"variant": variant, "seeds": f"{done}" if done == len(trials) else f"{done} of {len(trials)}"}
        summaries = c.summaries[variant]
        row |= {name: mean_text(summaries[name], name) for name in shown(c) if name in summaries}
        if share := copies([r for t in trials if t.complete for r in t.records]):
            name = next(name for name in summaries if metric_of(name).name == "copies")
            row[name] = "{} ({} to {})".format(*(number(end, name, 0.001) for end in share))
        rows.append(row)
    real = {name: number(value, name) for name, value in real_scores(c).items()}
    return [*rows, {"variant": "real images", "seeds": "", **real}] if real else rows


def points(c: Conclusion) -> Rows:
    """Return a row for each complete result, named as `diffbench reproduce` expects."""
    return [
        {"cell": f"{t.variant}/{t.seed}"} | {n: number(t.values[n], n) for n in shown(c) if n in t.values}
        for t in c.trials
        if t.complete
    ]


def hyperparameters(c: Conclusion) -> tuple[Rows, Rows]:
    """Return two tables of config keys: those that differ, with a column or row per variant, and those all share."""
    flats = {v: run.flat for v, found in c.variants.items() if (run := next((t.run for t in found if t.run), None))}
    keys, every = differing_keys(c.trials), dict.fromkeys(key for flat in flats.values() for key in flat)
    rows = [{"variant": v} | {k: _plain(flat[k]) for k in keys if k in flat} for v, flat in flats.items()]
    first: dict[str, Any] = next(iter(flats.values()), {})
    shared = [{"key": k, "value": _plain(first[k])} for k in every if k in first and k not in (*keys, *IDENTITY)]
    return (rows if len(rows) > WIDEST or not keys else transposed(rows, "key")), shared


def _plain(value: Any) -> str:
    return "null" if value is None else str(value)


def agreement(c: Conclusion) -> Rows:
    """Return Spearman's rank correlation of measures over all complete results, with a row for each measure."""
    ranking = [name for name in shown(c) if metric_of(name).direction]
    watched = [name for name in ranking if metric_of(name).watched]
    names = [*ranking, *(levels_of(c.metrics) if "val/bound" in ranking else ())]
    signs = {name: 1 if metric_of(name).lower_is_better else -1 for name in names}
    values = [{name: signs[name] * t.values.get(name, math.nan) for name in names} for t in c.trials if t.complete]
    if len(values) < LEAST_RANKED or len(watched) < 2:
        return []
    import pandas as pd  # takes half a second to import, and few tables need it

    found = pd.DataFrame(values).corr("spearman", min_periods=LEAST_RANKED)
    return [
        {"measure": name, **{other: f"{r:.2f}" for other in watched if math.isfinite(r := found.loc[name, other])}}
        for name in names
    ]


def real_scores(c: Conclusion) -> dict[str, float]:
    """Return full name of a metric -> the score of the same number of real images."""
    records = [t.record for t in c.trials if t.record]
    alike = {n: [r for r in records if n in r and not real_count(r, n)] for n in shown(c)}
    found = {n: next((real_score(r, n) for r in alike[n] if real_score(r, n) is not None), None) for n in shown(c)}
    return {name: value for name, value in found.items() if value is not None}


def pairs(c: Conclusion, tests: Sequence[PairedTest] | None = None) -> Rows:
    """Return a row for each pair: difference, interval, corrected p-value, verdict and detectable difference."""
    rows = []
    for x in c.tests if tests is None else tests:
        p = x.paired.adjusted
        tie = f"tie (under {percent(c.metric.tie)})" if x.paired.found else "tie"
        row = {
            "pair": f"{x.first} - {x.second}",
            "seeds": str(x.paired.n),
            "difference": number(x.paired.mean, c.name, x.paired.half),
            "interval": interval_text(x.paired, c.name),
            "p (Holm)": "-" if p is None else f"{p:.4f}" if p >= 0.0001 else "< 0.0001",
            "effect": "-" if x.paired.effect is None else f"{x.paired.effect:.2f}",
            "verdict": f"{x.winner} is better" if x.winner else tie if x.verdict == "tie" else "not decided",
            "detectable": "-" if x.detectable is None else number(x.detectable, c.name, x.paired.half),
        }
        if c.rungs:
            row["same verdict at"] = ", ".join(holds_at(c, x)) or "-"
        if x.by_image is not None:
            row["by image and noise"] = interval_text(x.by_image, "val/bound")
        rows.append(row)
    return rows


def costs(c: Conclusion) -> Rows:
    """Return a row for each variant: size, length and speed of its trials so far."""
    rows = []
    for variant, trials in c.variants.items():
        row = {"variant": variant}
        begun = [(t, t.run) for t in trials if t.run and t.run.images_seen]
        timed = [(run.images_seen, run.seconds) for _, run in begun if run.seconds]
        peaks = [t.peak_gib for t in trials if t.peak_gib is not None]
        evaluations = [((t.record or {}).get("drawing") or {}).get("network_evaluations") for t in trials]
        if cost := next((t.cost for t in trials if t.cost), None):
            row |= {"parameters": f"{cost.parameters:,}", "GMACs": f"{cost.gmacs:.4g}"}
        facts = {
            "images": _range([float(run.images_seen) for _, run in begun], "{:,.0f}"),
            "training FLOPs": _range([t.flops for t, _ in begun if t.flops is not None], "{:.3g}").replace("e+", "e"),
            "seconds": _range([seconds for _, seconds in timed], "{:,.0f}"),
            "images/s": _range([images / seconds for images, seconds in timed], "{:,.0f}"),
            "peak GPU memory (GiB)": f"{max(peaks):.2f}" if peaks else "",
            "network evaluations a sample": ", ".join(map(str, sorted({int(e) for e in evaluations if e is not None}))),
        }
        rows.append(row | {name: text for name, text in facts.items() if text})
    return rows


def _range(values: Sequence[float], form: str) -> str:
    return " to ".join(dict.fromkeys(form.format(v) for v in (min(values), max(values)))) if values else ""


def missing(c: Conclusion) -> Rows:
    """Return a row for each trial that does not count, with the reason."""
    return [
        {"variant": t.variant, "seed": str(t.seed), "status": t.status, "why": t.why or "-"}
        for t in c.trials
        if not t.complete
    ]


def differing_keys(trials: Sequence[Trial]) -> list[str]:
    """Return the config keys that differ between runs, apart from `IDENTITY`."""
    flats = [run.flat for run in {id(t.run): t.run for t in trials}.values() if run]
    return [key for key in differing(flats) if key not in IDENTITY]


def as_csv(c: Conclusion) -> str:
    """Return a CSV with a row for each trial at each budget and sampling seed: identity, cost, config keys that differ,
    and every value under its full name.
    """
    rungs = c.comparison.rungs or {"": c.trials}
    trials = [(budget, t) for budget, rung in rungs.items() for t in rung]
    keys, names = differing_keys(c.trials), dict.fromkeys(name for _, t in trials for name in t.values)
    rows = []
    for budget, t, record in ((b, trial, record) for b, trial in trials for record in trial.records or [{}]):
        sample = record.get("sample") or {}
        row: dict[str, Any] = {
            "variant": t.variant,
            "seed": t.seed,
            "status": t.status,
            "why": t.why,
            "folder": t.run.folder if t.run else None,
            "parameters": t.cost.parameters if t.cost else None,
            "macs": t.cost.macs if t.cost else None,
            "data": _data(t),
            "budget": budget or None,
            "images": t.images or None,
            "training_flops": t.flops,
            "training_seconds": t.seconds,
            "peak_gpu_gib": t.peak_gib,
            "sampler": sample.get("sampler"),
            "steps": sample.get("steps"),
            "guidance": record.get("guidance"),
            "network_evaluations": (record.get("drawing") or {}).get("network_evaluations"),
            "sample_seed": sample.get("seed"),
            "ema": record.get("ema"),
            "commit": record.get("commit"),
        }
        row |= {f"config.{k}": t.run.flat.get(k) if t.run else None for k in keys}
        found = t.values | values(record)
        rows.append(row | {n: "nan" if math.isnan(found.get(n, 0)) else found.get(n) for n in names})
    import pandas as pd

    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")


def _data(t: Trial) -> str | None:
    """Return the data set of a trial, with the side of its images if that is a key: "digits 8x8"."""
    flat = t.run.flat if t.run else {}
    side = flat.get("data.size", flat.get("data.image_size"))
    return " ".join([str(flat["data.name"]), *([f"{side}x{side}"] if isinstance(side, int) else [])]) if flat else None


def for_terminal(c: Conclusion, runs: str | None = None) -> str:
    """Format answer, variants, pairs and missing trials as text; a table `runs`, if given, replaces the variants."""
    head = VERDICTS[c.outcome].removeprefix("A ").upper()
    head += f" BY {c.metric.title.upper()}" if c.outcome == "winner" else ""
    parts = [filled(text) for text in (c.comparison.title, c.comparison.question, "", f"{head}. {c.answer}")]
    if c.luck:
        parts.append(filled(c.luck))
    if not c.comparison.like_for_like:
        parts.append("Not like for like: the variants differ in more than the question.")
    rows = quality(c)
    if runs is not None:
        parts += ["", runs]
    elif len(c.variants) <= WIDEST:
        cost = {row["variant"]: row for row in costs(c)}
        for row in rows:
            found = cost.get(row["variant"], {})
            row |= {key: found[key] for key in ("parameters", "GMACs", "seconds") if key in found}
        parts += ["", as_text(transposed(rows))]
    else:
        best = [*c.ranked()[: 2 * PAIRS_SHOWN], "real images"]
        if len(rows) > 2 * len(best):
            rows = [row for row in rows if row["variant"] in best]
        columns = ["variant", "seeds", *shown(c)[:5]]
        parts += ["", as_text([{k: v for k, v in row.items() if k in columns} for row in rows])]
        if len(rows) < len(c.variants):
            parts.append(f"the best of {len(c.variants):,} variants; the report shows all")
    if c.tests:
        tests = c.tests
        if len(tests) > PAIRS_SHOWN and (ranked := c.ranked()):
            tests = list(c.tests_of(ranked[0]).values()) or tests
        tests = tests[: 2 * PAIRS_SHOWN]
        parts += ["", f"{c.name}, paired by seed ({c.metric.better()}; intervals and p by Holm over {len(c.tests)})"]
        parts.append(as_text(pairs(c, tests)))
        if len(tests) < len(c.tests):
            parts.append(f"all {len(c.tests)} pairs are in the report")
    if scatter := variance.table(c):
        parts += ["", "where the scatter comes from (standard deviations)", as_text(scatter)]
    if absent := missing(c):
        parts += ["", "not counted", as_text(absent[: 2 * PAIRS_SHOWN])]
    return "\n".join(parts + [filled(f"note: {note}") for note in [*c.comparison.notes, *c.notes]])
