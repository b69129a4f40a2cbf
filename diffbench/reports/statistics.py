"""The statistics of a comparison: intervals over seeds, paired differences with Holm's correction, ties, and the
smallest difference that would have been found.

Seeds are never reduced to their minimum, and Fréchet distances are never bootstrapped over images, since duplicates
bias them.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from scipy import special  # scipy.stats takes several times as long to import

ALPHA = 0.05
"""Probability of any false difference in a comparison."""
POWER = 0.8
"""Probability of finding a difference as large as `Paired.detectable`."""
LEAST = 3
"""Fewest values for which there is an interval."""

Array = np.ndarray
K = TypeVar("K")


@dataclass(frozen=True)
class Summary:
    """Summary of the values of one variant over seeds."""

    n: int
    mean: float
    sd: float | None
    """Sample standard deviation; None for a single value."""
    half: float | None
    """Half the width of the 95% t interval of the mean; None for fewer than three values."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, which is None for too few seeds."""

    value: float
    interval: tuple[float, float] | None

    def text(self, form: Callable[[float], str] = "{:.4g}".format) -> str:
        """Format the value with its interval: 0.51 [0.42, 0.60]."""
        ends = "" if self.interval is None else f" [{', '.join(map(form, self.interval))}]"
        return (form(self.value) + ends).replace("e+", "e")


def summary(values: Sequence[float]) -> Summary:
    """Return the mean, standard deviation and interval of one or more values."""
    x = np.asarray(values, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # values may be infinite
        sd = float(x.std(ddof=1)) if len(x) > 1 else None
    half = None if sd is None or len(x) < LEAST else _quantile(ALPHA, len(x)) * sd / len(x) ** 0.5
    return Summary(len(x), float(x.mean()), sd, half)


def by_column(values: Array) -> list[Summary]:
    """Return the summary of each column of (seeds, points)."""
    return [summary(column.tolist()) for column in values.T]


def _quantile(alpha: float, n: int) -> float:
    return float(-special.stdtrit(n - 1, alpha / 2))


Verdict = Literal["first", "second", "tie", "undecided"]


@dataclass(frozen=True)
class Paired:
    """Statistics of the differences between two variants, first minus second, paired by seed or by image.

    Attributes:
        n: number of pairs of values.
        mean: mean difference.
        interval: interval of the mean at `confidence`; None for fewer than three pairs.
        confidence: level of Holm's step, at which the interval excludes zero exactly if the difference is found.
        p: two-sided p-value before the correction.
        adjusted: p-value after the correction; the difference is found if this is at most 0.05.
        detectable: the smallest true difference found with 80% power, given the spread of these differences.
        effect: mean over standard deviation of the differences (Cohen's d of pairs); None if all are equal.
        finite: False if a difference is not finite, for example of a diverged run; no pair is counted then.
    """

    n: int
    mean: float
    interval: tuple[float, float] | None = None
    confidence: float | None = None
    p: float | None = None
    adjusted: float | None = None
    detectable: float | None = None
    effect: float | None = None
    finite: bool = True

    @property
    def half(self) -> float | None:
        """Half the width of the interval; None without an interval, or if all differences are equal."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2 or None

    @property
    def found(self) -> bool:
        """Whether the difference is significant after the correction."""
        return self.adjusted is not None and self.adjusted <= ALPHA


def paired(differences: Mapping[K, Sequence[float]]) -> dict[K, Paired]:
    """Test all pairs of a comparison with Holm's step-down correction.

    A pair with fewer than three differences is not tested but counts in the correction, so that conclusions do not
    weaken as a study fills up.
    """
    arrays = {key: np.asarray(values, dtype=np.float64) for key, values in differences.items()}
    finite = {key: bool(np.isfinite(x).all()) for key, x in arrays.items()}
    arrays = {key: x if finite[key] else x[:0] for key, x in arrays.items()}
    p = {key: _p(x) for key, x in arrays.items() if len(x) >= LEAST}
    alphas, adjusted = holm(p, len(arrays))
    found = {}
    for key, x in arrays.items():
        mean = float(x.mean()) if len(x) else float("nan")
        if key not in p:
            found[key] = Paired(len(x), mean, finite=finite[key])
            continue
        alpha, n, sd = alphas[key], len(x), float(x.std(ddof=1))
        half = _quantile(alpha, n) * sd / n**0.5
        interval = (mean - half, mean + half)
        effect = mean / sd if sd else None
        found[key] = Paired(n, mean, interval, 1 - alpha, p[key], adjusted[key], detectable(sd, n, alpha), effect)
    return found


def holm(p: Mapping[K, float], count: int | None = None) -> tuple[dict[K, float], dict[K, float]]:
    """Apply Holm's step-down correction (Holm 1979) at `ALPHA`.

    Args:
        p: the p-values.
        count: number of all tests, if some have no p-value.

    Returns:
        The level that each p-value was compared with (after the first one above its level, that level), and the
        adjusted p-values.
    """
    count = len(p) if count is None else count
    levels, adjusted = {}, {}
    largest, level, stopped = 0.0, ALPHA, False
    for step, key in enumerate(sorted(p, key=lambda k: p[k])):
        if not stopped:
            level = ALPHA / (count - step)
            stopped = p[key] > level
        levels[key] = level
        largest = max(largest, min(1.0, (count - step) * p[key]))
        adjusted[key] = largest
    return levels, adjusted


def _p(x: Array) -> float:
    sd, mean = float(x.std(ddof=1)), float(x.mean())
    if sd == 0:
        return float(mean == 0)
    return float(2 * special.stdtr(len(x) - 1, -abs(mean) / (sd / len(x) ** 0.5)))


def detectable(sd: float, n: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """Return the true mean difference that a two-sided t test of n differences of spread `sd` finds with this power."""
    # The shift of the noncentral t; the probability of finding a difference of the wrong sign is negligible.
    shift = special.nctdtrinc(n - 1, 1 - power, _quantile(alpha, n))
    return float(shift) * sd / n**0.5


def detectable_by_pairs(differences: Collection[Sequence[float]]) -> float | None:
    """Return the true mean difference that pairs with this spread show with 80% power; a smaller one may be luck.

    Uses the level of Holm's first step over all pairs, their pooled spread and the smallest number of seeds; None
    without pairs, with fewer than three seeds, or with values that are not finite.
    """
    n = min(map(len, differences), default=0)
    if n < LEAST or not all(np.isfinite(row).all() for row in differences):
        return None
    spread = float(np.mean([np.var(row, ddof=1) for row in differences])) ** 0.5
    return detectable(spread, n, ALPHA / len(differences))


def verdict(pair: Paired, lower_is_better: bool, tie: float = 0.0) -> Verdict:
    """Return which variant is better; a gap below `tie` is a tie, whatever the interval says."""
    if pair.interval is None:
        return "undecided"
    if not pair.found or abs(pair.mean) < tie:
        return "tie"
    return "first" if (pair.mean < 0) == lower_is_better else "second"


def differences(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """Return first minus second for the seeds that both have, in order of seed."""
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def by_image(first: Mapping[int, Array], second: Mapping[int, Array]) -> Array:
    """Return (images,) differences of per-image bounds on the same images and noise, averaged over shared seeds."""
    shared = sorted(first.keys() & second.keys())
    return np.mean([first[s].astype(np.float64) - second[s] for s in shared], axis=0)


def middle_interval(values: Sequence[float] | Array) -> tuple[float, float]:
    """Return the interval of the middle 95% of resampled values."""
    low, high = np.quantile(values, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def twin_tolerance(groups: Iterable[Sequence[float]]) -> float | None:
    """Return the distance below which two values of one group lie in 95% of cases, by Student's t with pooled spread.

    None if no group has two values.
    """
    parts = [x for x in groups if len(x) > 1]
    degrees = sum(len(x) - 1 for x in parts)
    if not degrees:
        return None
    sd = math.sqrt(sum((len(x) - 1) * float(np.var(x, ddof=1)) for x in parts) / degrees)
    return float(special.stdtrit(degrees, 1 - ALPHA / 2)) * math.sqrt(2) * sd
