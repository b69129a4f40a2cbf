"""Reference curves: the band of a metric over training that a healthy run of an experiment stays in."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special  # scipy.stats takes several times as long to import

from diffbench.core.errors import UserError
from diffbench.core.files import write_text

NAME = "curves.csv"
"""A run's copy of its experiment's curves."""
LEAST = 3
"""Minimum number of runs for a band."""
CONFIDENCE = 0.99
"""Probability that one more run lies in the band; at 95% one healthy run in ten would fail one of its checks."""


@dataclass(frozen=True)
class Band:
    """The prediction interval of one more run with a new seed, at increasing numbers of images."""

    images: list[int]
    low: list[float]
    high: list[float]

    def at(self, images: float) -> tuple[float, float] | None:
        """Return the band at a number of images, interpolated linearly; None outside its range."""
        if not self.images or not self.images[0] <= images <= self.images[-1]:
            return None
        low, high = (float(np.interp(images, self.images, ends)) for ends in (self.low, self.high))
        return low, high


def bands_of(runs: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str]) -> dict[str, Band]:
    """Compute prediction intervals (t distribution) of logged metrics, wherever all runs have a value.

    Args:
        runs: the lines of each run's metrics.jsonl.

    Raises:
        ValueError: if there are fewer than three runs.
    """
    if len(runs) < LEAST:
        raise ValueError(f"a band needs at least {LEAST} runs, got {len(runs)}")
    factor = float(special.stdtrit(len(runs) - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(1 + 1 / len(runs))
    found = {}
    for name in names:
        finite = [[line for line in lines if math.isfinite(line.get(name, math.nan))] for lines in runs]
        series = [{line["images"]: line[name] for line in lines} for lines in finite]
        images = sorted(set.intersection(*map(set, series)))
        columns = [[values[i] for values in series] for i in images]
        middle = [statistics.mean(column) for column in columns]
        half = [factor * statistics.stdev(column) for column in columns]
        low, high = ([m + sign * h for m, h in zip(middle, half, strict=True)] for sign in (-1, 1))
        if images:
            found[name] = Band(images, low, high)
    return found


def write_curves(path: Path, bands: Mapping[str, Band]) -> None:
    """Write bands as CSV: images, then the low and the high end of each metric; cells without a value are empty."""
    import pandas as pd

    ends: dict[str, pd.Series[float]] = {}
    for name, band in bands.items():
        ends |= {f"{name} low": pd.Series(band.low, band.images), f"{name} high": pd.Series(band.high, band.images)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, pd.DataFrame(ends).rename_axis("images").to_csv(float_format="%.6g"))


def read_curves(path: Path) -> dict[str, Band]:
    """Read the bands of a file, or none if it does not exist; raise UserError if it is damaged."""
    if not path.is_file():
        return {}
    import pandas as pd

    found = {}
    try:
        table = pd.read_csv(path, index_col="images").astype(float)
        for name in (head.removesuffix(" low") for head in table if head.endswith(" low")):
            low, high = f"{name} low", f"{name} high"
            known = table[[low, high]].dropna()
            found[name] = Band([int(images) for images in known.index], known[low].tolist(), known[high].tolist())
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{path}: damaged ({' '.join(str(e).split())}); write it again with `diffbench curves`"
        ) from None
    return found
