"""Images in a report: samples of every variant from the same noise, nearest training images, attention over time."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from diffbench.core.errors import UserError
from diffbench.core.files import write_text
from diffbench.core.store import DamagedError, Store
from diffbench.metrics.base import evenly_spaced
from diffbench.reports.attention import AttentionConfig, attention, attention_figure
from diffbench.reports.conclusions import Conclusion
from diffbench.reports.figures import INK, Plot, escape_dollars, name_row, new_figure, save
from diffbench.reports.results import Trial
from diffbench.runs.denoiser import DenoiserRun
from diffbench.runs.lifecycle import load
from diffbench.sampling.images import grid

COLUMNS, MOST_ROWS = 20, 16
MOST_MAPS = 4
"""Largest number of networks whose attention is drawn."""


def sample_grid(c: Conclusion, path: Path) -> Plot | None:
    """Draw a row of samples for each variant, with the seed that most have; a column shares its noise and label."""
    drawn = [t for t in c.trials if t.complete and _samples_folder(t) is not None]
    if not drawn:
        return None
    seed = Counter(_seed(t) for t in drawn).most_common(1)[0][0]
    rank = {variant: i for i, variant in enumerate(c.ranked())}
    found: dict[str, tuple[Tensor, list[str]]] = {}
    for trial in sorted(drawn, key=lambda t: rank.get(t.variant, len(rank))):
        wanted = len(found) < MOST_ROWS and trial.variant not in found and _seed(trial) == seed
        if wanted and (samples := _samples(trial)) is not None:
            found[trial.variant] = samples
    if not found:
        return None
    images, classes = next(iter(found.values()))  # all share a protocol, and so the count and size
    width = images.shape[3] + 4  # one image with its border
    figure = new_figure(9.6, (0.9 if classes else 0.35) + len(found) * 8.6 / COLUMNS)
    panels = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    for panel, (name, (images, _)) in zip(panels, found.items(), strict=True):
        panel.imshow(grid(images, columns=len(images)), interpolation="nearest")
        name_row(panel, escape_dollars(name))
    if classes:
        middles = {name: width * (classes.index(name) + classes.count(name) / 2) for name in classes}
        panels[0].xaxis.tick_top()
        panels[0].set_xticks(list(middles.values()), list(middles), rotation=45, ha="left", fontsize=8, color=INK)
        panels[0].tick_params(length=0)
    caption = (
        f"Samples of each variant, seed {seed}, not chosen by hand: evenly spaced among those that were scored. A"
        " column starts from the same noise and asks for the same label, so that differences are the variants' own."
    )
    return save(figure, path, "The same noise, side by side", caption)


def nearest_images(c: Conclusion, path: Path) -> Plot | None:
    """Draw the samples of each variant that are most like copies, above their nearest training images."""
    found: dict[str, tuple[dict[str, Any], np.ndarray]] = {}
    for trial in sorted((t for t in c.trials if t.complete), key=lambda t: -_judged(t).get("flagged", 0)):
        folder = _samples_folder(trial)
        if folder is not None and _judged(trial) and trial.variant not in found:
            try:
                found[trial.variant] = _judged(trial), np.asarray(Image.open(folder / "nearest.png").convert("RGB"))
            except OSError:
                continue
    shown = [v for v in dict.fromkeys([*c.ranked(), *c.variants]) if v in found][:MOST_ROWS]
    if not shown:
        return None
    heights = [8.6 * image.shape[0] / image.shape[1] + 0.2 for _, image in (found[v] for v in shown)]
    figure = new_figure(9.6, sum(heights))
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, name in zip(panels, shown, strict=True):
        judged, image = found[name]
        panel.imshow(image)
        name_row(panel, f"{escape_dollars(name)}\n{judged['flagged']} of {judged['count']:,}\nflagged", 8)
    thresholds = dict.fromkeys(f"{judged['threshold']:.2f}" for judged, _ in (found[v] for v in shown))
    caption = (
        "For each variant, of the seed with most copies, the samples most like copies (above; asked-for class and"
        " distance to the nearest training image over what is usual there) and those training images (below). Ratios"
        f" under {' or '.join(thresholds)} are flagged, which happens to about 0.5% of new images too."
    )
    return save(figure, path, "The samples nearest to training images", caption)


def _judged(trial: Trial) -> dict[str, Any]:
    """Return the memorisation entry of the trial's record, or an empty one."""
    return (trial.record or {}).get("memorisation") or {}


def _seed(trial: Trial) -> int:
    return int(((trial.record or {}).get("sample") or {}).get("seed", trial.seed))


def _samples_folder(trial: Trial) -> Path | None:
    named = ((trial.record or {}).get("drawing") or {}).get("folder")
    if named is None or trial.run is None:
        return None
    folder = trial.run.folder / str(named)
    return folder if folder.resolve().is_relative_to(trial.run.folder.resolve()) else None  # records may name any path


def _samples(trial: Trial) -> tuple[Tensor, list[str]] | None:
    """Read up to COLUMNS evenly spaced samples (N, C, H, W) and the names of their classes, if there are classes.

    None if samples are missing.
    """
    folder, run = _samples_folder(trial), trial.run
    try:
        assert folder is not None and run is not None
        images = Store(folder).open().arrays["images"]
        chosen = evenly_spaced(len(images), min(COLUMNS, len(images)))
        shown = images[chosen]
    except (OSError, DamagedError, KeyError):
        return None
    try:
        sizes = Store(folder).identity()["labels"]  # samples are drawn class by class
        names = [name for name, size in zip(run.facts.names, sizes, strict=True) for _ in range(size)]
        return shown, [names[i] for i in evenly_spaced(sum(sizes), len(shown))]
    except (OSError, DamagedError, KeyError, TypeError, ValueError, UserError):
        return shown, []


def attention_maps(networks: dict[str, list[Trial]], path: Path) -> Plot | None:
    """Draw attention over sampling time for one complete run of each network; cached until a run changes."""
    trained = [[t.run for t in trials if t.complete and t.run and t.run.images_seen] for trials in networks.values()]
    runs = [found[0] for found in trained if found][:MOST_MAPS]
    if not runs:
        return None
    exports = [max((p.stat().st_mtime_ns for p in run.folder.glob("ema-*")), default=0) for run in runs]
    state = [[str(run.folder), run.images_seen, export] for run, export in zip(runs, exports, strict=True)]
    cache = path.with_suffix(".json")
    cached = json.loads(cache.read_text()) if cache.is_file() else {}
    if cached.get("of") != state:
        cached = {"of": state, "drawn": _draw_attention([run.folder for run in runs], path)}
        write_text(cache, json.dumps(cached) + "\n")
    if not cached["drawn"] or not path.is_file():
        return None
    caption = (
        "Where the framed token of a held-out image looks, from noise (left) to image (right): red more than evenly,"
        " blue less, grey outside its window. Heads are averaged; one seed of each network."
    )
    return Plot(path, "Attention over time", caption)


def _draw_attention(folders: list[Path], path: Path) -> bool:
    """Draw the runs that have attention; return False if none has, or if none can be loaded."""
    runs: list[DenoiserRun] = []
    for folder in folders:
        try:
            run = load(folder)
            attention([run], AttentionConfig(times=1))
        except (UserError, ValueError):
            continue
        runs.append(run)
    if runs:
        save(attention_figure(*attention(runs, AttentionConfig(times=6))), path)
    return bool(runs)
