"""How time and memory grow with resolution, batch, depth, width and the number of samples."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.cases import Variant, run_config
from benchmarks.clock import Work, in_turns
from benchmarks.figures import slope, spread
from benchmarks.settings import BenchConfig
from benchmarks.subject import Subject
from diffbench.core import rng
from diffbench.metrics.frechet import Moments, frechet
from diffbench.sampling.sampler import Sampler

Row = dict[str, Any]

_PATCHES = "denoiser.hidden_size=192 denoiser.depth=4 denoiser.num_heads=4 trainer.batch_size=2"
_IMAGE = "denoiser.channels=[32,64] denoiser.blocks=[1,1] denoiser.window=8 trainer.batch_size=2"


@dataclass(frozen=True)
class Curve:
    """One training step at several sizes."""

    name: str
    axis: str
    model: str
    common: str
    change: str
    """The override that sets the size, with {} in its place."""
    sizes: tuple[int, ...]
    size_of: Callable[[int], int] = lambda size: size
    """What is called the size: an image's area for its side."""


def _area(side: int) -> int:
    return side * side


CURVES = (
    Curve("DiT, full attention", "area", "DiT-S/2", _PATCHES, "data.image_size={}", (16, 32, 64, 128), _area),
    Curve("DiffiT, windows of 8", "area", "DiffiT-CIFAR10-I1", _IMAGE, "data.image_size={}", (32, 64, 128, 256), _area),
    Curve("DiT", "batch", "DiT-S/2", _PATCHES, "trainer.batch_size={}", (2, 4, 8, 16, 32)),
    Curve("DiT", "depth", "DiT-S/2", _PATCHES, "denoiser.depth={}", (2, 4, 8, 16)),
    Curve("DiT", "width", "DiT-S/2", _PATCHES, "denoiser.hidden_size={}", (96, 192, 384, 768)),
)
TINY_SIZES = {"area": (8, 16), "batch": (1, 2), "depth": (1, 2), "width": (32, 64), "samples": (8, 16)}
SAMPLES = (64, 128, 256, 512, 1024)


def measure(config: BenchConfig, device: torch.device, deadline: float) -> Iterator[Row]:
    """A row for each size of each curve, then a row with its slope over the larger half of the sizes."""
    for curve in CURVES:
        if time.monotonic() > deadline:
            yield {"part": "growth", "name": curve.name, "variant": curve.axis, "skipped": "the time is up"}
            continue
        rows = list(_curve(config, curve, device))
        yield from rows
        yield _slopes(rows)
    for name, works in (("sampling", _sampling), ("Fréchet distance", _distance)):
        sizes = TINY_SIZES["samples"] if config.tiny else SAMPLES
        found = in_turns([works(config, device, n) for n in sizes], device, 1 if config.tiny else 3, once=config.tiny)
        rows = [_row(name, "samples", n, work) for n, work in zip(sizes, found, strict=True)]
        yield from rows
        yield _slopes(rows)


def _curve(config: BenchConfig, curve: Curve, device: torch.device) -> Iterator[Row]:
    sizes = TINY_SIZES[curve.axis] if config.tiny else curve.sizes
    common = "trainer.batch_size=2" if config.tiny else curve.common
    for size in sizes:
        overrides = (*common.split(), curve.change.format(size))
        subject = Subject(
            run_config(replace(config, batch=None), curve.model, device.type, overrides), Variant(), device
        )
        work = Work("train", subject.train, subject.ready)
        in_turns([work], device, 1 if config.tiny else 3, once=config.tiny)
        yield _row(curve.name, curve.axis, curve.size_of(size), work)


def _sampling(config: BenchConfig, device: torch.device, count: int) -> Work:
    """A small network draws that many samples in batches of 64."""
    digits = run_config(config, "experiments/digits/dit.yaml", device.type)
    subject = Subject(digits, Variant(), device)
    settings = replace(digits.sample.unguided(), steps="5", batch_size=64)
    labels = torch.zeros(count, dtype=torch.int64)
    sampler = Sampler(subject.network, subject.process, subject.run.shape)
    return Work("samples", lambda: sampler(labels, settings))


def _distance(config: BenchConfig, device: torch.device, count: int) -> Work:
    """The Fréchet distance of that many feature vectors."""
    features = rng.normal(rng.key("bench", "features"), torch.arange(count, device=device), (128,))

    def distance() -> None:
        moments = Moments(128).to(device)
        for part in features.split(64):
            moments.update(part)
        fit = moments.gaussian()
        frechet(fit, fit)

    return Work("distance", distance)


def _row(name: str, axis: str, size: int, work: Work) -> Row:
    ms = spread(work.times).scaled(1e3)
    row: Row = {"part": "growth", "name": name, "variant": axis, "size": size, "ms": ms.median, "ms_low": ms.low}
    return row | {"ms_high": ms.high, "memory_bytes": work.memory}


def _slopes(rows: list[Row]) -> Row:
    last = rows[len(rows) // 2 - 1 :]
    sizes = [row["size"] for row in last]
    memory = [row["memory_bytes"] for row in last]
    fitted = slope(sizes, memory) if all(memory) and min(memory) > 0 else None
    found: Row = {name: rows[0][name] for name in ("part", "name", "variant")}
    return found | {"time_slope": slope(sizes, [row["ms"] for row in last]), "memory_slope": fitted}
