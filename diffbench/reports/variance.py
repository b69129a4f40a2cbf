"""The variance components of a score: retraining a network, and resampling a trained network.

Nested random effects, y[i, j] = mean + training[i] + sampling[i, j], with i over training seeds and j over the sampling
seeds of one trained network, none of which two networks share. Estimated by the method of moments (Searle, Casella and
McCulloch 1992, §3.6); a negative training variance is set to zero and the rest pooled, as in restricted maximum
likelihood.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from diffbench.evaluation.records import values as scores_of
from diffbench.metrics.registry import metric_of
from diffbench.reports.conclusions import Conclusion
from diffbench.reports.results import Trial
from diffbench.reports.statistics import ALPHA, LEAST, Array, Estimate
from diffbench.reports.text import number

PUBLISHED_RATIO = 3.2
"""Ratio of the standard deviations of FID from retraining and from resampling: "The FID Lottery" (Dufour, Efros and
Perez, arXiv 2606.20536), several hundred SiTs on ImageNet-256."""
_UPPER, _LOWER = 1 - ALPHA / 2, ALPHA / 2


@dataclass(frozen=True)
class Components:
    """Variances with 95% intervals (none below three training seeds); the first two sum to the third.

    Attributes:
        training: variance of the true scores of trained networks.
        sampling: variance of the scores of one network; None if each network has one score.
        total: variance of one score of one network.
        ratio: standard deviation of training over that of sampling; infinite if sampling changes nothing.
    """

    training: Estimate
    sampling: Estimate | None
    total: Estimate
    ratio: Estimate | None


def components(values: Array) -> Components:
    """Return the variance components of scores (training seeds, sampling seeds).

    Intervals are exact for sampling (chi-square) and the ratio (F), Williams's (1962) for training, and Graybill and
    Wang's (1980) for the total.

    Raises:
        ValueError: for fewer than two training seeds.
    """
    n, k = values.shape
    if n < 2:
        raise ValueError("needs at least two training seeds, got 1")
    df = n - 1, n * (k - 1)
    means = values.mean(1)
    squares = k * float(((means - means.mean()) ** 2).sum()), float(((values - means[:, None]) ** 2).sum())
    between = squares[0] / df[0]
    low, high = (special.chdtri(df[0], p) / df[0] for p in (_LOWER, _UPPER))  # quantiles of mean square / its mean
    if k == 1:
        alone = _estimate(between, between / low, between / high, n)
        return Components(alone, None, alone, None)
    within = squares[1] / df[1]
    low_2, high_2 = (special.chdtri(df[1], p) / df[1] for p in (_LOWER, _UPPER))
    f_high, f_low = special.fdtri(*df, _UPPER), special.fdtri(*df, _LOWER)
    training = max(0.0, (between - within) / k)
    sampling = within if between > within else sum(squares) / sum(df)
    parts = np.array([between / k, within * (1 - 1 / k)])  # independent, and sum to the total
    down = math.hypot(*((1 - 1 / np.array([low, low_2])) * parts))
    up = math.hypot(*((1 / np.array([high, high_2]) - 1) * parts))

    def ratio(f: float) -> float:
        return math.sqrt(max(0.0, (between / within / f - 1) / k)) if within else math.inf

    return Components(
        _estimate(training, (between - within * f_high) / k / low, (between - within * f_low) / k / high, n),
        _estimate(sampling, within / low_2, within / high_2, n),
        _estimate(training + sampling, parts.sum() - down, parts.sum() + up, n),
        _estimate(ratio(1.0), ratio(f_high), ratio(f_low), n),
    )


def _estimate(value: float, low: float, high: float, seeds: int) -> Estimate:
    return Estimate(float(value), (max(0.0, float(low)), max(0.0, float(high))) if seeds >= LEAST else None)


def table(c: Conclusion) -> list[dict[str, str]]:
    """Return a row of standard deviations for each variant, if the study samples its networks several times.

    The metrics are the primary one and the first other watched one: the validation bound, else a distance.
    """
    rows: list[dict[str, str]] = []
    names = [c.name, *(name for name in c.metrics if metric_of(name).watched and name != c.name)][:2]
    for name in names if any(t.more for t in c.trials) else ():
        for variant, trials in c.variants.items():
            values = scores([t for t in trials if t.complete], name)
            if len(values) < 2:
                continue
            found, mean = components(values), float(values.mean())
            row = {"variant": f"{variant}, {metric_of(name).title}", "seeds": " x ".join(map(str, values.shape))}
            row |= {"mean": number(mean, name), "training": _root(found.training, name)}
            if found.sampling and found.ratio:
                row["sampling"] = _root(found.sampling, name)
                row["training / sampling"] = found.ratio.text("{:.2g}".format)
                row["training's share"] = f"{100 * found.training.value / (found.total.value or 1):.0f}%"
            row["total"] = _root(found.total, name)
            row["total / mean"] = f"{100 * math.sqrt(found.total.value) / abs(mean):.2g}%" if mean else "-"
            rows.append(row)
    return rows


def scores(trials: list[Trial], name: str) -> Array:
    """Return a metric as (training seeds, sampling seeds), without incomplete rows; validations have one column."""
    if metric_of(name).is_validation:
        return np.array([[t.values[name]] for t in trials if name in t.values])
    rows = [[each[name] for each in map(scores_of, t.records) if name in each] for t in trials]
    most = max(map(len, rows), default=0)
    return np.array([row for row in rows if len(row) == most and most])


def _root(variance: Estimate, name: str) -> str:
    ends = variance.interval and (math.sqrt(variance.interval[0]), math.sqrt(variance.interval[1]))
    scale = (ends[1] - ends[0]) / 2 if ends else None
    return Estimate(math.sqrt(variance.value), ends).text(lambda value: number(value, name, scale))
