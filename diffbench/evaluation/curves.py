"""Reference curves: the band of a metric over training in which a healthy run of an experiment lies."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import special  # scipy.stats takes several times as long to import

from diffbench.core.errors import UserError
from diffbench.core.files import write_text

NAME = "curves.csv"
"""A run's copy of its experiment's curves."""
LEAST = 3
"""Runs that make a band."""
CONFIDENCE = 0.99
"""Of one more run to lie inside: at 95% a healthy run would leave one of its checks every tenth time."""


@dataclass(frozen=True)
class Band:
    """Where one more run with another seed lies, at rising numbers of images."""

    images: list[int]
    low: list[float]
    high: list[float]

    def at(self, images: float) -> tuple[float, float] | None:
        """The band at a number of images, linear between its points; None outside them."""
        for i, (first, last) in enumerate(zip(self.images, self.images[1:], strict=False)):
            if first <= images <= last:
                share = (images - first) / (last - first)
                low, high = ((1 - share) * v[i] + share * v[i + 1] for v in (self.low, self.high))
                return low, high
        return None


def bands_of(runs: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str]) -> dict[str, Band]:
    """Prediction intervals (t distribution) of logged metrics over runs, where all of them have a value.

    Args:
        runs: the lines of metrics.jsonl of each run.
        names: metrics.

    Raises:
        ValueError: if there are fewer than three runs.
    """
    if len(runs) < LEAST:
        raise ValueError(f"a band needs at least {LEAST} runs, got {len(runs)}")
    factor = float(special.stdtrit(len(runs) - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(1 + 1 / len(runs))
    found = {}
    for name in names:
        series = [{line["images"]: line[name] for line in lines if name in line} for lines in runs]
        images = sorted(set.intersection(*map(set, series)))
        columns = [[values[i] for values in series] for i in images]
        middle = [statistics.mean(column) for column in columns]
        half = [factor * statistics.stdev(column) for column in columns]
        low, high = ([m + sign * h for m, h in zip(middle, half, strict=True)] for sign in (-1, 1))
        if images:
            found[name] = Band(images, low, high)
    return found


def write_curves(path: Path, bands: Mapping[str, Band]) -> None:
    """Write bands as CSV: images, then the low and the high end of each metric; empty where it was not measured."""
    table: dict[int, dict[str, str]] = {}
    for name, band in bands.items():
        for images, low, high in zip(band.images, band.low, band.high, strict=True):
            table.setdefault(images, {}).update({f"{name} low": f"{low:.6g}", f"{name} high": f"{high:.6g}"})
    text = io.StringIO()
    heads = ["images", *(f"{name} {end}" for name in bands for end in ("low", "high"))]
    writer = csv.DictWriter(text, heads, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({"images": images, **row} for images, row in sorted(table.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def read_curves(path: Path) -> dict[str, Band]:
    """The bands of a file, none if there is no file.

    Raises:
        UserError: if the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))
        names = [head.removesuffix(" low") for head in (rows[0] if rows else ()) if head.endswith(" low")]
        found = {}
        for name in names:
            kept = [row for row in rows if row[f"{name} low"]]
            low, high = ([float(row[f"{name} {end}"]) for row in kept] for end in ("low", "high"))
            found[name] = Band([int(row["images"]) for row in kept], low, high)
        return found
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as e:
        raise UserError(
            f"{path}: damaged ({' '.join(str(e).split())}); write it anew with `diffbench curves`"
        ) from None
