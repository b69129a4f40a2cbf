"""The tuning of a study: a table with a row for each label, and curves over the grid."""

import math
from pathlib import Path

import numpy as np

from diffbench.metrics.registry import metric_of
from diffbench.reports.conclusions import Conclusion
from diffbench.reports.figures import Plot, escape_dollars, label, legend, log_scale, new_figure, save, styles
from diffbench.reports.results import TriedPoint, best_of
from diffbench.reports.text import Rows, number, title_and_unit


def _groups(c: Conclusion) -> dict[tuple[str, tuple[str, ...]], dict[str, list[TriedPoint]]]:
    """Return (metric, keys) -> label -> its points, in rising order of their values."""
    groups: dict[tuple[str, tuple[str, ...]], dict[str, list[TriedPoint]]] = {}
    for p in c.comparison.tried:
        groups.setdefault((p.name, tuple(p.values)), {}).setdefault(p.label, []).append(p)
    for points in (points for labels in groups.values() for points in labels.values()):
        points.sort(key=lambda p: [v if isinstance(v, int | float) else 0 for v in p.values.values()])
    return groups


def table(c: Conclusion) -> Rows:
    """Return a row for each label and metric: the result of every value tried, and the cost of training."""
    rows: Rows = []
    for (name, _), labels in _groups(c).items():
        for tuned, points in labels.items():
            best = best_of(points).get(tuned)
            row = {"tuned": f"{tuned}, {metric_of(name).title}"}
            for p in points:
                head = ", ".join(f"{key}={value}" for key, value in p.values.items()) or "as it is"
                row[head] = "not measured" if p.value is None else number(p.value, name) + "*" * (p is best)
                row[head] = "failed" if p.value == math.inf else row[head]
            flops = sum(p.flops for p in points)
            if flops:
                row |= {"training FLOPs": f"{flops:.3g}".replace("e+", "e")}
                row |= {"seconds": f"{sum(p.seconds for p in points):,.0f}"}
            rows.append(row)
    return rows


def tuning_plot(c: Conclusion, path: Path) -> Plot | None:
    """Draw the metric that chooses against each key that is tuned alone, with a line for each label."""
    groups = {
        (name, keys[0]): labels
        for (name, keys), labels in _groups(c).items()
        if len(keys) == 1 and all(isinstance(p.values[keys[0]], int | float) for ps in labels.values() for p in ps)
    }
    if not groups:
        return None
    figure = new_figure(max(5.0, 4.2 * len(groups)), 3.5)
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    style = styles(list(dict.fromkeys(p.label for p in c.comparison.tried)))
    for panel, ((name, key), labels) in zip(panels, groups.items(), strict=True):
        for tuned, points in labels.items():
            look, best = style[tuned], best_of(points).get(tuned)
            x = np.array([float(p.values[key]) for p in points])
            y = np.array([math.nan if p.value is None else p.value for p in points])
            panel.plot(
                x, y, look.dash, color=look.colour, marker=look.marker, markersize=4, label=escape_dollars(tuned)
            )
            if best is not None:
                where = float(best.values[key]), best.value
                panel.plot(*where, look.marker, color=look.colour, markersize=9, markeredgecolor="black")
        if all(p.values[key] > 0 for points in labels.values() for p in points):
            log_scale(panel, "x")
        label(panel, key, title_and_unit(name))
    legend(figure, panels[0])
    caption = "What tuning measured over its grid, which is the same for all; large marks are what it chose."
    return save(figure, path, "The grids of tuning", caption)
