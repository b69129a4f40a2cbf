"""What timings say: medians with their spread, arithmetic rates, shares, ratios, growth, and changes since before."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PASSES = {"forward": 1, "train": 3, "sample": 1}
"""Forward passes that each kind of step counts as: a backward pass is worth two."""


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    low: float
    high: float
    n: int

    def scaled(self, factor: float) -> "Spread":
        """The same in another unit."""
        return Spread(self.median * factor, self.low * factor, self.high * factor, self.n)

    @property
    def relative(self) -> float:
        """From the lowest to the highest, as a share of the median."""
        return (self.high - self.low) / self.median if self.median else math.inf


def spread(values: Sequence[float]) -> Spread:
    """Median, least, largest and number of some measurements.

    Raises:
        ValueError: if there are none.
    """
    if not values:
        raise ValueError("no measurements: a median needs at least one")
    return Spread(statistics.median(values), min(values), max(values), len(values))


def flops(macs: float, batch: int, passes: float) -> float:
    """Floating-point operations of a step: two for each multiply-accumulate of each forward pass that it counts as.

    Args:
        macs: multiply-accumulates of one forward pass at batch 1.
        batch: images.
        passes: 1 for a forward pass, 3 for a training step, network evaluations of a sampling step.
    """
    return 2.0 * macs * batch * passes


def against(achieved: float, peak: dict[str, Any]) -> dict[str, Any]:
    """FLOP/s beside a peak of `bench.peak`: as a share of the fastest product, and of torch.mm's."""
    return {
        "flops_per_s": achieved,
        "peak": peak,
        "share": share(achieved, peak["flops_per_s"]),
        "mm_share": share(achieved, peak["mm_flops_per_s"]),
    }


def share(achieved: float, peak: float) -> float:
    """What part of a peak was reached.

    Raises:
        ValueError: if the peak is not positive.
    """
    if peak <= 0:
        raise ValueError(f"peak: must be positive, got {peak}")
    return achieved / peak


def ratio(times: Sequence[float], base: Sequence[float]) -> Spread:
    """How many times as long as `base`, round by round: both were measured in turns, so that each round has its own."""
    return spread([t / b for t, b in zip(times, base, strict=True)])


def differences(times: Sequence[float], base: Sequence[float]) -> Spread:
    """How much longer than `base`, pair by pair."""
    return spread([t - b for t, b in zip(times, base, strict=True)])


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent p of value ~ size^p: least squares in the logarithms, 1 for linear growth and 2 for quadratic.

    Raises:
        ValueError: if there are fewer than two sizes, or one is not positive.
    """
    if len(set(sizes)) < 2 or min(*sizes, *values) <= 0:
        raise ValueError(f"a slope needs two positive sizes and values, got {list(sizes)} and {list(values)}")
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    return statistics.linear_regression(x, y).slope


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length that (start, end) intervals cover together, overlaps counted once."""
    total, until = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


KEY = ("part", "name", "variant", "work", "batch", "size")
"""What makes two lines of two reports the same measurement."""


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The measurement that a row is."""
    return tuple(row.get(name) for name in KEY)


def changes(now: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], float]:
    """Measurement -> its time as a multiple of what it was, for what both reports hold."""
    old = {key_of(row): row["ms"] for row in before if row.get("ms")}
    return {key: row["ms"] / old[key] for row in now if row.get("ms") and (key := key_of(row)) in old}
