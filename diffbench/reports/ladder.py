"""A study over several budgets: fits of error = a + b C^-c, crossings, and rank correlation between budgets.

The 95% intervals come from resampling seeds, whole runs at a time, since the rungs of a run share its weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from diffbench.core import rng
from diffbench.metrics.registry import metric_of
from diffbench.reports.conclusions import Conclusion
from diffbench.reports.figures import (
    Plot,
    Style,
    axis_label,
    escape_dollars,
    label,
    legend,
    log_scale,
    mean_line,
    new_figure,
    save,
)
from diffbench.reports.results import by_seed
from diffbench.reports.series import Curve
from diffbench.reports.statistics import LEAST, Array, Estimate, by_column, middle_interval
from diffbench.reports.text import Rows, mean_text

T = TypeVar("T")
RESAMPLES = 200
EXPONENTS = np.geomspace(0.01, 5, 1000)
"""The grid of exponents c for the fit."""
LEAST_RUNGS = 4
"""Fewest rungs to which the three parameters are fitted."""
WIDE = 10
"""Ratio of the largest to the smallest mean above which the axis is logarithmic."""
AXES = {"flops": "training FLOPs", "images": "training images", "seconds": "seconds of training"}


def measures(c: Conclusion) -> list[str]:
    """Return the full names of the metrics followed over budgets: the primary and up to two other watched ones."""
    watched = [n for n in c.metrics if metric_of(n).watched and n != c.name]
    return [c.name, *watched[:2]]


def budget_curve(c: Conclusion, variant: str, name: str) -> Curve | None:
    """Return a variant's metric at each budget, for the seeds that have passed every rung; None if there are none."""
    trials = [rung.variants.get(variant, []) for rung in c.rungs.values()]
    seeds = _seeds(c, variant, name)

    def mean(what: str) -> Array | None:
        found = [[getattr(t, what) for t in each if t.complete] for each in trials]
        return None if any(None in values for values in found) else np.array([np.mean(values) for values in found])

    if not seeds:
        return None
    images = np.array([np.mean([t.images for t in each if t.complete]) for each in trials])
    return Curve(images, mean("flops"), mean("seconds"), np.array(list(seeds.values())))


def _seeds(c: Conclusion, variant: str, name: str) -> dict[int, list[float]]:
    """Return seed -> the metric at each budget, for the seeds that have passed every rung."""
    rows = [by_seed(rung.variants.get(variant, []), name) for rung in c.rungs.values()]
    return {seed: [row[seed] for row in rows] for seed in sorted(set.intersection(*map(set, rows)))} if rows else {}


def tables(c: Conclusion) -> dict[str, Rows]:
    """Return the tables as heading -> rows; empty without a ladder."""
    if not c.rungs:
        return {}
    made: dict[str, Rows] = {}
    for name in measures(c):
        title = metric_of(name).title
        rows = [
            {"budget": budget, **{v: mean_text(s[name], name) for v, s in rung.summaries.items() if name in s}}
            for budget, rung in c.rungs.items()
        ]
        made[f"{title[0].upper()}{title[1:]}"] = rows
    made["Fits"] = _fits(c)
    made["Where variants cross"] = _crossing_rows(c)
    made["Kendall's tau between budgets"] = _tau({b: (rung, c.name) for b, rung in c.rungs.items()})
    made["Kendall's tau between measures at the last budget"] = _tau({n: (c, n) for n in measures(c)})
    return {heading: rows for heading, rows in made.items() if rows}


def _fits(c: Conclusion) -> Rows:
    rows: Rows = []
    for name in measures(c):
        for variant in c.variants:
            at = budget_curve(c, variant, name)
            found = fit(at.flops, at.values) if at and at.flops is not None else None
            if found is not None and metric_of(name).lower_is_better:
                parts = {"a": found.a.text(), "b": found.b.text(), "c": found.c.text()}
                rows.append({"fit": f"{variant}, {metric_of(name).title}", **parts})
    return rows


def _crossing_rows(c: Conclusion) -> Rows:
    rows: Rows = []
    for name in measures(c):
        seeds = {v: _seeds(c, v, name) for v in c.variants}
        curves = {v: budget_curve(c, v, name) for v in c.variants}
        for a, b in combinations(c.variants, 2):
            both = [seed for seed in seeds[a] if seed in seeds[b]]
            flops = [curve.flops for v in (a, b) if (curve := curves[v]) and curve.flops is not None]
            if not both or len(flops) < 2:
                continue
            at = np.union1d(*flops)
            at = at[(at >= max(x[0] for x in flops)) & (at <= min(x[-1] for x in flops))]
            values = [
                np.array([np.interp(np.log(at), np.log(x), seeds[v][seed]) for seed in both])
                for v, x in zip((a, b), flops, strict=True)
            ]
            for zero in crossings(at, *values):
                rows.append({"pair": f"{a}, {b}", "metric": metric_of(name).title, "FLOPs": zero.text("{:.2g}".format)})
    return rows


def _tau(columns: dict[str, tuple[Conclusion, str]]) -> Rows:
    """Tabulate Kendall's tau between the columns' rankings by mean, over variants and seeds that all columns have."""
    seeds = [{v: scores for v in at.variants if (scores := at.by_seed(v, name))} for at, name in columns.values()]
    shared = sorted(set.intersection(*map(set, seeds)))
    kept = sorted(set.intersection(*(set(of[v]) for of in seeds for v in shared))) if shared else []
    if len(shared) < 2 or not kept:
        return []
    signs = [1 if metric_of(name).lower_is_better else -1 for _, name in columns.values()]
    values = [[[sign * of[v][s] for v in shared] for sign, of in zip(signs, seeds, strict=True)] for s in kept]
    found = kendall(np.array(values))
    return [
        {"": a, **{b: "1" if a == b else tau.text("{:.2f}".format) for b, tau in zip(columns, row, strict=True)}}
        for a, row in zip(columns, found, strict=True)
    ]


def ladder_plot(c: Conclusion, style: dict[str, Style], path: Path) -> Plot | None:
    """Draw each followed metric against FLOPs, images and seconds: a line for each variant, with bands and fits."""
    names, variants = measures(c), [v for v in c.variants if v in style]
    curves = {n: {v: curve for v in variants if (curve := budget_curve(c, v, n))} for n in names}
    every = [curve for lines in curves.values() for curve in lines.values()]
    kept = [what for what in AXES if any(getattr(curve, what) is not None for curve in every)]
    if not kept:
        return None
    figure = new_figure(3.6 * len(kept) + 0.4, 3.3 * len(names) + 0.5)
    panels = figure.subplots(len(names), len(kept), sharey="row", squeeze=False)
    for name, row in zip(names, panels, strict=True):
        means = [mean for curve in curves[name].values() for mean in curve.values.mean(0) if np.isfinite(mean)]
        if metric_of(name).lower_is_better and means and max(means) > WIDE * min(means) > 0:
            row[0].set_ylim(min(means) / 1.3, max(means) * 1.3)
            log_scale(row[0])
        for what, panel in zip(kept, row, strict=True):
            for variant, curve in curves[name].items():
                x, look = getattr(curve, what), style[variant]
                if x is None:
                    continue
                marks: dict[str, Any] = {"linestyle": "", "marker": look.marker, "markersize": 5}
                mean = mean_line(panel, look, x, by_column(curve.values), None, **marks)
                found = fit(x, curve.values) if metric_of(name).lower_is_better else None
                line = np.geomspace(x[0], x[-1], 50) if found else x
                y = found.at(line / x[-1]) if found else mean
                panel.plot(line, y, look.dash, color=look.colour, linewidth=1.5, label=escape_dollars(variant))
            log_scale(panel, "x")
            label(panel, AXES[what], axis_label(name) if panel is row[0] else "")
    legend(figure, panels[0][0])
    caption = (
        "Points are means over seeds at each budget, bands their 95% intervals, lines the fitted a + b C^-c, or"
        f" straight from point to point below {LEAST_RUNGS} budgets."
    )
    return save(figure, path, "Which variant is better at which budget", caption)


@dataclass(frozen=True)
class Fit:
    """The fit error = a + b (C / C_last)^-c: a is the irreducible error, b the error above it at the last rung."""

    a: Estimate
    b: Estimate
    c: Estimate

    def at(self, share: Array) -> Array:
        """Return the error at budgets given as shares of the last rung's."""
        return np.asarray(self.a.value + self.b.value * share**-self.c.value)


def fit(budgets: Array, values: Array) -> Fit | None:
    """Fit a power law with an offset to the means over seeds by least squares of relative errors; None with too few.

    Args:
        budgets: (rungs,) rising.
        values: (seeds, rungs) errors.
    """
    if len(budgets) < LEAST_RUNGS:
        return None
    share = budgets / budgets[-1]
    means = np.stack([values.mean(0), *_resampled(values, lambda rows: rows.mean(0))])
    found = _parameters(share, means)
    a, b, c = (
        Estimate(float(column[0]), middle_interval(column[1:]) if len(column) > 1 else None) for column in found.T
    )
    return Fit(a, b, c)


def _parameters(share: Array, means: Array) -> Array:
    """Fit each row of means (fits, rungs) and return a, b, c as (fits, 3): least squares in a and b for each c."""
    u = share ** -EXPONENTS[:, None]  # (exponents, rungs)
    y, w = means[:, None], 1 / means[:, None] ** 2
    total, su, sy = w.sum(-1), (w * u).sum(-1), (w * y).sum(-1)
    suu, suy = (w * u * u).sum(-1), (w * u * y).sum(-1)
    b = (total * suy - su * sy) / (total * suu - su**2)
    b = np.where(b * su > sy, suy / suu, b.clip(min=0))  # neither may be negative
    a = ((sy - b * su) / total).clip(min=0)
    best = (w * (y - a[..., None] - b[..., None] * u) ** 2).sum(-1).argmin(1)
    rows = np.arange(len(means))
    return np.stack([a[rows, best], b[rows, best], EXPONENTS[best]], axis=1)


def crossings(budgets: Array, first: Array, second: Array) -> list[Estimate]:
    """Return the budgets at which first minus second changes sign, interpolated linearly over log C.

    Each interval is over the nearest crossings in resamples of the seeds; None unless most resamples have a crossing.

    Args:
        budgets: (rungs,) rising.
        first, second: (seeds, rungs) of two variants, paired by seed.
    """
    difference = first - second
    found = _zeros(budgets, difference.mean(0))
    drawn = _resampled(difference, lambda rows: _zeros(budgets, rows.mean(0)))
    estimates = []
    for zero in found:
        near = [min(zeros, key=lambda z: abs(np.log(z / zero))) for zeros in drawn if zeros]
        estimates.append(Estimate(zero, middle_interval(near) if 2 * len(near) > RESAMPLES else None))
    return estimates


def _zeros(budgets: Array, difference: Array) -> list[float]:
    log, zeros = np.log(budgets), []
    for i in range(len(log) - 1):
        low, high = difference[i], difference[i + 1]
        if low * high < 0 or (low == 0 and i and difference[i - 1] * high < 0):
            zeros.append(float(np.exp(log[i] + (log[i + 1] - log[i]) * low / (low - high))))
    return zeros


def _resampled(values: Array, of: Callable[[Array], T]) -> list[T]:
    """Apply a function to bootstrap resamples of the seeds (rows), the same on every call; empty below three seeds."""
    n = len(values)
    if n < LEAST:
        return []
    drawn = rng.uniform(rng.key("rungs", n), torch.arange(RESAMPLES * n)) * n
    return [of(values[rows]) for rows in drawn.long().numpy().reshape(RESAMPLES, n)]


def kendall(values: Array) -> list[list[Estimate]]:
    """Return Kendall's tau-b between the rankings of variants in each pair of columns, by means over seeds.

    Args:
        values: (seeds, columns, variants), paired by seed.
    """
    found = _tau_b(values.mean(0))
    drawn = np.array(_resampled(values, lambda rows: _tau_b(rows.mean(0))))
    return [
        [Estimate(float(tau), middle_interval(drawn[:, i, j]) if len(drawn) else None) for j, tau in enumerate(row)]
        for i, row in enumerate(found)
    ]


def _tau_b(columns: Array) -> Array:
    """Return tau-b between all columns, (columns, columns), from scores (columns, variants)."""
    signs = np.sign(columns[:, :, None] - columns[:, None])
    products = np.einsum("aij,bij->ab", signs, signs)
    norms = np.sqrt(products.diagonal().clip(min=1))  # all 0 where variants are equal
    return np.asarray(products / (norms[:, None] * norms))
