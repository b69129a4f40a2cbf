"""Paired tests of variants, by seed and by image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffbench.metrics.registry import metric_of
from diffbench.reports import statistics
from diffbench.reports.results import Trial, by_seed, network_key
from diffbench.reports.statistics import Paired, Verdict
from diffbench.reports.text import number

Variants = Mapping[str, Sequence[Trial]]
Pair = tuple[str, str]


@dataclass(frozen=True)
class PairedTest:
    """Two variants by the primary metric, first minus second.

    Attributes:
        first, second: names of the variants.
        differences: first minus second for each shared seed.
        paired: statistics of the differences.
        verdict: which variant is better, if either.
        detectable: the smallest true difference that would have been found, or the tie threshold if that is larger.
        by_image: for the validation bound, statistics of differences paired by image and noise, averaged over seeds:
            how certain the difference is for these trained networks.
    """

    first: str
    second: str
    differences: list[float]
    paired: Paired
    verdict: Verdict
    detectable: float | None
    by_image: Paired | None = None

    @property
    def winner(self) -> str | None:
        """The better variant, or None."""
        return {"first": self.first, "second": self.second}.get(self.verdict)

    def other(self, name: str) -> str:
        """Return the variant that `name` is tested against."""
        return self.second if name == self.first else self.first

    def gap(self, name: str) -> str:
        """Format the size of the difference, with the digits that its interval supports."""
        return number(abs(self.paired.mean), name, self.paired.half)


def paired_tests(variants: Variants, name: str, pairs: Sequence[Pair]) -> list[PairedTest]:
    """Test pairs of variants by a metric, with Holm's correction over all of them."""
    seeds, metric = {v: by_seed(trials, name) for v, trials in variants.items()}, metric_of(name)
    rows = {(a, b): statistics.differences(seeds[a], seeds[b]) for a, b in pairs}
    images = _by_image(variants, pairs) if name == "val/bound" else {}
    by_image = statistics.paired({pair: row.tolist() for pair, row in images.items()})
    found = []
    for (a, b), paired in statistics.paired(rows).items():
        shared = sorted(seeds[a].keys() & seeds[b].keys())
        tie = metric.tie * min((float(np.mean([seeds[v][s] for s in shared])) for v in (a, b) if shared), default=0.0)
        verdict = statistics.verdict(paired, metric.lower_is_better, tie)
        detectable = None if paired.detectable is None else max(paired.detectable, tie)
        found.append(PairedTest(a, b, rows[a, b], paired, verdict, detectable, by_image.get((a, b))))
    return found


def _by_image(variants: Variants, pairs: Sequence[Pair]) -> dict[Pair, np.ndarray]:
    """Return pair -> (images,) differences of the bound, averaged over the seeds that both variants have."""
    bounds: dict[str, dict[int, np.ndarray]] = {}
    for variant, trials in variants.items():
        measured = {t.seed: t.image_bounds for t in trials if t.complete}
        bounds[variant] = {seed: b for seed, b in measured.items() if b is not None and np.isfinite(b).all()}
    rows = {}
    for a, b in pairs:
        shapes = {bounds[v][seed].shape for seed in bounds[a].keys() & bounds[b].keys() for v in (a, b)}
        if len(shapes) == 1 and network_key(variants[a]) != network_key(variants[b]):
            rows[a, b] = statistics.by_image(bounds[a], bounds[b])
    return rows
