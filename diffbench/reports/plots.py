"""The plots of a report: the answer, quality against each budget, noise levels, sampling sweeps and images."""

from collections.abc import Sized
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from diffbench.metrics.registry import metric_of
from diffbench.reports.conclusions import Conclusion
from diffbench.reports.figures import (
    COLOURS,
    FAINT,
    INK,
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
    short_numbers,
    styles,
)
from diffbench.reports.images import attention_maps, nearest_images, sample_grid
from diffbench.reports.ladder import ladder_plot
from diffbench.reports.pairs import PairedTest
from diffbench.reports.results import Trial, network_key
from diffbench.reports.series import Sweep, above_least, curve, networks, noise_levels, shared_levels, sweeps
from diffbench.reports.statistics import LEAST, by_column
from diffbench.reports.tables import real_scores
from diffbench.reports.tuning import tuning_plot

GREEN, RED = "#009e73", "#d55e00"
MOST_ROWS = 40
"""Largest number of rows in the plot of the answer and in the map of noise levels."""
MOST_LINES = 8
"""Largest number of lines in one plot."""


def draw(c: Conclusion, folder: Path) -> list[Plot]:
    """Draw all plots that have something to show, the answer first."""
    trained = networks(c)
    chosen = _best(c, trained)
    style = styles(list(dict.fromkeys([*chosen, *c.variants])))
    folded = _folded(chosen, trained)
    found: list[Plot | None] = [answer(c, style, folder / "answer.png")] if c.ranked() else []
    found += [sweep_plot(c, sweep, folder / f"{sweep.key}.png") for sweep in sweeps(c)]
    if len(chosen) > 1 or len(c.variants) == 1:  # otherwise variants differ only in sampling
        for name in dict.fromkeys((c.name, "val/bound")):
            path = folder / f"budget-{metric_of(name).name.replace('/', '-')}.png"
            found.append(budget_plot(c, chosen, style, name, path, folded))
        found.append(level_plot(c, chosen, style, folder / "noise-levels.png", folded))
        if folded:
            found.append(level_map(c, trained, folder / "level-map.png"))
    found.append(ladder_plot(c, style, folder / "ladder.png"))
    found.append(tuning_plot(c, folder / "tuning.png"))
    found += [sample_grid(c, folder / "samples.png"), nearest_images(c, folder / "nearest.png")]
    found.append(attention_maps(chosen, folder / "attention.png"))
    return [plot for plot in found if plot is not None]


def _folded(drawn: Sized, there: Sized) -> str:
    return "" if len(drawn) == len(there) else f" The best {len(drawn)} of {len(there)} are drawn."


def _best(c: Conclusion, trained: dict[str, list[Trial]]) -> dict[str, list[Trial]]:
    place = {variant: i for i, variant in enumerate(c.ranked())}
    order = sorted(trained, key=lambda n: (n != c.comparison.baseline, place.get(trained[n][0].variant, len(place))))
    return {name: trials for name, trials in trained.items() if name in order[:MOST_LINES]}


def answer(c: Conclusion, style: dict[str, Style], path: Path) -> Plot:
    """Draw the primary metric of each variant with interval and seeds, next to the paired differences that decide."""
    ranked = c.ranked()
    base = c.comparison.baseline if c.comparison.baseline in ranked else ranked[0]
    shown = ranked[:MOST_ROWS]
    shown = shown if base in shown else [*shown[:-1], base]
    against = c.tests_of(base)
    many = len(shown) > len(COLOURS)
    figure = new_figure(9.6, 1.35 + (0.32 if many else 0.45) * len(shown))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.25, 1])
    for row, name in enumerate(shown):
        look, found = Style(COLOURS[0], "-", "o") if many else style[name], c.summaries[name][c.name]
        values = list(c.by_seed(name, c.name).values())
        if found.half is not None:
            left.errorbar(found.mean, row, xerr=found.half, color=look.colour, capsize=4, linewidth=2.2, zorder=2)
        left.plot(values, [row + 0.2] * len(values), ".", color=look.colour, alpha=0.55, markersize=6, zorder=1)
        left.plot(found.mean, row, look.marker, color=look.colour, markersize=7.5, markeredgecolor="white", zorder=3)
        if name in against:
            _difference(right, row, against[name], base)
    real = real_scores(c).get(c.name)
    if real is not None:
        left.axvline(real, color=FAINT, linestyle=":", linewidth=1.2)
        left.annotate("real images", (real, -0.55), fontsize=8, color=FAINT, ha="left", va="center")
    left.set_yticks(range(len(shown)), [escape_dollars(name) for name in shown])
    left.set_ylim(len(shown) - 0.4, -0.75)
    label(left, axis_label(c.name))
    right.axvline(0, color=INK, linewidth=1)
    label(right, f"difference from {base if len(base) < 24 else f'{base[:22]}…'}, by seed")
    right.tick_params(left=False)
    right.spines["left"].set_visible(False)
    right.set_visible(bool(against))
    caption = (
        f"Left: dots are seeds, the large mark their mean, the bar its 95% interval (from {LEAST} seeds on). Right:"
        f" each variant minus {base}, seed by seed, with the interval after Holm's correction: green is better, red"
        f" worse, grey with zero inside a tie.{_folded(shown, ranked)}"
    )
    return save(figure, path, "The answer", caption)


def _difference(axis: Axes, row: int, x: PairedTest, base: str) -> None:
    mean = x.paired.mean if x.second == base else -x.paired.mean
    colour = FAINT if x.winner is None else RED if x.winner == base else GREEN
    axis.errorbar(mean, row, xerr=x.paired.half, fmt="o", color=colour, capsize=4, linewidth=2.2, markersize=5.5)


def budget_plot(
    c: Conclusion, trained: dict[str, list[Trial]], style: dict[str, Style], name: str, path: Path, folded: str
) -> Plot | None:
    """Draw a metric against images, training FLOPs and seconds of training, with bands over seeds."""
    curves = {n: found for n, trials in trained.items() if (found := curve(trials, name)) is not None}
    if not curves:
        return None
    axes = {"images": "training images", "flops": "training FLOPs", "seconds": "seconds of training"}
    kept = [key for key in axes if any(getattr(found, key) is not None for found in curves.values())]
    figure = new_figure(3.6 * len(kept) + 0.4, 3.5)
    panels = figure.subplots(1, len(kept), sharey=True, squeeze=False)[0]
    for panel, key in zip(panels, kept, strict=True):
        for variant, found in curves.items():
            healthy = next((t.run.bands[name] for t in trained[variant] if t.run and name in t.run.bands), None)
            if healthy and key == "images":
                ends = healthy.images, healthy.low, healthy.high
                panel.fill_between(*ends, color=style[variant].colour, alpha=0.13, linewidth=0, zorder=0)
            x = getattr(found, key)
            if x is not None:
                mean = mean_line(panel, style[variant], x, by_column(found.values), variant, linewidth=1.8)
                panel.plot(x[-1], mean[-1], style[variant].marker, color=style[variant].colour, markersize=5)
        label(panel, axes[key], axis_label(name) if panel is panels[0] else "")
        panel.set_xlim(left=0)
        short_numbers(panel)
    if all((found.values > 0).all() for found in curves.values()):
        lowest = min(found.values.min() for found in curves.values())
        highest = max(found.values[:, 0].mean() for found in curves.values())
        panels[0].set_yscale("log")
        panels[0].set_ylim(0.96 * lowest, 1.04 * highest)
        log_scale(panels[0])
    legend(figure, panels[0])
    metric = metric_of(name)
    title = metric.title[0].upper() + metric.title[1:]
    caption = (
        f"{title} of averaged weights while training, against each budget; training FLOPs are 2 x MACs"
        f" x 3 x images. Lines are means over seeds, bands their 95% intervals (from {LEAST} seeds on). Which line is"
        f" {'lower' if metric.lower_is_better else 'higher'} can depend on the budget.{folded}"
    )
    if any(t.run and name in t.run.bands for trials in trained.values() for t in trials):
        caption += " Shaded over images: where 99% of runs of the experiment as shipped lie (its reference curves)."
    return save(
        figure, path, "What it takes to get there" if name == c.name else f"{title} against each budget", caption
    )


def level_plot(
    c: Conclusion, trained: dict[str, list[Trial]], style: dict[str, Style], path: Path, folded: str
) -> Plot | None:
    """Draw the error of eps per noise level: absolute, relative to the baseline or mean, and above training."""
    at, found = shared_levels(trained)
    if not found:
        return None
    base = c.comparison.baseline if c.comparison.baseline in found else None
    against = base or "the mean of all"
    alone = len(found) == 1
    figure = new_figure(9.6 if alone else 13.2, 3.6)
    panels = figure.subplots(1, 2 if alone else 3, squeeze=False)[0]
    compared = [found[base]] if base else list(found.values())
    shared = set.intersection(*(set(rows) for rows in compared))
    reference = {seed: np.mean([rows[seed] for rows in compared], axis=0) for seed in shared}

    def marked_line(panel: Axes, name: str, values: np.ndarray) -> None:
        mean_line(panel, style[name], at, by_column(values), name, marker=style[name].marker, markersize=5)

    for name, rows in found.items():
        marked_line(panels[0], name, np.array(list(rows.values())))
        seen = noise_levels(trained[name], "train")[1]
        if seen:
            panels[0].plot(at, np.mean(list(seen.values()), axis=0), ":", color=style[name].colour, linewidth=1.2)
            gaps = np.array([100 * (rows[s] / seen[s] - 1) for s in rows.keys() & seen.keys()])
            marked_line(panels[-1], name, gaps)
        seeds = sorted(rows.keys() & reference.keys())
        if not alone and seeds:
            percent = np.array([100 * (rows[s] / reference[s] - 1) for s in seeds])
            marked_line(panels[1], name, percent)
    where = "log-SNR (left: noise, right: image)"
    label(panels[0], where, "squared error of eps")
    panels[0].set_ylim(bottom=0)
    if not alone:
        label(panels[1], where, f"error against {against} (%)")
    label(panels[-1], where, "held-out above training error (%)")
    for panel in panels[1:]:
        panel.axhline(0, color=INK, linewidth=1)
    legend(figure, panels[0])
    middle = "" if alone else f" Middle: in percent of {against}, paired by seed; below zero is better."
    caption = (
        "Squared error of the noise at each level, on the same held-out images with the same noise; dotted: on as many"
        f" training images. Half the area below a line is its bound.{middle} Right: how far held-out images lie above"
        f" training images, which is overfitting. Bands are 95% intervals over seeds.{folded}"
    )
    return save(figure, path, "Error by noise level" if alone else "Where it is better", caption)


def level_map(c: Conclusion, trained: dict[str, list[Trial]], path: Path) -> Plot | None:
    """Draw the errors of all networks as a map, a row for each network and a column for each noise level."""
    at, levels = shared_levels(trained)
    network = {trained[name][0].variant: name for name in levels}
    names = [network[variant] for variant in c.ranked() if variant in network][:MOST_ROWS]
    if not names:
        return None
    above = above_least(levels)
    shown = np.array([above[name] for name in names])
    figure = new_figure(9.6, 1.1 + 0.3 * len(names))
    axis = figure.subplots()
    axis.imshow(np.log1p(shown), cmap="Blues", vmin=0, vmax=np.log1p(300), aspect="auto")
    for (row, column), percent in np.ndenumerate(shown):
        colour = "white" if percent > 60 else INK
        axis.annotate(f"{percent:.0f}", (column, row), fontsize=8, color=colour, ha="center", va="center")
    axis.set_yticks(range(len(names)), [escape_dollars(name) for name in names])
    axis.set_xticks(range(len(at)), [f"{level:g}" for level in at])
    axis.tick_params(length=0)
    label(axis, "log-SNR (left: noise, right: image)")
    axis.grid(False)
    caption = (
        "Squared error at each noise level, in percent above the least of all networks there, mean over seeds; the"
        f" networks as the answer ranks them.{_folded(names, trained)}"
    )
    return save(figure, path, "Where each network errs", caption)


def sweep_plot(c: Conclusion, sweep: Sweep, path: Path) -> Plot:
    """Draw scores against a key: a panel for each metric, a line for each network or setting of the other keys."""
    chosen = dict(list(sweep.lines.items())[:MOST_LINES])
    style = styles(list(chosen))
    figure = new_figure(max(4.6, 3.6 * len(sweep.metrics)), 3.5)
    panels = figure.subplots(1, len(sweep.metrics), squeeze=False)[0]
    for panel, name in zip(panels, sweep.metrics, strict=True):
        unit = 100 if metric_of(name).percent else 1
        for line, places in chosen.items():
            kept = [(at, c.summaries[v][name]) for at, v in places if name in c.summaries[v]]
            if not kept:
                continue
            x, found, look = [at for at, _ in kept], [s for _, s in kept], style[line]
            mean_line(panel, look, x, found, line, unit, marker=look.marker, markersize=5)
        real = real_scores(c).get(name)
        if real is not None:
            panel.axhline(unit * real, color=FAINT, linestyle=":", linewidth=1.2)
        ticks = sorted({at for places in chosen.values() for at, _ in places})
        if sweep.key != "guidance" and ticks[0] > 0:
            log_scale(panel, "x")
        if len(ticks) < len(COLOURS):
            panel.set_xticks(ticks, [f"{at:g}" for at in ticks])
            panel.minorticks_off()
        label(panel, sweep.label, axis_label(name, "%" if unit == 100 else ""))
    legend(figure, panels[0])
    folded = "" if len(chosen) == len(sweep.lines) else f" {len(chosen)} of {len(sweep.lines)} lines are drawn."
    runs = [{network_key(c.variants[v]) for _, v in places} for places in chosen.values()]
    same = "Scores of samples of the same trained runs. " if all(len(keys) == 1 for keys in runs) else ""
    caption = f"{same}Bands are 95% intervals over seeds; dotted: real images.{folded}"
    return save(figure, path, sweep.title, caption)
