"""Reference statistics of real images, and which images they are made of.

Statistics are made once and cached. The key of a cached file, whose hash stands in its name, holds everything that its
numbers depend on; damage is an error.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffbench.config.kinds import AutoencoderConfig, RunConfig
from diffbench.core import files, tensors
from diffbench.core.errors import UserError
from diffbench.core.files import cache_folder, digest
from diffbench.core.progress import progress
from diffbench.data.registry import SOURCES
from diffbench.data.sets import ImageSet, rows
from diffbench.metrics import EXTRACTORS, Extractor, Request
from diffbench.metrics import extractor as build_extractor
from diffbench.metrics.base import KEPT, Gaussian, ReferenceStatistics
from diffbench.metrics.extractors.base import VERSION
from diffbench.metrics.suite import reference_statistics

FORMAT = 1
BATCH = 256
"""Images that an extractor takes at once."""
BALANCED = 1.25
"""A data set is balanced whose largest class has at most so many times the images of its smallest."""


def run_extractor(
    config: RunConfig | AutoencoderConfig, data: ImageSet, device: torch.device | str = "cpu"
) -> Extractor:
    """Make the extractor that a run's config names, or else the one that suits its data set."""
    return make_extractor(suited_extractor(config), config.evaluate.weights, data, device)


def suited_extractor(config: RunConfig | AutoencoderConfig) -> str:
    """Name of the extractor that `run_extractor` makes."""
    suited = SOURCES[config.data.name].extractors
    return config.evaluate.extractor or next((name for name in suited if EXTRACTORS[name].installed()), suited[-1])


def extractor_request(data: ImageSet, weights: str | None) -> Request:
    """Request for an extractor of images like those of a data set, whose planted classes it need not know."""
    data = data.base or data
    return Request(
        data.shape,
        weights,
        training=(lambda: training_of(data)) if data.num_classes else None,
        classes=data.num_classes,
        cached=cached_network,
    )


def training_of(data: ImageSet) -> tuple[Tensor, Tensor, str]:
    return data.images, data.labels, data.fingerprint()


def make_extractor(name: str, weights: str | None, data: ImageSet, device: torch.device | str = "cpu") -> Extractor:
    """Make an extractor by name for images like those of a data set, on a device; a ValueError begins with the key."""
    return build_extractor(name, extractor_request(data, weights)).to(device)


def cached_network(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Weights of a small network, trained by `make` once and kept in the cache."""
    path = cache_folder() / f"{name}.safetensors"

    def train() -> None:
        print(f"training {name.rsplit('-', 2)[0]}, the feature extractor, once (kept in {path})", flush=True)
        tensors.write(path, make())

    return tensors.read(files.cached(path, train))[0]


@dataclass(frozen=True)
class Part:
    """Real images of a data set: which ones, and in what words.

    Attributes:
        split: "train" or "held-out".
        which: how they were chosen.
    """

    data: ImageSet
    split: str
    index: Tensor
    which: str

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> Tensor:
        return self.data.labels[self.index]

    def batches(self, size: int = BATCH) -> Iterator[Tensor]:
        """The images, (B, C, H, W) uint8."""
        for index in self.index.split(size):
            yield rows(self.data.images, index)


def class_counts(labels: Tensor, count: int) -> Tensor:
    """Number of images of each class among `count` samples, and among the real images that they are compared with.

    Evenly where the set is balanced and each class has enough images, else by the frequencies of the classes.

    Args:
        labels: (N,) of the set.
        count: images in all.

    Returns:
        (K,) numbers that sum to `count`; K is one more than the highest label.
    """
    present = labels.bincount(minlength=1)
    classes = present.nonzero()[:, 0]
    even = _rounded(torch.zeros_like(present).index_fill(0, classes, 1), count)
    balanced = len(classes) and present.max() <= BALANCED * present[classes].min()
    if balanced and (count > len(labels) or (even <= present).all()):
        return even
    return _rounded(present, count)


def _rounded(weights: Tensor, count: int) -> Tensor:
    total = int(weights.sum())
    whole, remainder = (weights * count).div(max(1, total), rounding_mode="floor"), (weights * count) % max(1, total)
    whole[remainder.argsort(descending=True, stable=True)[: count - int(whole.sum())]] += 1
    return whole


def sample_labels(train: ImageSet, count: int) -> Tensor:
    """(count,) labels of a run's samples, class by class, as many of each as of the real images compared with."""
    return torch.arange(max(1, train.num_classes)).repeat_interleave(_padded(class_counts(train.labels, count), train))


def _padded(counts: Tensor, data: ImageSet) -> Tensor:
    return torch.nn.functional.pad(counts, (0, max(1, data.num_classes) - len(counts)))


def spread_in_words(data: ImageSet, labels: Tensor) -> str:
    """Describe how labels are spread over the classes of a set, as "evenly over the classes"."""
    return _in_words(data, labels.bincount(minlength=1)) if data.num_classes else "none"


def _in_words(data: ImageSet, counts: Tensor) -> str:
    counts = _padded(counts, data)
    present = (data.labels.bincount(minlength=len(counts)) > 0).long()
    if torch.equal(counts, _rounded(present, int(counts.sum()))):
        return "evenly over the classes"
    listed = ", ".join(map(str, counts.tolist()))
    return f"of the classes {listed if len(counts) <= 20 else hashlib.sha256(listed.encode()).hexdigest()[:8]}"


def chosen(data: ImageSet, split: str, counts: Tensor) -> Part:
    """Choose the first images of each class, counts[c] of class c or as many as there are, class by class."""
    index = [(data.labels == c).nonzero()[:, 0][:n] for c, n in enumerate(counts.tolist()) if n]
    found = torch.cat(index) if index else torch.zeros(0).long()
    which = f"the first {len(found)}, {_in_words(data, data.labels[found].bincount(minlength=1))}"
    return Part(data, split, found, which)


def first(data: ImageSet, split: str, count: int) -> Part:
    """Choose the first `count` images, spread over the classes as `class_counts` says."""
    return chosen(data, split, class_counts(data.labels, count))


def others(part: Part) -> Part:
    """Choose images of the same split outside a part, as many of each class, or as many as there are."""
    left = torch.ones(len(part.data), dtype=torch.bool)
    left[part.index] = False
    number = left.nonzero()[:, 0]
    counts = part.labels.bincount(minlength=1)
    index = [number[part.data.labels[number] == c][:n] for c, n in enumerate(counts.tolist())]
    found = torch.cat(index)
    return Part(part.data, part.split, found, f"{len(found)} outside {part.which}")


def everything(data: ImageSet, split: str) -> Part:
    return Part(data, split, torch.arange(len(data)), "all")


def statistics_of(extractor: Extractor, part: Part, keep: int = KEPT) -> tuple[ReferenceStatistics, str]:
    """Statistics of a part of a data set and the digest of their key; from the cache, or computed once and kept."""
    source = {
        "data": part.data.fingerprint(),
        "split": part.split,
        "which": part.which,
        "size": list(part.data.images.shape[1:]),
    }
    return cached_statistics(extractor, source, len(part), part.batches, keep)


def cached_statistics(
    extractor: Extractor, source: dict[str, Any], count: int, batches: Callable[[], Iterator[Tensor]], keep: int = KEPT
) -> tuple[ReferenceStatistics, str]:
    """Statistics of images that `source` identifies, and the digest of their key.

    Args:
        source: what identifies the images.
        count: how many they are.
        batches: reads them, (B, C, H, W) uint8.
        keep: how many feature vectors stay.

    Raises:
        UserError: if the cached file is damaged.
    """
    keep = min(count, keep)
    key = {
        "format": FORMAT,
        "version": VERSION,
        "extractor": extractor.name,
        "weights": extractor.weights,
        **source,
        "count": count,
        "rows": keep,
    }
    path = reference_folder() / f"{extractor.name}-{count}-{digest(key)[:16]}.safetensors"
    files.cached(path, lambda: write(path, key, _computed(extractor, count, batches, keep, path)))
    _, reference = read(path)
    return reference, digest(key)[:16]


def _computed(
    extractor: Extractor, count: int, batches: Callable[[], Iterator[Tensor]], keep: int, path: Path
) -> ReferenceStatistics:
    if count < 2:
        raise UserError(f"statistics of real images need at least 2 of them, got {count}")

    def watched() -> Iterator[Tensor]:
        if sum(p.numel() for p in extractor.network.parameters()) < 1_000_000:  # takes no time to speak of
            yield from batches()
            return
        print(f"{extractor.name} reads {count:,} real images, once (kept in {path})", flush=True)
        with progress("real images", count) as advance:
            for batch in batches():
                yield batch
                advance(len(batch))

    return reference_statistics(extractor, watched(), count, keep)


def reference_folder() -> Path:
    return cache_folder() / "references"


def write(path: Path, key: dict[str, Any], reference: ReferenceStatistics) -> None:
    """Write statistics with their key."""
    held = {"mean": reference.fit.mean, "cov": reference.fit.cov, "rows": reference.rows}
    if reference.spatial is not None:
        held |= {"spatial_mean": reference.spatial.mean, "spatial_cov": reference.spatial.cov}
    tensors.write(path, held, {"key": json.dumps(key)})


def read(path: Path) -> tuple[dict[str, Any], ReferenceStatistics]:
    """The key and the statistics of a file that `write` wrote; UserError for any other file."""
    held, metadata = tensors.read(path)
    try:
        key: dict[str, Any] = json.loads(metadata["key"])
        fit = Gaussian(int(key["count"]), held["mean"], held["cov"])
        spatial = Gaussian(fit.n, held["spatial_mean"], held["spatial_cov"]) if "spatial_mean" in held else None
        return key, ReferenceStatistics(fit, held["rows"], spatial)
    except (KeyError, ValueError) as e:
        raise UserError(f"{path}: holds no statistics of real images ({e}); remove the file") from None
