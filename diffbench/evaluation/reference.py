"""Reference statistics of real images, and the choice of images that they are computed from.

Statistics are computed once and cached. The name of a cached file contains a hash of its key, which lists everything
that the statistics depend on. A damaged file is an error.
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
from diffbench.data.sets import ImageSet, take_rows
from diffbench.metrics import EXTRACTORS, Extractor, Request
from diffbench.metrics import extractor as build_extractor
from diffbench.metrics.base import KEPT, Gaussian, ReferenceStatistics
from diffbench.metrics.extractors.base import VERSION
from diffbench.metrics.suite import reference_statistics

FORMAT = 1
BATCH = 256
"""Batch size of extractors."""
BALANCED = 1.25
"""Largest ratio between the sizes of the largest and the smallest class of a data set that counts as balanced."""


def run_extractor(
    config: RunConfig | AutoencoderConfig, data: ImageSet, device: torch.device | str = "cpu"
) -> Extractor:
    """Make the extractor that a run's config names, or the one that suits its data set if it names none."""
    return make_extractor(suited_extractor(config), config.evaluate.weights, data, device)


def suited_extractor(config: RunConfig | AutoencoderConfig) -> str:
    """Return the name of the extractor that `run_extractor` makes."""
    suited = SOURCES[config.data.name].extractors
    return config.evaluate.extractor or next((name for name in suited if EXTRACTORS[name].installed()), suited[-1])


def extractor_request(data: ImageSet, weights: str | None) -> Request:
    """Return the request for an extractor that suits a data set's images, ignoring any planted classes."""
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
    """Make an extractor by name for a data set's images, on a device; any ValueError begins with the key."""
    return build_extractor(name, extractor_request(data, weights)).to(device)


def cached_network(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the weights of a small network, trained by `make` on first use and cached."""
    path = cache_folder() / f"{name}.safetensors"

    def train() -> None:
        print(f"training {name.rsplit('-', 2)[0]}, the feature extractor, once (cached in {path})", flush=True)
        tensors.write(path, make())

    return tensors.read(files.cached(path, train))[0]


@dataclass(frozen=True)
class Part:
    """A selection of a data set's real images, with its description.

    Attributes:
        split: "train" or "held-out".
        index: numbers of the images in the data set.
        which: how they were chosen, in words.
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
        """Yield the images in batches (B, C, H, W) uint8."""
        for index in self.index.split(size):
            yield take_rows(self.data.images, index)


def class_counts(labels: Tensor, count: int) -> Tensor:
    """Return the number of images per class, both of `count` samples and of the real images to compare them with.

    Equal numbers if the set is balanced and every class has enough images, or `count` exceeds the size of the set; in
    proportion to the class frequencies otherwise.

    Args:
        labels: (N,) labels of the set.
        count: total number of images.

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
    """Return labels (count,) of a run's samples, sorted by class, with the class counts of `class_counts`."""
    return torch.arange(max(1, train.num_classes)).repeat_interleave(_padded(class_counts(train.labels, count), train))


def _padded(counts: Tensor, data: ImageSet) -> Tensor:
    return torch.nn.functional.pad(counts, (0, max(1, data.num_classes) - len(counts)))


def describe_class_spread(data: ImageSet, labels: Tensor) -> str:
    """Describe how labels are spread over the classes of a set, for example "evenly over the classes"."""
    return _in_words(data, labels.bincount(minlength=1)) if data.num_classes else "none"


def _in_words(data: ImageSet, counts: Tensor) -> str:
    counts = _padded(counts, data)
    present = (data.labels.bincount(minlength=len(counts)) > 0).long()
    if torch.equal(counts, _rounded(present, int(counts.sum()))):
        return "evenly over the classes"
    listed = ", ".join(map(str, counts.tolist()))
    return f"of the classes {listed if len(counts) <= 20 else hashlib.sha256(listed.encode()).hexdigest()[:8]}"


def choose_per_class(data: ImageSet, split: str, counts: Tensor) -> Part:
    """Choose the first counts[c] images of each class c, or all of them if there are fewer, sorted by class."""
    per_class = [(data.labels == c).nonzero()[:, 0][:n] for c, n in enumerate(counts.tolist()) if n]
    index = torch.cat(per_class) if per_class else torch.zeros(0).long()
    which = f"the first {len(index)}, {_in_words(data, data.labels[index].bincount(minlength=1))}"
    return Part(data, split, index, which)


def choose_first(data: ImageSet, split: str, count: int) -> Part:
    """Choose the first `count` images, spread over the classes by `class_counts`."""
    return choose_per_class(data, split, class_counts(data.labels, count))


def choose_others(part: Part) -> Part:
    """Choose images of the same split outside a part, as many of each class as in the part, or all that are left."""
    left = torch.ones(len(part.data), dtype=torch.bool)
    left[part.index] = False
    number = left.nonzero()[:, 0]
    counts = part.labels.bincount(minlength=1)
    per_class = [number[part.data.labels[number] == c][:n] for c, n in enumerate(counts.tolist())]
    index = torch.cat(per_class)
    return Part(part.data, part.split, index, f"{len(index)} outside {part.which}")


def choose_all(data: ImageSet, split: str) -> Part:
    return Part(data, split, torch.arange(len(data)), "all")


def statistics_of(extractor: Extractor, part: Part, keep: int = KEPT) -> tuple[ReferenceStatistics, str]:
    """Return the statistics of a part of a data set and the digest of their key, computed on first use and cached."""
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
    """Return the statistics of images that `source` identifies, cached, and the digest of their key.

    Args:
        source: plain values that identify the images.
        count: number of images.
        batches: yields them, (B, C, H, W) uint8.
        keep: number of feature vectors to keep.

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
        raise UserError(f"statistics need at least 2 real images, got {count}")

    def watched() -> Iterator[Tensor]:
        if sum(p.numel() for p in extractor.network.parameters()) < 1_000_000:  # too fast to need progress
            yield from batches()
            return
        print(f"{extractor.name} reads {count:,} real images, once (cached in {path})", flush=True)
        with progress("real images", count) as advance:
            for batch in batches():
                yield batch
                advance(len(batch))

    return reference_statistics(extractor, watched(), count, keep)


def reference_folder() -> Path:
    return cache_folder() / "references"


def write(path: Path, key: dict[str, Any], reference: ReferenceStatistics) -> None:
    """Write statistics with their key."""
    arrays = {"mean": reference.fit.mean, "cov": reference.fit.cov, "rows": reference.rows}
    if reference.spatial is not None:
        arrays |= {"spatial_mean": reference.spatial.mean, "spatial_cov": reference.spatial.cov}
    tensors.write(path, arrays, {"key": json.dumps(key)})


def read(path: Path) -> tuple[dict[str, Any], ReferenceStatistics]:
    """Read the key and the statistics from a file of `write`; raise UserError for any other file."""
    arrays, metadata = tensors.read(path)
    try:
        key: dict[str, Any] = json.loads(metadata["key"])
        fit = Gaussian(int(key["count"]), arrays["mean"], arrays["cov"])
        spatial = Gaussian(fit.n, arrays["spatial_mean"], arrays["spatial_cov"]) if "spatial_mean" in arrays else None
        return key, ReferenceStatistics(fit, arrays["rows"], spatial)
    except (KeyError, ValueError) as e:
        raise UserError(f"{path}: contains no statistics of real images ({e}); remove the file") from None
