"""Growth of time and memory with resolution, batch, depth, width, number of samples, and number of runs in a report."""

import contextlib
import io
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from benchmarks.config import BenchConfig, Row, shared
from benchmarks.networks import Subject, Variant, run_config
from benchmarks.timing import Work, slope, time_alternately
from diffbench.commands.compare import compare
from diffbench.commands.evaluate import score
from diffbench.runs.lifecycle import train
from diffbench.sampling.sampler import Sampler

_PATCHES = "denoiser.hidden_size=192 denoiser.depth=4 denoiser.num_heads=4 trainer.batch_size=2"
_IMAGE = "denoiser.channels=[32,64] denoiser.blocks=[1,1] denoiser.window=8 trainer.batch_size=2"


@dataclass(frozen=True)
class Curve:
    """A workload at several sizes: a training step of `model`, or without a model, sampling or a report."""

    name: str
    axis: str
    sizes: tuple[int, ...]
    model: str = ""
    common: str = ""
    change: str = ""
    """Override that sets the size, with {} as placeholder."""


CURVES = (
    Curve("DiT, full attention", "area", (16, 32, 64, 128), "DiT-S/2", _PATCHES, "data.image_size={}"),
    Curve("DiffiT, windows of 8", "area", (32, 64, 128, 256), "DiffiT-CIFAR10-I1", _IMAGE, "data.image_size={}"),
    Curve("DiT", "batch", (2, 4, 8, 16, 32), "DiT-S/2", _PATCHES, "trainer.batch_size={}"),
    Curve("DiT", "depth", (2, 4, 8, 16), "DiT-S/2", _PATCHES, "denoiser.depth={}"),
    Curve("DiT", "width", (96, 192, 384, 768), "DiT-S/2", _PATCHES, "denoiser.hidden_size={}"),
    Curve("sampling", "samples", (64, 128, 256, 512, 1024)),
    Curve("compare", "runs", (10, 20, 40, 80)),
)
TINY_SIZES = {"area": (8, 16), "batch": (1, 2), "depth": (1, 2), "width": (32, 64), "samples": (8, 16), "runs": (4, 6)}


def measure(config: BenchConfig, device: torch.device, deadline: float) -> Iterator[Row]:
    """Yield a row for each size of each curve, then one with its slopes over the larger half of the sizes."""
    for curve, until in shared(CURVES, deadline):
        named: Row = {"part": "growth", "name": curve.name, "variant": curve.axis}
        if until is None:
            yield named | {"skipped": "the time is up"}
            continue
        rows = []
        for size in TINY_SIZES[curve.axis] if config.tiny else curve.sizes:
            work = _work(config, curve, device, size)
            time_alternately([work], device, 1 if config.tiny else 3, once=config.tiny)
            value = size * size if curve.axis == "area" else size
            rows.append(named | {"size": value} | work.ms() | {"memory_bytes": work.memory})
        yield from rows
        large = rows[len(rows) // 2 - 1 :]
        sizes, memory = [row["size"] for row in large], [row["memory_bytes"] for row in large]
        slopes = slope(sizes, [row["ms"] for row in large]), slope(sizes, memory) if min(memory) > 0 else None
        yield named | dict(zip(("time_slope", "memory_slope"), slopes, strict=True))


def _work(config: BenchConfig, curve: Curve, device: torch.device, size: int) -> Work:
    if curve.axis == "runs":
        return _report(size)
    if curve.model:
        overrides = ("trainer.batch_size=2" if config.tiny else curve.common, curve.change.format(size))
        changed = run_config(replace(config, batch=None), curve.model, device.type, " ".join(overrides).split())
        subject = Subject(changed, Variant(), device)
        return Work("train", subject.train, subject.ready)
    digits = run_config(config, "experiments/digits/dit.yaml", device.type)
    subject = Subject(digits, Variant(), device)
    settings = replace(digits.sample.unguided(), steps="5", batch_size=64)
    sampler = Sampler(subject.network, subject.process, subject.run.shape)
    return Work("samples", lambda: sampler(torch.zeros(size, dtype=torch.int64), settings))


def _report(count: int) -> Work:
    """Return the workload of a report on `count` runs, two variants with several seeds: copies of one smoke run."""
    base, folder = _smoke_run(), Path(_home().name, str(count))
    saved = (base / "config.yaml").read_text()
    runs = [folder / f"{'ab'[i % 2]}-s{i // 2}" for i in range(count)]
    for i, run in enumerate(runs):
        shutil.copytree(base, run, dirs_exist_ok=True)
        text = saved.replace("\nseed: 0\n", f"\nseed: {i // 2}\n")
        (run / "config.yaml").write_text(text.replace("  lr: 0.002\n", "  lr: 0.001\n") if i % 2 else text)
    args = [*map(str, runs), f"out={folder / 'report'}"]

    def work() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            compare(args)

    return Work("compare", work)


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder that exists until the process ends."""
    return tempfile.TemporaryDirectory()


@cache
def _smoke_run() -> Path:
    threads = torch.get_num_threads()
    with contextlib.redirect_stdout(io.StringIO()):
        run = train("experiments/digits/dit.yaml", ["debug=smoke", f"runs_dir={_home().name}"])
        score(run)
    torch.set_num_threads(threads)  # undo what the run has set
    return run.folder
