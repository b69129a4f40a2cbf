"""Scoring samples against reference statistics of real images."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffbench.config.sections import EvaluateConfig
from diffbench.core import files, rng, tensors
from diffbench.core.progress import progress
from diffbench.data.sets import ImageSet, take_rows
from diffbench.evaluation.reference import (
    BATCH,
    Part,
    choose_all,
    choose_first,
    choose_others,
    choose_per_class,
    class_counts,
    reference_folder,
    statistics_of,
)
from diffbench.metrics import Extractor, copies
from diffbench.metrics.base import KEPT, Measurement
from diffbench.metrics.copies import Calibration, CopyDetector
from diffbench.metrics.memorisation import Memorisation
from diffbench.metrics.registry import metric_name
from diffbench.metrics.suite import Suite

PATIENCE = 15
"""Expected duration in seconds above which progress is shown."""
LEAST = 20
"""Minimum number of real images for a comparison; with fewer it is omitted."""

Numbered = tuple[Tensor, Tensor, Tensor | None]
"""Numbers (B,), images (B, C, H, W) uint8, labels (B,) or None."""


def permutation(n: int, *key: str | int) -> Tensor:
    return rng.permutation(rng.key(*key), n)


@dataclass
class Scorer:
    """A scorer of samples against real images.

    Attributes:
        measurement: facts about the samples, and the statistics of real images.
        reference: a record's entry for the main statistics: digest of their key, split, number of images.
        floor: scores of real images against the main statistics, and their number; None if there are too few.
        extra: further values for every record.
        copies: the metric of copies for the samples scored last.
    """

    measurement: Measurement
    reference: dict[str, Any]
    floor: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    copies: Memorisation | None = None

    def scores(self, batches: Iterable[Numbered]) -> dict[str, float]:
        """Score samples and return full metric name -> value."""
        suite = Suite(self.measurement)
        for index, images, labels in with_progress("scored", batches, self.measurement.count):
            suite.update(images, index, labels)
        values = suite.compute()
        self.copies = next((m for m in suite.metrics.values() if isinstance(m, Memorisation)), None)
        if "fd_held_out" in values:
            values["fd_gap"] = values["fd_held_out"] - values.pop("fd_train", values["fd"])
        extractor, count = self.measurement.extractor, self.measurement.count
        return {metric_name(name, extractor, count): value for name, value in values.items()} | self.extra

    def facts(self) -> dict[str, Any]:
        found = {"reference": self.reference, "floor": self.floor}
        if self.copies is None:
            return found
        flagged = {"flagged": self.copies.flagged(), "count": self.copies.count}
        return {**found, "memorisation": flagged | asdict(self.copies.detector.calibration)}


def run_scorer(
    settings: EvaluateConfig,
    extractor: Extractor,
    train: ImageSet,
    held_out: ImageSet,
    counts: Tensor | None = None,
) -> Scorer:
    """Make the scorer of `settings.count` samples against the training and held-out images of a run.

    The gap between the held-out and the training distance is computed with equal numbers of images of each class.

    Args:
        settings: number of samples, and choice of training images.
        counts: samples per class; by default those of `class_counts`.
    """
    count, use_all = settings.count, settings.reference == "all"
    counts = class_counts(train.labels, count) if counts is None else counts
    keep = min(count, KEPT)
    main = choose_all(train, "train") if use_all else choose_per_class(train, "train", counts)
    matched = choose_per_class(held_out, "held-out", counts)
    test = choose_all(held_out, "held-out") if use_all else matched
    reference, key = statistics_of(extractor, main, keep)
    references = {"fd": reference}
    if len(test) >= LEAST:
        references["fd_held_out"] = statistics_of(extractor, test, keep)[0]
        same_counts = choose_per_class(train, "train", test.labels.bincount(minlength=1))
        if len(same_counts) != len(main):
            references["fd_train"] = statistics_of(extractor, same_counts, keep)[0]
    measurement = Measurement(
        extractor,
        references,
        count,
        labels=train.base is None,  # no extractor can tell a planted class from its parts
        detector=_detector(extractor, train, held_out),
        infinity=settings.infinity,
        by_class=True,
        permutation=permutation,
        rule=train.rule,
    )
    scorer = Scorer(measurement, {"key": key, "split": main.split, "count": len(main), "all": use_all})
    left = choose_others(main)
    real = left if len(left) >= min(count, len(matched)) else matched  # real images outside the reference
    if len(real) >= LEAST:
        scorer.floor = _cached_numbers(extractor, key, "floor", real, lambda: _floor(measurement, real))
    if measurement.detector is not None and measurement.detector.calibration.authenticity is not None:
        scorer.extra = {"authenticity_held_out": measurement.detector.calibration.authenticity}
    return scorer


def _floor(like: Measurement, part: Part) -> dict[str, Any]:
    suite = Suite(replace(like, references={"fd": like.main}, count=len(part), detector=None, infinity=False))
    for index in torch.arange(len(part)).split(BATCH):
        suite.update(take_rows(part.data.images, part.index[index]), index, part.labels[index])
    return {"count": len(part), "images": f"{part.split}: {part.which}", **suite.compute()}


def _detector(extractor: Extractor, train: ImageSet, held_out: ImageSet) -> CopyDetector | None:
    train = train.base or train  # a planted class repeats images of other classes
    if len(train) < copies.LEAST:
        return None
    detector = CopyDetector(train.images, extractor.device)
    part = choose_first(held_out, "held-out", min(copies.CALIBRATED, len(held_out)))
    key, what = train.fingerprint(), f"copies-{copies.RATE:g}"
    found = _cached_numbers(extractor, key, what, part, lambda: asdict(detector.calibrate(part.batches())))
    detector.calibration = Calibration(**found)
    return detector


def _cached_numbers(
    extractor: Extractor, key: str, what: str, part: Part, make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return numbers that depend on a reference and a part of real images, computed once and cached."""
    source = [what, key, part.data.fingerprint(), part.split, part.which, len(part)]
    path = reference_folder() / f"{extractor.name}-{what}-{len(part)}-{files.digest(source)[:16]}.safetensors"
    files.cached(path, lambda: tensors.write(path, {}, {"numbers": json.dumps(make())}))
    return json.loads(tensors.read(path)[1]["numbers"])


def training_measurement(extractor: Extractor, train: ImageSet, count: int) -> Measurement:
    """Make the measurement of `count` samples drawn during training against as many training images."""
    statistics = statistics_of(extractor, choose_first(train, "train", count))[0]
    return Measurement(extractor, {"fd": statistics}, count, permutation=permutation, rule=train.rule)


def with_progress(what: str, batches: Iterable[Numbered], total: int) -> Iterator[Numbered]:
    """Yield the batches; show progress if the first one suggests that all will take longer than `PATIENCE`."""
    started = time.perf_counter()
    advance: Callable[[int], Any] | None = None
    with ExitStack() as stack:
        for batch in batches:
            yield batch
            done = len(batch[0])
            if advance is not None:
                advance(done)
            elif (time.perf_counter() - started) * total / done > PATIENCE:
                advance = stack.enter_context(progress(what, total, done))
            else:
                advance = int  # does nothing with the count


def numbered(batches: Iterable[Tensor], labels: Tensor | None) -> Iterator[Numbered]:
    """Yield batches of images with their numbers and labels."""
    done = 0
    for images in batches:
        index = torch.arange(done, done + len(images))
        yield index, images, None if labels is None else labels[index]
        done += len(images)
