"""What samples are held against: an extractor, statistics of real images, and what real images themselves score."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffbench.config.sample_sections import EvaluateConfig
from diffbench.core import rng
from diffbench.core.files import locked, write_text
from diffbench.core.progress import progress
from diffbench.data.sets import ImageSet
from diffbench.evaluation import reference as references
from diffbench.evaluation.reference import BATCH, Part
from diffbench.metrics import Extractor
from diffbench.metrics.functional import nearest_distance
from diffbench.metrics.suite import KEPT, Reference, Suite, metric_name

SUBSETS, SUBSET = 100, 1000
"""The kernel distance is a mean over so many subsets of so many images, as is common; of fewer images it takes all."""
PATIENCE = 15
"""Seconds that may pass without a sign of progress."""
LEAST = 20
"""Real images without which a comparison is left out."""

Numbered = tuple[Tensor, Tensor, Tensor | None]
"""Numbers (B,), images (B, C, H, W) uint8, labels (B,) or None."""


@dataclass
class Judgement:
    """What `count` samples are compared with.

    Attributes:
        extractor: whose features.
        count: samples.
        references: name -> statistics of real images; "fd" is the main one.
        reference: what a record says of that: the digest of its key, where it comes from, how many images.
        floor: what as many real images score against it, and how many they are.
        training: images to which copies would lie close, or None.
        labels: whether samples have labels that the extractor can judge.
        infinity: whether the Fréchet distance is extrapolated too.
        by_class: whether samples are numbered class by class, as a run's own are: the Inception score's chunks are then
            taken of them as `export` shuffles them.
    """

    extractor: Extractor
    count: int
    references: dict[str, Reference]
    reference: dict[str, Any]
    floor: dict[str, Any] | None = None
    training: Tensor | None = None
    labels: bool = True
    infinity: bool = False
    by_class: bool = True
    extra: dict[str, float] = field(default_factory=dict)

    def suite(self, brief: bool = False, count: int | None = None) -> Suite:
        """The metrics, empty; `brief` leaves all but the Fréchet and the kernel distance out."""
        count = self.count if count is None else count
        return Suite(
            self.extractor,
            self.references,
            count,
            subsets=subsets(min(count, KEPT), len(self.references["fd"].rows)),
            brief=brief,
            labels=self.labels,
            training=self.training,
            order=order("fd_infinity", count) if self.infinity else None,
            places=order("export", count).argsort() if self.by_class else None,
        )

    def scores(self, batches: Iterable[Numbered]) -> dict[str, float]:
        """Name with extractor and count -> value, of all samples."""
        suite = self.suite()
        for index, images, labels in watched("scored", batches, self.count):
            suite.update(images, index, labels)
        return self.named(suite.compute()) | self.extra

    def named(self, values: dict[str, float]) -> dict[str, float]:
        """Values under the names that records hold; the held-out distance also as its gap to the training images."""
        if "fd_held_out" in values:
            alike = values.pop("fd_train", values["fd"])
            values["fd_gap"] = values["fd_held_out"] - alike
        return {metric_name(name, self.extractor, self.count): value for name, value in values.items()}

    def told(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"reference": self.reference, "floor": self.floor}


def of_run(
    config: EvaluateConfig,
    train: ImageSet,
    held_out: ImageSet,
    device: torch.device | str = "cpu",
    extractor: Extractor | None = None,
) -> Judgement:
    """What a run's samples are compared with: its training images, and besides them the held-out ones.

    The held-out distance and the training distance from which its gap is taken use equal numbers of images.

    Raises:
        ValueError: where the extractor lacks something; one line that begins with the key.
    """
    extractor = extractor or references.judge(config.extractor, config.weights, train, device)
    count = config.count
    everything = config.reference == "all"
    main = references.everything(train, "train") if everything else references.first(train, "train", count)
    keep = min(count, KEPT)
    reference, key = references.of_part(extractor, main, keep)
    compared = {"fd": reference}
    test = references.everything(held_out, "held-out") if everything else references.first(held_out, "held-out", count)
    if len(test) >= LEAST:
        compared["fd_held_out"] = references.of_part(extractor, test, keep)[0]
        if len(test) != len(main):
            alike = references.first(train, "train", len(test))
            compared["fd_train"] = references.of_part(extractor, alike, keep)[0]
    told = {"key": key, "split": main.split, "count": len(main)}
    judgement = Judgement(extractor, count, compared, told, training=train.images, infinity=config.infinity)
    others = _others(main, held_out, count)
    if len(others) >= LEAST:
        judgement.floor = _cached(judgement, key, "floor", others, lambda: _floor(judgement, others))
    near = references.first(held_out, "held-out", count)
    judgement.extra = _cached(judgement, key, "nearest", near, lambda: _nearest(near, train))
    return judgement


def in_training(config: EvaluateConfig, train: ImageSet, device: torch.device | str = "cpu") -> Judgement:
    """What samples drawn in training are compared with: as many training images."""
    extractor = references.judge(config.extractor, config.weights, train, device)
    main = references.first(train, "train", config.every_count)
    reference, key = references.of_part(extractor, main)
    return Judgement(extractor, config.every_count, {"fd": reference}, {"key": key, "count": len(main)})


def _others(main: Part, held_out: ImageSet, count: int) -> Part:
    """Real images apart from the reference: of the training set where it has as many left, else the larger choice."""
    left = references.others(main, count)
    test = references.first(held_out, "held-out", count)
    return left if len(left) >= min(count, len(test)) else test


def _floor(judgement: Judgement, part: Part) -> dict[str, Any]:
    main = judgement.references["fd"]
    alone = Judgement(judgement.extractor, len(part), {"fd": main}, {}, labels=judgement.labels)
    suite = alone.suite()
    for index in torch.arange(len(part)).split(BATCH):
        suite.update(part.data.images[part.index[index]], index, part.data.labels[part.index[index]])
    return {"count": len(part), "images": f"{part.split}: {part.which}", **suite.compute()}


def _nearest(part: Part, train: ImageSet) -> dict[str, Any]:
    distances = [nearest_distance(batch, train.images) for batch in part.batches()]
    return {"nearest_train_held_out": float(torch.cat(distances).mean())} if distances else {}


def _cached(judgement: Judgement, key: str, what: str, part: Part, make: Any) -> dict[str, Any]:
    """Numbers that follow from a reference and a part of real images, worked out once."""
    source = [what, key, part.data.fingerprint(), part.split, part.which, len(part)]
    name = hashlib.sha256(json.dumps(source).encode()).hexdigest()[:16]
    path = references.reference_folder() / f"{judgement.extractor.name}-{what}-{len(part)}-{name}.json"
    if not path.exists():
        with locked(path.parent, wait=True, name=f".{path.name}.lock"):
            if not path.exists():
                write_text(path, json.dumps(make()) + "\n")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def subsets(samples: int, real: int) -> list[tuple[Tensor, Tensor]] | None:
    """Row numbers of the kernel distance's subsets, the same for all; None where all rows make one subset."""
    size = min(SUBSET, samples, real)
    if size == samples == real or not size:
        return None

    def rows(what: str, i: int, n: int) -> Tensor:
        return rng.permutation(rng.key("kid", what, i), n)[:size]

    return [(rows("samples", i, samples), rows("real", i, real)) for i in range(SUBSETS)]


def order(what: str, count: int) -> Tensor:
    """A fixed permutation of `count` samples."""
    return rng.permutation(rng.key("order of samples", what), count)


def watched(what: str, batches: Iterable[Numbered], total: int) -> Iterator[Numbered]:
    """The batches, with progress shown where the first one says that all will take longer than some seconds."""
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
                advance = int  # takes the count and does nothing with it


def numbered(batches: Iterator[Tensor], labels: Tensor | None) -> Iterator[Numbered]:
    """Batches of pictures with their numbers and labels."""
    done = 0
    for images in batches:
        index = torch.arange(done, done + len(images))
        yield index, images, None if labels is None else labels[index]
        done += len(images)
