"""Extractors made ready, and statistics of real images cached on disk under a key of all that they depend on."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from diffbench.core import tensors as sealed
from diffbench.core.errors import UserError
from diffbench.core.files import cache_folder, locked, write_bytes
from diffbench.core.progress import progress
from diffbench.data.sets import ImageSet, balanced, rows
from diffbench.metrics import Extractor, Request
from diffbench.metrics import extractor as build_extractor
from diffbench.metrics.extractors.base import VERSION, check
from diffbench.metrics.functional import Gaussian
from diffbench.metrics.suite import KEPT, Reference, statistics

FORMAT = 1
BATCH = 256
"""Pictures that an extractor takes at once."""


def request(data: ImageSet, weights: str | None) -> Request:
    """What an extractor may ask when it is to look at pictures like those of a data set."""
    channels, height, width = data.images.shape[1:]
    return Request(
        (channels, height, width),
        weights,
        training=(lambda: (data.images, data.labels)) if data.num_classes == 10 else None,
        training_id=data.fingerprint(),
        cached=_cached,
    )


def named(name: str | None, data: ImageSet) -> str:
    """The extractor's name, or the one that suits the pictures where none is given."""
    return name or ("digits-cnn" if data.name == "digits" else "efficientnet-lite0")


def check_extractor(name: str | None, weights: str | None, data: ImageSet) -> None:
    """Whether an extractor can be made here, before anything else takes time.

    Raises:
        ValueError: one line that begins with the key.
    """
    check(named(name, data), request(data, weights))


def judge(name: str | None, weights: str | None, data: ImageSet, device: torch.device | str = "cpu") -> Extractor:
    """The extractor of a name for pictures like those of a data set, on a device."""
    return build_extractor(named(name, data), request(data, weights)).to(device)


def _cached(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    path = cache_folder() / f"{name}.safetensors"
    if not path.exists():
        with locked(path.parent, wait=True, name=f".{name}.lock"):
            if not path.exists():
                print(f"training {name.rsplit('-', 2)[0]}, the judge of the samples, once (kept in {path})", flush=True)
                sealed.write(path, make())
    return sealed.read(path)[0]


@dataclass(frozen=True)
class Part:
    """Real images of a data set: which ones, and in what words.

    Attributes:
        data: the set.
        split: "train" or "held-out".
        index: numbers of the images.
        which: how they were chosen.
    """

    data: ImageSet
    split: str
    index: Tensor
    which: str

    def __len__(self) -> int:
        return len(self.index)

    def batches(self, size: int = BATCH) -> Iterator[Tensor]:
        """The images, (B, C, H, W) uint8."""
        for index in self.index.split(size):
            yield rows(self.data.images, index)


def first(data: ImageSet, split: str, count: int) -> Part:
    """The first `count` images, spread evenly over the classes, or as many as there are."""
    return Part(data, split, balanced(data.labels, count), f"the first {count}, evenly over the classes")


def others(part: Part, count: int) -> Part:
    """`count` images of the same split outside a part, evenly over the classes, or as many as there are."""
    left = torch.ones(len(part.data), dtype=torch.bool)
    left[part.index] = False
    index = left.nonzero()[:, 0]
    index = index[balanced(part.data.labels[index], count)] if len(index) else index
    return Part(part.data, part.split, index, f"{count} outside {part.which}")


def everything(data: ImageSet, split: str) -> Part:
    """All images of a split."""
    return Part(data, split, torch.arange(len(data)), "all")


def key_of(extractor: Extractor, source: dict[str, Any], count: int, keep: int) -> dict[str, Any]:
    """All that statistics depend on: the pictures, the extractor with its way of resizing, and the code's version."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "extractor": extractor.name,
        "weights": extractor.weights,
        **source,
        "count": count,
        "rows": keep,
    }


def digest(key: dict[str, Any]) -> str:
    """The first 16 hexadecimal digits of a key's hash."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def of_part(extractor: Extractor, part: Part, keep: int = KEPT) -> tuple[Reference, str]:
    """Statistics of a part of a data set and the digest of their key; from the cache, or computed once and kept."""
    source = {
        "data": part.data.fingerprint(),
        "split": part.split,
        "which": part.which,
        "size": list(part.data.images.shape[1:]),
    }
    return cached(extractor, source, len(part), part.batches, keep)


def cached(
    extractor: Extractor, source: dict[str, Any], count: int, batches: Callable[[], Iterator[Tensor]], keep: int = KEPT
) -> tuple[Reference, str]:
    """Statistics of pictures that `source` identifies, and the digest of their key.

    Args:
        extractor: whose features.
        source: what identifies the pictures.
        count: how many they are.
        batches: reads them, (B, C, H, W) uint8.
        keep: how many feature vectors stay.

    Raises:
        UserError: if the cached file is damaged, or is of something else.
    """
    keep = min(count, keep)
    key = key_of(extractor, source, count, keep)
    path = reference_folder() / f"{extractor.name}-{count}-{digest(key)}.safetensors"
    if not path.exists():
        with locked(path.parent, wait=True, name=f".{path.name}.lock"):
            if not path.exists():
                write(path, key, _computed(extractor, count, batches, keep, path))
    found, reference = read(path)
    if found != key:
        wrong = next(k for k in key if found.get(k) != key[k])
        raise UserError(f"{path}: {wrong} is {found.get(wrong)!r}, not {key[wrong]!r}; remove the file")
    return reference, digest(key)


def _computed(
    extractor: Extractor, count: int, batches: Callable[[], Iterator[Tensor]], keep: int, path: Path
) -> Reference:
    if count < 2:
        raise UserError(f"statistics of real images need at least 2 of them, got {count}")

    def watched() -> Iterator[Tensor]:
        if sum(p.numel() for p in extractor.network.parameters()) < 1_000_000:  # done before it is said
            yield from batches()
            return
        print(f"{extractor.name} looks at {count:,} real images, once (kept in {path})", flush=True)
        with progress("real images", count) as advance:
            for batch in batches():
                yield batch
                advance(len(batch))

    return statistics(extractor, watched(), count, keep)


def reference_folder() -> Path:
    """Where statistics are kept."""
    return cache_folder() / "references"


def write(path: Path, key: dict[str, Any], reference: Reference) -> None:
    """Writes statistics with their key, and a hash of both."""
    tensors = {"mean": reference.fit.mean, "cov": reference.fit.cov, "rows": reference.rows}
    if reference.spatial is not None:
        tensors |= {"spatial_mean": reference.spatial.mean, "spatial_cov": reference.spatial.cov}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_bytes(path, save(tensors, {"key": json.dumps(key), "sha256": _content(key, tensors)}))


def read(path: Path) -> tuple[dict[str, Any], Reference]:
    """The key and the statistics of a file that `write` wrote.

    Raises:
        UserError: if it is something else, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
        key: dict[str, Any] = json.loads(metadata["key"])
        count, rows = int(key["count"]), tensors["rows"]
    except (SafetensorError, OSError, KeyError, ValueError) as e:
        raise UserError(f"{path}: holds no statistics of real images ({e}); remove the file") from None
    if metadata.get("sha256") != _content(key, tensors):
        raise UserError(f"{path}: damaged (its hash differs); remove the file")
    spatial = None
    if "spatial_mean" in tensors:
        spatial = Gaussian(count, tensors["spatial_mean"], tensors["spatial_cov"])
    return key, Reference(Gaussian(count, tensors["mean"], tensors["cov"]), rows, spatial)


def _content(key: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    hashed = hashlib.sha256(json.dumps(key, sort_keys=True).encode())
    for name in sorted(tensors):
        hashed.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        hashed.update(tensors[name].numpy().tobytes())
    return hashed.hexdigest()
