"""A study over several budgets: tables of means, fits, crossings and rank correlations, and measures against budget."""

from itertools import combinations
from pathlib import Path

import numpy as np

from diffbench.metrics.registry import metric_of
from diffbench.reports import scaling
from diffbench.reports.conclusions import Conclusion
from diffbench.reports.figures import Plot, Style, label, legend, log_scale, new_figure, plain, save
from diffbench.reports.statistics import Array, summary
from diffbench.reports.text import Rows, mean_text

AXES = {"flops": "training FLOPs", "images": "training images", "seconds": "seconds of training"}


def measures(c: Conclusion) -> list[str]:
    """The full names of what is followed over budgets: the primary metric and two others that are watched."""
    watched = [n for n in c.metrics if metric_of(n).watched and n != c.name]
    return [c.name, *watched[:2]]


def grid(c: Conclusion, variant: str, name: str) -> Array | None:
    """(seeds, rungs) of a metric, for the seeds that have passed every rung; None without any."""
    rows = [rung.by_seed(variant, name) for rung in c.rungs.values() if variant in rung.variants]
    seeds = sorted(set.intersection(*(set(row) for row in rows))) if len(rows) == len(c.rungs) else []
    return np.array([[row[seed] for row in rows] for seed in seeds]) if seeds else None


def budgets(c: Conclusion, variant: str, what: str = "flops") -> Array | None:
    """(rungs,) of training FLOPs, images or seconds, the mean over seeds; None where some are not known."""
    found = [[getattr(t, what) for t in rung.variants.get(variant, []) if t.complete] for rung in c.rungs.values()]
    if not all(found) or any(v is None for values in found for v in values):
        return None
    return np.array([np.mean(values) for values in found])


def tables(c: Conclusion) -> dict[str, Rows]:
    """Heading -> rows; nothing without a ladder."""
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
    made["Where variants cross"] = _crossings(c)
    made["Kendall's tau between budgets"] = _tau({b: (rung, c.name) for b, rung in c.rungs.items()})
    made["Kendall's tau between measures at the last budget"] = _tau({n: (c, n) for n in measures(c)})
    return {heading: rows for heading, rows in made.items() if rows}


def _fits(c: Conclusion) -> Rows:
    rows: Rows = []
    for name in measures(c):
        for variant in c.variants:
            values, at = grid(c, variant, name), budgets(c, variant)
            found = None if values is None or at is None else scaling.fit(at, values)
            if found is not None and metric_of(name).lower_is_better:
                parts = {"a": found.a.text(), "b": found.b.text(), "c": found.c.text()}
                rows.append({"fit": f"{variant}, {metric_of(name).title}", **parts})
    return rows


def _crossings(c: Conclusion) -> Rows:
    rows: Rows = []
    for name in measures(c):
        for a, b in combinations(c.variants, 2):
            first, second, at = grid(c, a, name), grid(c, b, name), budgets(c, a)
            if first is None or second is None or at is None or first.shape != second.shape:
                continue
            for zero in scaling.crossings(at, first, second):
                rows.append({"pair": f"{a}, {b}", "metric": metric_of(name).title, "FLOPs": zero.text("{:.2g}".format)})
    return rows


def _tau(columns: dict[str, tuple[Conclusion, str]]) -> Rows:
    """Kendall's tau between rankings of the variants by their means, of variants and seeds that all columns have."""
    seeds = [{v: by_seed for v in at.variants if (by_seed := at.by_seed(v, name))} for at, name in columns.values()]
    shared = sorted(set.intersection(*map(set, seeds)))
    kept = sorted(set.intersection(*(set(of[v]) for of in seeds for v in shared))) if shared else []
    if len(shared) < 2 or not kept:
        return []
    signs = [1 if metric_of(name).lower_is_better else -1 for _, name in columns.values()]
    values = [[[sign * of[v][s] for v in shared] for sign, of in zip(signs, seeds, strict=True)] for s in kept]
    found = scaling.kendall(np.array(values))
    return [
        {"": a, **{b: "1" if a == b else tau.text("{:.2f}".format) for b, tau in zip(columns, row, strict=True)}}
        for a, row in zip(columns, found, strict=True)
    ]


def ladder_plot(c: Conclusion, style: dict[str, Style], path: Path) -> Plot | None:
    """Each followed metric against FLOPs, images and seconds, a line for each variant, with bands and fits."""
    names = [n for n in measures(c) if c.rungs]
    drawn = [v for v in c.variants if v in style and any(grid(c, v, n) is not None for n in names)]
    kept = [what for what in AXES if any(budgets(c, v, what) is not None for v in drawn)]
    if not drawn or not kept:
        return None
    figure = new_figure(3.6 * len(kept) + 0.4, 3.3 * len(names) + 0.5)
    panels = figure.subplots(len(names), len(kept), sharey="row", squeeze=False)
    for name, row in zip(names, panels, strict=True):
        for what, panel in zip(kept, row, strict=True):
            for variant in drawn:
                x, values = budgets(c, variant, what), grid(c, variant, name)
                if x is None or values is None:
                    continue
                look, each = style[variant], [summary(column.tolist()) for column in values.T]
                mean, half = np.array([s.mean for s in each]), np.array([s.half or 0.0 for s in each])
                panel.plot(x, mean, look.marker, color=look.colour, markersize=5)
                panel.fill_between(x, mean - half, mean + half, color=look.colour, alpha=0.16, linewidth=0)
                found = scaling.fit(x, values) if metric_of(name).lower_is_better else None
                line = np.geomspace(x[0], x[-1], 50) if found else x
                y = found.at(line / x[-1]) if found else mean
                panel.plot(line, y, look.dash, color=look.colour, linewidth=1.5, label=plain(variant))
            log_scale(panel, "x")
            facts = ", ".join(t for t in (metric_of(name).better(), metric_of(name).unit) if t)
            label(panel, AXES[what], f"{metric_of(name).title} ({facts})" if panel is row[0] else "")
    legend(figure, panels[0][0])
    caption = (
        "Points are means over seeds at each budget, bands their 95% intervals, lines the fitted a + b C^-c, or"
        f" straight from point to point below {scaling.LEAST_RUNGS} budgets."
    )
    return save(figure, path, "Which variant is better at which budget", caption)
