"""Measures against the budget: error = a + b C^-c, where variants cross, and whether budgets rank them alike.

Intervals are of 95% from resampled seeds, whole runs at a time, since the rungs of a run share its weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from diffbench.core import rng
from diffbench.reports.statistics import ALPHA, LEAST, Array

T = TypeVar("T")
RESAMPLES = 200
EXPONENTS = np.geomspace(0.01, 5, 1000)
"""The exponents c that are tried."""
LEAST_RUNGS = 4
"""Rungs from which on three parameters are fitted."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, None where there are too few seeds."""

    value: float
    interval: tuple[float, float] | None

    def text(self, form: Callable[[float], str] = "{:.4g}".format) -> str:
        """The value with its interval: 0.51 [0.42, 0.60]."""
        ends = "" if self.interval is None else f" [{', '.join(map(form, self.interval))}]"
        return (form(self.value) + ends).replace("e+", "e")


@dataclass(frozen=True)
class Fit:
    """error = a + b (C / C_last)^-c: a is what no budget removes, b what the last rung leaves above it."""

    a: Estimate
    b: Estimate
    c: Estimate

    def at(self, share: Array) -> Array:
        """The error at budgets given as shares of the last rung's."""
        return np.asarray(self.a.value + self.b.value * share**-self.c.value)


def fit(budgets: Array, values: Array) -> Fit | None:
    """Fit a power law with an offset to the mean over seeds, each rung weighted by its relative error.

    Args:
        budgets: (rungs,) rising.
        values: (seeds, rungs) errors.
    """
    if len(budgets) < LEAST_RUNGS:
        return None
    share = budgets / budgets[-1]
    means = np.stack([values.mean(0), *_resampled(values, lambda rows: rows.mean(0))])
    found = _parameters(share, means)
    a, b, c = (Estimate(float(column[0]), _interval(column[1:].tolist())) for column in found.T)
    return Fit(a, b, c)


def _parameters(share: Array, means: Array) -> Array:
    """(fits, 3): a, b and c of least squares for each row of means (fits, rungs): linear in a and b for each c."""
    u = share ** -EXPONENTS[:, None]  # (exponents, rungs)
    y, w = means[:, None], 1 / means[:, None] ** 2
    total, su, sy = w.sum(-1), (w * u).sum(-1), (w * y).sum(-1)
    suu, suy = (w * u * u).sum(-1), (w * u * y).sum(-1)
    b = (total * suy - su * sy) / (total * suu - su**2)
    b = np.where(b * su > sy, suy / suu, b.clip(min=0))  # neither is negative
    a = ((sy - b * su) / total).clip(min=0)
    best = (w * (y - a[..., None] - b[..., None] * u) ** 2).sum(-1).argmin(1)
    rows = np.arange(len(means))
    return np.stack([a[rows, best], b[rows, best], EXPONENTS[best]], axis=1)


def crossings(budgets: Array, first: Array, second: Array) -> list[Estimate]:
    """Budgets at which the sign of first minus second changes, by straight lines over log C.

    The interval of each is of the crossings nearest to it in resamples of the seeds, of which most must have one.

    Args:
        budgets: (rungs,) rising.
        first, second: (seeds, rungs) of two variants, paired by seed.
    """
    difference = first - second
    found = _zeros(budgets, difference.mean(0))
    drawn = _resampled(difference, lambda rows: _zeros(budgets, rows.mean(0)))
    estimates = []
    for zero in found:
        near = [min(zeros, key=lambda z: abs(np.log(z / zero))) for zeros in drawn if zeros]
        estimates.append(Estimate(zero, _interval(near) if 2 * len(near) > RESAMPLES else None))
    return estimates


def _zeros(budgets: Array, difference: Array) -> list[float]:
    log, zeros = np.log(budgets), []
    for i in range(len(log) - 1):
        low, high = difference[i], difference[i + 1]
        if low * high < 0:
            zeros.append(float(np.exp(log[i] + (log[i + 1] - log[i]) * low / (low - high))))
    return zeros


def _resampled(values: Array, of: Callable[[Array], T]) -> list[T]:
    """A function of seeds (rows) drawn with replacement, the same draws each time; nothing of fewer than three."""
    n = len(values)
    if n < LEAST:
        return []
    drawn = rng.uniform(rng.key("rungs", n), torch.arange(RESAMPLES * n)) * n
    return [of(values[rows]) for rows in drawn.long().numpy().reshape(RESAMPLES, n)]


def _interval(values: Sequence[float] | Array) -> tuple[float, float] | None:
    if not len(values):
        return None
    low, high = np.quantile(values, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def kendall(values: Array) -> list[list[Estimate]]:
    """Kendall's tau-b between the rankings of variants in each pair of columns, by the means over seeds.

    Args:
        values: (seeds, columns, variants), paired by seed.
    """
    found = _tau_b(values.mean(0))
    drawn = np.array(_resampled(values, lambda rows: _tau_b(rows.mean(0))))
    return [
        [Estimate(float(tau), _interval(drawn[:, i, j]) if len(drawn) else None) for j, tau in enumerate(row)]
        for i, row in enumerate(found)
    ]


def _tau_b(columns: Array) -> Array:
    """(columns, columns) of (columns, variants)."""
    signs = np.sign(columns[:, :, None] - columns[:, None])
    products = np.einsum("aij,bij->ab", signs, signs)
    norms = np.sqrt(products.diagonal().clip(min=1))  # 0 where all variants are equal
    return np.asarray(products / (norms[:, None] * norms))
