"""Pictures of a report: samples of every variant from the same noise, and attention over time."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffbench.core.errors import UserError
from diffbench.core.files import write_text
from diffbench.core.store import DamagedError, Store
from diffbench.metrics.base import evenly_spaced
from diffbench.reports.conclusions import Conclusion
from diffbench.reports.entries import Entry
from diffbench.reports.style import INK, Picture, figure, plain, save
from diffbench.sampling.images import grid

COLUMNS, MOST_ROWS = 20, 16
MOST_MAPS = 4
"""Networks whose attention is drawn."""


def sample_grid(c: Conclusion, path: Path) -> Picture | None:
    """A row of samples for each variant, of the seed that most of them have; a column is one noise and one label."""
    having = [e for e in c.entries if e.complete and _place(e) is not None]
    if not having:
        return None
    seed = Counter(_seed(e) for e in having).most_common(1)[0][0]
    rows: dict[str, Tensor] = {}
    ranked = {v: i for i, v in enumerate(c.ranked())}
    for entry in sorted(having, key=lambda e: ranked.get(e.result.variant, len(ranked))):
        if len(rows) < MOST_ROWS and entry.result.variant not in rows and _seed(entry) == seed:
            images = _samples(entry)
            if images is not None:
                rows[entry.result.variant] = images
    sizes = Counter(tuple(r.shape) for r in rows.values())
    if not rows:
        return None
    (size, _), *_ = sizes.most_common(1)
    rows = {name: r for name, r in rows.items() if tuple(r.shape) == size}
    drawn = figure(9.6, 0.35 + len(rows) * 8.6 / COLUMNS)
    panels = drawn.subplots(len(rows), 1, squeeze=False)[:, 0]
    for panel, (name, images) in zip(panels, rows.items(), strict=True):
        panel.imshow(grid(images, columns=len(images)), interpolation="nearest")
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
        panel.set_ylabel(plain(name), rotation=0, ha="right", va="center", fontsize=9, color=INK)
    caption = (
        f"Samples of each variant, seed {seed}, not chosen by hand: evenly spaced among those that were scored. A"
        " column starts from the same noise and asks for the same label, so that differences are the variants' own."
    )
    return save(drawn, path, "The same noise, side by side", caption)


def _seed(entry: Entry) -> int:
    record = entry.result.record or {}
    return int((record.get("sample") or {}).get("seed", entry.result.seed))


def _place(entry: Entry) -> Path | None:
    """The folder of a result's samples, where its record names one."""
    named = ((entry.result.record or {}).get("drawing") or {}).get("folder")
    if named is None:
        return None
    place = entry.result.folder / str(named)
    return place if place.resolve().is_relative_to(entry.result.folder.resolve()) else None  # a record may say anything


def _samples(entry: Entry) -> Tensor | None:
    """Evenly spaced samples (COLUMNS, C, H, W), read without the rest; None where they are not all there."""
    place = _place(entry)
    try:
        assert place is not None
        images = Store(place).open().arrays["images"]
        return images[evenly_spaced(len(images), min(COLUMNS, len(images)))]
    except (OSError, DamagedError, KeyError):
        return None


def attention_maps(networks: dict[str, list[Entry]], path: Path) -> Picture | None:
    """Where tokens look as sampling goes, one complete run of each network that attends; kept until a run changes."""
    chosen: dict[str, Entry] = {}
    for name, found in networks.items():
        entry = next((e for e in found if e.complete and e.seen is not None and e.seen.images_seen), None)
        if entry is not None and len(chosen) < MOST_MAPS:
            chosen[name] = entry
    if not chosen:
        return None
    state = [[name, str(e.result.folder), e.seen.images_seen if e.seen else 0] for name, e in chosen.items()]
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    kept = path.with_suffix(".json")
    if not (kept.is_file() and json.loads(kept.read_text()).get("of") == digest):
        told = _draw_attention(list(chosen.values()), path)
        write_text(kept, json.dumps({"of": digest, "drawn": told}) + "\n")
    if not json.loads(kept.read_text())["drawn"] or not path.is_file():
        return None
    caption = (
        "Where the framed token of a held-out image looks, from noise (left) to image (right): red more than evenly,"
        " blue less, grey outside its window. Heads are averaged; one seed of each network."
    )
    return Picture(path, "Attention over time", caption)


def _draw_attention(found: Sequence[Entry], path: Path) -> bool:
    """Draws those that attend; False where none does or none can be loaded."""
    from diffbench.reports.attention import AttentionConfig, attention, draw
    from diffbench.runs.lifecycle import load

    runs: list[Any] = []
    for entry in found:
        try:
            run = load(entry.result.folder)
            attention([run], AttentionConfig(times=1))
        except (UserError, ValueError):
            continue
        runs.append(run)
    if not runs:
        return False
    levels, maps = attention(runs, AttentionConfig(times=6))
    save(draw(levels, maps), path, "", "")
    return True
