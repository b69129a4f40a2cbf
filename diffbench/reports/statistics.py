"""The statistics of a comparison: intervals over seeds, paired differences under Holm's correction, ties, and the
smallest difference that would have been found.

Never a minimum over seeds, and no bootstrap of a Fréchet distance: duplicates among resampled images bias it.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from scipy import special  # scipy.stats takes several times as long to import

ALPHA = 0.05
"""Chance of any false difference in a comparison."""
POWER = 0.8
"""Chance of finding a difference as large as `Paired.detectable`."""
LEAST = 3
"""Values without which there is no interval."""

Array = np.ndarray
K = TypeVar("K")


@dataclass(frozen=True)
class Summary:
    """Values of one variant over seeds."""

    n: int
    mean: float
    sd: float | None
    """Sample standard deviation; None of a single value."""
    half: float | None
    """Half the width of the 95% t interval of the mean; None of fewer than three values."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, None where there are too few seeds."""

    value: float
    interval: tuple[float, float] | None

    def text(self, form: Callable[[float], str] = "{:.4g}".format) -> str:
        """The value with its interval: 0.51 [0.42, 0.60]."""
        ends = "" if self.interval is None else f" [{', '.join(map(form, self.interval))}]"
        return (form(self.value) + ends).replace("e+", "e")


def summary(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and interval of at least one value."""
    x = np.asarray(values, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # of values that are not finite
        sd = float(x.std(ddof=1)) if len(x) > 1 else None
    half = None if sd is None or len(x) < LEAST else _quantile(ALPHA, len(x)) * sd / len(x) ** 0.5
    return Summary(len(x), float(x.mean()), sd, half)


def by_column(values: Array) -> list[Summary]:
    """The summary of each column of (seeds, points)."""
    return [summary(column.tolist()) for column in values.T]


def _quantile(alpha: float, n: int) -> float:
    return float(-special.stdtrit(n - 1, alpha / 2))


Verdict = Literal["first", "second", "tie", "undecided"]


@dataclass(frozen=True)
class Paired:
    """Differences of two variants, first minus second, of whatever both have: seeds, or images.

    Attributes:
        n: pairs of values.
        mean: difference.
        interval: of the mean, at `confidence`; None of fewer than three pairs.
        confidence: at Holm's step: the interval leaves zero out exactly where the difference is found.
        p: of no difference, two-sided, before the correction.
        adjusted: the same after it: found where this is at most 0.05.
        detectable: the smallest true difference found with 80% power, given how much these differences scatter.
        effect: the mean over the standard deviation of the differences (Cohen's d of pairs); None where they are equal.
        finite: False where a difference is not a number, as of a run that went astray: none is counted then.
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
        """Half the width of the interval; None without one, or where all differences are equal."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2 or None

    @property
    def found(self) -> bool:
        """Whether the correction leaves the difference standing."""
        return self.adjusted is not None and self.adjusted <= ALPHA


def paired(differences: Mapping[K, Sequence[float]]) -> dict[K, Paired]:
    """All pairs of a comparison under Holm's step-down correction.

    A pair of fewer than three differences is not tested, yet counts in the correction, so that conclusions do not
    weaken while a study fills up.
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
    """Holm's step-down correction (Holm 1979) at `ALPHA`.

    Args:
        p: the p-values.
        count: tests in all, where some have no p-value.

    Returns:
        The level that each test was held against (of those not reached, the level at which the steps stopped), and the
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
    """The true mean difference that a two-sided t test of n differences of spread `sd` finds with this power."""
    # The shift of the noncentral t; that a difference is found the wrong way round has no chance worth counting then.
    shift = special.nctdtrinc(n - 1, 1 - power, _quantile(alpha, n))
    return float(shift) * sd / n**0.5


def luck(differences: Collection[Sequence[float]]) -> float | None:
    """The true mean difference that pairs which scatter like these would show with 80% power; any smaller may be luck.

    At the level of the first of Holm's steps over all of them, with their pooled spread and the least number of seeds;
    None of no pairs, or fewer than three seeds.
    """
    n = min(map(len, differences), default=0)
    if n < LEAST or not all(np.isfinite(row).all() for row in differences):
        return None
    spread = float(np.mean([np.var(row, ddof=1) for row in differences])) ** 0.5
    return detectable(spread, n, ALPHA / len(differences))


def verdict(pair: Paired, lower_is_better: bool, tie: float = 0.0) -> Verdict:
    """The better variant; a gap below `tie` is a tie, whatever the interval says."""
    if pair.interval is None:
        return "undecided"
    if not pair.found or abs(pair.mean) < tie:
        return "tie"
    return "first" if (pair.mean < 0) == lower_is_better else "second"


def differences(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """First minus second for the seeds that both have, in their order."""
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def by_image(first: Mapping[int, Array], second: Mapping[int, Array]) -> Array:
    """Differences (images,) of bounds (images,) by seed, on the same images and noise, averaged over shared seeds."""
    shared = sorted(first.keys() & second.keys())
    return np.mean([first[s].astype(np.float64) - second[s] for s in shared], axis=0)


def middle(values: Sequence[float] | Array) -> tuple[float, float]:
    """The interval of the middle 95% of resampled values."""
    low, high = np.quantile(values, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def twin_tolerance(groups: Iterable[Sequence[float]]) -> float | None:
    """The distance of two values of one group in 95% of cases, by Student's t over the pooled standard deviation.

    None where no group has two values.
    """
    parts = [x for x in groups if len(x) > 1]
    degrees = sum(len(x) - 1 for x in parts)
    if not degrees:
        return None
    sd = math.sqrt(sum((len(x) - 1) * float(np.var(x, ddof=1)) for x in parts) / degrees)
    return float(special.stdtrit(degrees, 1 - ALPHA / 2)) * math.sqrt(2) * sd
