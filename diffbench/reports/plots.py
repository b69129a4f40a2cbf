"""The plots of a report: the answer, quality against each budget, noise levels, sweeps of sampling, pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffbench.reports.conclusions import Conclusion, Contest
from diffbench.reports.entries import Entry
from diffbench.reports.images import attention_maps, sample_grid
from diffbench.reports.series import Sweep, band, curve, levels, sweeps, trained
from diffbench.reports.statistics import LEAST
from diffbench.reports.style import (
    COLOURS,
    FAINT,
    INK,
    MOST_LINES,
    Picture,
    Style,
    few_numbers,
    figure,
    plain,
    save,
    short_numbers,
    styles,
    tidy,
)
from diffbench.reports.tables import floors
from diffbench.reports.wording import better, lower_is_better, short, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREEN, RED = "#009e73", "#d55e00"
MOST_ROWS = 40
"""Variants in the plot of the answer."""


def draw(c: Conclusion, folder: Path) -> list[Picture]:
    """Draws all plots for which there is something to show; the answer first."""
    networks, colours = _best(c)
    style = styles(list(colours))
    found = [answer(c, style, folder / "answer.png")] if c.ranked() else []
    more = "" if len(networks) == len(trained(c)) else f" The best {len(networks)} of {len(trained(c))} are drawn."
    found += [swept(c, sweep, folder / f"{sweep.key}.png") for sweep in sweeps(c)]
    if len(networks) > 1 or len(c.variants) == 1:  # else variants differ in sampling alone
        for name in dict.fromkeys((c.metric, "val/error")):
            file = f"budget-{short(name).replace('/', '-')}.png"
            found += _some(budgets(c, networks, style, name, folder / file, more))
        found += _some(noise_levels(c, networks, style, folder / "noise-levels.png", more))
    found += _some(sample_grid(c, folder / "samples.png"))
    found += _some(attention_maps(networks, folder / "attention.png"))
    return found


def _some(picture: Picture | None) -> list[Picture]:
    return [] if picture is None else [picture]


def _best(c: Conclusion) -> tuple[dict[str, list[Entry]], list[str]]:
    """The networks that are drawn as lines, and all names that get a style, those with lines first."""
    networks = trained(c)
    if len(networks) > MOST_LINES:
        place = {v: i for i, v in enumerate(c.ranked())}
        chosen = sorted(networks, key=lambda n: place.get(networks[n][0].result.variant, len(place)))[:MOST_LINES]
        base = [c.comparison.baseline] if c.comparison.baseline in networks else []
        chosen = list(dict.fromkeys([*base, *chosen]))[:MOST_LINES]
        networks = {name: networks[name] for name in networks if name in chosen}
    return networks, list(dict.fromkeys([*networks, *c.variants]))


def answer(c: Conclusion, style: dict[str, Style], path: Path) -> Picture:
    """The primary metric of each variant with interval and seeds; beside it the paired differences that decide."""
    ranked = c.ranked()
    base = c.comparison.baseline if c.comparison.baseline in ranked else ranked[0]
    shown = ranked[:MOST_ROWS]
    shown = shown if base in shown else [*shown[:-1], base]
    against = {(x.second if x.first == base else x.first): x for x in c.contests if base in (x.first, x.second)}
    many = len(shown) > len(COLOURS)
    drawn = figure(9.6, 1.35 + (0.32 if many else 0.45) * len(shown))
    left, right = drawn.subplots(1, 2, sharey=True, width_ratios=[1.25, 1])
    for row, name in enumerate(shown):
        look, found = Style(COLOURS[0], "-", "o") if many else style[name], c.summaries[name][c.metric]
        values = list(c.by_seed(name, c.metric).values())
        if found.half is not None:
            left.errorbar(found.mean, row, xerr=found.half, color=look.colour, capsize=4, linewidth=2.2, zorder=2)
        left.plot(values, [row + 0.2] * len(values), ".", color=look.colour, alpha=0.55, markersize=6, zorder=1)
        left.plot(found.mean, row, look.marker, color=look.colour, markersize=7.5, markeredgecolor="white", zorder=3)
        if name in against:
            _difference(right, row, against[name], base, c.metric)
    floor = _floor(c, c.metric)
    if floor is not None:
        left.axvline(floor, color=FAINT, linestyle=":", linewidth=1.2)
        left.annotate("real images", (floor, -0.55), fontsize=8, color=FAINT, ha="left", va="center")
    left.set_yticks(range(len(shown)), [plain(name) for name in shown])
    left.set_ylim(len(shown) - 0.4, -0.75)
    tidy(left, f"{title(c.metric)} ({better(c.metric)})", "")
    right.axvline(0, color=INK, linewidth=1)
    tidy(right, f"difference from {base if len(base) < 24 else f'{base[:22]}…'}, by seed", "")
    right.tick_params(left=False)
    right.spines["left"].set_visible(False)
    if not against:
        right.set_visible(False)
    fold = "" if len(shown) == len(ranked) else f" The best {len(shown)} of {len(ranked)} are drawn."
    caption = (
        f"Left: dots are seeds, the large mark their mean, the bar its 95% interval (from {LEAST} seeds on). Right:"
        f" each variant minus {base}, seed by seed, with the interval after Holm's correction: green is better, red"
        f" worse, grey with zero inside a tie.{fold}"
    )
    return save(drawn, path, "The answer", caption)


def _difference(axis: "Axes", row: int, x: Contest, base: str, metric: str) -> None:
    sign = 1 if x.second == base else -1
    mean = sign * x.paired.mean
    colour = FAINT
    if x.winner is not None:
        colour = RED if x.winner == base else GREEN
    half = 0.0 if x.paired.interval is None else (x.paired.interval[1] - x.paired.interval[0]) / 2
    axis.errorbar(mean, row, xerr=half or None, fmt="o", color=colour, capsize=4, linewidth=2.2, markersize=5.5)


def _floor(c: Conclusion, name: str) -> float | None:
    """What real images score, as a number."""
    told = floors(c).get(name)
    if told is None or short(name) == "nearest_train":
        return None
    return float(told.replace(",", "").removesuffix("%")) / (100 if told.endswith("%") else 1)


def budgets(
    c: Conclusion, networks: dict[str, list[Entry]], style: dict[str, Style], name: str, path: Path, more: str
) -> Picture | None:
    """A metric against images, training FLOPs and seconds of training, with bands over seeds."""
    curves = {n: found for n, entries in networks.items() if (found := curve(entries, name)) is not None}
    if not curves:
        return None
    axes = {"images": "training images", "flops": "training FLOPs", "seconds": "seconds of training"}
    kept = [key for key in axes if any(getattr(found, key) is not None for found in curves.values())]
    drawn = figure(3.6 * len(kept) + 0.4, 3.5)
    panels = drawn.subplots(1, len(kept), sharey=True, squeeze=False)[0]
    for panel, key in zip(panels, kept, strict=True):
        for variant, found in curves.items():
            x = getattr(found, key)
            if x is None:
                continue
            look = style[variant]
            mean, low, high = band(found.values)
            panel.plot(x, mean, look.dash, color=look.colour, linewidth=1.8, label=plain(variant))
            panel.fill_between(x, low, high, color=look.colour, alpha=0.16, linewidth=0)
            panel.plot(x[-1], mean[-1], look.marker, color=look.colour, markersize=5)
        tidy(panel, axes[key], f"{title(name)} ({better(name)})" if panel is panels[0] else "")
        panel.set_xlim(left=0)
        short_numbers(panel)
    if all((found.values > 0).all() for found in curves.values()):
        panels[0].set_yscale("log")
        lowest = min(found.values.min() for found in curves.values())
        highest = max(band(found.values)[0][0] for found in curves.values())
        panels[0].set_ylim(0.96 * lowest, 1.04 * highest)
        few_numbers(panels[0])
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    caption = (
        f"{_capital(title(name))} of averaged weights while training, against each budget; training FLOPs are 2 x MACs"
        f" x 3 x images. Lines are means over seeds, bands their 95% intervals (from {LEAST} seeds on). Which line is"
        f" {'lower' if lower_is_better(name) else 'higher'} can depend on the budget.{more}"
    )
    heading = "What it takes to get there" if name == c.metric else f"{_capital(title(name))} against each budget"
    return save(drawn, path, heading, caption)


def noise_levels(
    c: Conclusion, networks: dict[str, list[Entry]], style: dict[str, Style], path: Path, more: str
) -> Picture | None:
    """Validation error per noise level, and relative to the baseline or the mean of networks."""
    found = {name: levels(entries) for name, entries in networks.items()}
    found = {name: (at, rows) for name, (at, rows) in found.items() if rows and len(at) > 1}
    first = next((at for at, _ in found.values()), None)
    found = {name: (at, rows) for name, (at, rows) in found.items() if at == first}
    if not found or first is None:
        return None
    base = c.comparison.baseline if c.comparison.baseline in found else None
    against = base or "the mean of all"
    alone = len(found) == 1
    drawn = figure(5 if alone else 9.6, 3.6)
    panels = drawn.subplots(1, 1 if alone else 2, squeeze=False)[0]
    reference = _reference([rows for _, rows in found.values()] if base is None else [found[base][1]])
    for name, (at, rows) in found.items():
        look = style[name]
        mean, low, high = band(np.array(list(rows.values())))
        panels[0].plot(at, mean, look.dash, color=look.colour, marker=look.marker, markersize=5, label=plain(name))
        panels[0].fill_between(at, low.clip(min=0.2 * mean), high, color=look.colour, alpha=0.16, linewidth=0)
        shared = sorted(rows.keys() & reference.keys())
        if not alone and shared:
            mean, low, high = band(np.array([100 * (rows[s] / reference[s] - 1) for s in shared]))
            panels[1].plot(at, mean, look.dash, color=look.colour, marker=look.marker, markersize=5)
            panels[1].fill_between(at, low, high, color=look.colour, alpha=0.16, linewidth=0)
    panels[0].set_yscale("log")
    few_numbers(panels[0])
    where = "log-SNR (left: nearly noise, right: nearly the image)"
    tidy(panels[0], where, "validation error (lower is better)")
    if not alone:
        panels[1].axhline(0, color=INK, linewidth=1)
        tidy(panels[1], where, f"error against {against} (%)")
    handles = panels[0].get_legend_handles_labels()
    drawn.legend(*handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    right = "" if alone else f" Right: in percent of {against}, paired by seed; below zero is better."
    caption = (
        f"Validation error at each noise level, on the same held-out images with the same noise.{right} Bands are 95%"
        f" intervals over seeds.{more}"
    )
    return save(drawn, path, "Validation error by noise level" if alone else "Where it is better", caption)


def _reference(rows: Sequence[dict[int, np.ndarray]]) -> dict[int, np.ndarray]:
    """Seed -> mean over networks, of the seeds that all have."""
    shared = set.intersection(*(set(r) for r in rows))
    return {seed: np.mean([r[seed] for r in rows], axis=0) for seed in shared}


def swept(c: Conclusion, sweep: Sweep, path: Path) -> Picture:
    """Scores against a key of sampling: a panel a metric, a line for each network or sampler."""
    chosen = dict(list(sweep.lines.items())[:MOST_LINES])
    style = styles(list(chosen))
    drawn = figure(max(4.6, 3.6 * len(sweep.metrics)), 3.5)
    panels = drawn.subplots(1, len(sweep.metrics), squeeze=False)[0]
    for panel, name in zip(panels, sweep.metrics, strict=True):
        percent = 100 if short(name) == "label_accuracy" else 1
        for line, places in chosen.items():
            kept = [(at, c.summaries[v][name]) for at, v in places if name in c.summaries[v]]
            if not kept:
                continue
            x, mean = np.array([at for at, _ in kept]), percent * np.array([s.mean for _, s in kept])
            half = percent * np.array([s.half or 0.0 for _, s in kept])
            look = style[line]
            panel.plot(x, mean, look.dash, color=look.colour, marker=look.marker, markersize=5, label=plain(line))
            panel.fill_between(x, mean - half, mean + half, color=look.colour, alpha=0.16, linewidth=0)
        floor = _floor(c, name)
        if floor is not None:
            panel.axhline(percent * floor, color=FAINT, linestyle=":", linewidth=1.2)
        if sweep.key != "guidance":
            panel.set_xscale("log")
            few_numbers(panel, "x")
        unit = ", %" if percent == 100 else ""
        tidy(panel, sweep.label, f"{title(name)} ({better(name)}{unit})")
    handles = panels[0].get_legend_handles_labels()
    drawn.legend(*handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    headings = {
        "steps": "Quality against sampling steps",
        "guidance": "Quality against guidance",
        "ema": "Quality against the length of the average",
    }
    more = "" if len(chosen) == len(sweep.lines) else f" {len(chosen)} of {len(sweep.lines)} lines are drawn."
    caption = (
        f"Scores of samples of the same trained runs. Bands are 95% intervals over seeds; dotted: real images.{more}"
    )
    return save(drawn, path, headings[sweep.key], caption)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
