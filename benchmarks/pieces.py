"""The parts around a network, each alone: data, latents, averages, distances, imports, and the first step."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Variant, run_config
from benchmarks.clock import Work, in_turns
from benchmarks.figures import spread
from benchmarks.settings import BenchConfig
from benchmarks.subject import Subject
from diffbench.core import rng
from diffbench.data.datamodule import ImageDataModule, LatentDataModule, PositionDataModule
from diffbench.data.latents import LatentSet
from diffbench.data.sets import ImageSet
from diffbench.metrics.extractors.digits_cnn import DigitsCNN
from diffbench.metrics.extractors.inception import Inception
from diffbench.metrics.frechet import Moments, frechet

BATCH = 128
PACKAGES = ("diffbench.cli", "diffbench.config.load", "diffbench.training.trainer")
"""What is imported in a fresh process: the command line, a config, training."""

Row = dict[str, Any]


def measure(config: BenchConfig, device: torch.device, deadline: float) -> Iterator[Row]:
    """Rows of all pieces."""
    for piece in PIECES:
        if time.monotonic() > deadline:
            yield {"part": "pieces", "name": piece.__name__, "skipped": "the time is up"}
            continue
        for row in piece(config, device):
            yield {"part": "pieces"} | row


def data(config: BenchConfig, device: torch.device) -> Iterator[Row]:
    """The loader and what becomes of its batches on the device, in images a second: CIFAR-10's shape, and latents."""
    count, position = (1_000, torch.arange(1_000)) if config.tiny else (20_000, torch.arange(20_000))
    pixels = rng.words(rng.key("bench", "pixels"), position, 3 * 32 * 32).to(torch.uint8).view(count, 3, 32, 32)
    images = ImageSet(pixels, position % 10, 10)
    small = position[: count // 4]
    mean, spread_of = (rng.normal(rng.key("bench", n), small, (4, 32, 32)).half() for n in ("mean", "spread"))
    latents = LatentSet(mean, spread_of, small % 10, 10)
    mirrored = LatentSet(mean, spread_of, small % 10, 10, flipped=latents)
    for name, kind, flip, part in (
        ("images 3x32x32", ImageDataModule, False, images),
        ("images 3x32x32, flips", ImageDataModule, True, images),
        ("latents 4x32x32", LatentDataModule, False, latents),
        ("latents 4x32x32, flips", LatentDataModule, True, mirrored),
    ):
        module = kind(part, part, 0, BATCH, flip=flip, data_on_device=False)
        yield _row(name, _loading(module, device), config, device, BATCH)


def _loading(module: PositionDataModule, device: torch.device) -> Callable[[], Any]:
    batches = iter(module.train_dataloader())

    def one() -> dict[str, Any]:
        batch = next(batches)
        on = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return module.on_after_batch_transfer(on, 0)

    return one


def averages(config: BenchConfig, device: torch.device) -> Iterator[Row]:
    """An update of the average of a network's weights."""
    model = "DiT-XL/2" if device.type == "cuda" else "DiT-S/2"
    subject = Subject(run_config(config, model, device.type), Variant(), device)
    row = _row(f"average of {model}", subject.ema.update, config, device)
    moved = 3 * sum(p.nbytes for p in subject.network.parameters())
    yield row | {"bytes_per_s": moved / row["ms"] * 1e3}


def distances(config: BenchConfig, device: torch.device) -> Iterator[Row]:
    """A Fréchet distance: features and statistics of 1,000 images, and the distance itself, once."""
    networks: list[tuple[str, nn.Module, Callable[[nn.Module, Tensor], Tensor], tuple[int, ...], int]] = [
        ("digits-cnn", DigitsCNN(), lambda net, x: net.features(x), (1, 8, 8), 1_000)  # type: ignore[operator]
    ]
    if (config.full or config.gpu) and not config.tiny:
        shown = 1_000 if device.type == "cuda" else 50
        networks.append(("inception", Inception(), lambda net, x: net(x).pooled, (3, 299, 299), shown))
    for name, network, features, shape, count in networks:
        network.eval().requires_grad_(False).to(device)
        position = torch.arange(min(count, 250), device=device)
        x = rng.words(rng.key("bench", name), position, shape[0] * shape[1] * shape[2]).float()
        x = x.remainder(256).view(-1, *shape)
        found = torch.inference_mode()(features)(network, x)
        repeated = found.repeat(1_000 // len(found), 1)
        repeated += rng.normal(rng.key("bench", "features"), torch.arange(len(repeated)), found.shape[1:]).to(found)
        extract = partial(torch.inference_mode()(features), network, x)
        row = _row(f"features, {name}, 1,000 images", extract, config, device)
        yield _times(row, 1_000 / len(x))
        moments = Moments(found.shape[1]).to(device)
        name = f"statistics, {found.shape[1]} features, 1,000 images"
        yield _row(name, partial(moments.update, repeated), config, device)
        fit = moments.gaussian()
        yield _row(f"distance, {found.shape[1]} features", partial(frechet, fit, fit), config, device)


def imports(config: BenchConfig, device: torch.device) -> Iterator[Row]:
    """Seconds of an import in a fresh process, the interpreter's own start left out."""
    for package in PACKAGES:
        code = f"import time; t = time.perf_counter(); import {package}; print(time.perf_counter() - t)"
        times = [float(_fresh(code)) for _ in range(3 if config.full else 1)]
        yield {"name": f"import {package}", "work": "import"} | _ms(times)


def first_step(config: BenchConfig, device: torch.device) -> Iterator[Row]:
    """Seconds from a process's start to the end of its first training step, eager."""
    for model in ("DiT-S/2",) if device.type == "cpu" else ("DiT-S/2", "DiT-XL/2"):
        code = (
            "import json, sys, time\n"
            "from benchmarks.pieces import one_step\n"
            "one_step(*json.loads(sys.argv[1]))\n"
            "print(time.time() - float(sys.argv[2]))\n"
        )
        started = str(time.time())
        taken = float(_fresh(code, json.dumps([model, device.type, config.tiny]), started))
        yield {"name": f"first step, {model}", "work": "first step"} | _ms([taken])


def one_step(model: str, device: str, tiny: bool) -> None:
    """Trains one step and waits for it."""
    from benchmarks.clock import synchronize

    where = torch.device(device)
    Subject(run_config(BenchConfig(tiny=tiny), model, device), Variant(), where).train()
    synchronize(where)


def _fresh(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def _row(
    name: str, call: Callable[[], Any], config: BenchConfig, device: torch.device, images: int | None = None
) -> Row:
    (work,) = in_turns([Work(name, call)], device, config.rounds, once=config.tiny)
    row: Row = {"name": name, "work": "piece"} | _ms(work.times)
    return row if images is None else row | {"batch": images, "images_per_s": images / row["ms"] * 1e3}


def _ms(times: list[float]) -> Row:
    ms = spread(times).scaled(1e3)
    return {"ms": ms.median, "ms_low": ms.low, "ms_high": ms.high, "rounds": ms.n}


def _times(row: Row, factor: float) -> Row:
    return {k: v * factor if k.startswith("ms") else v for k, v in row.items()}


PIECES = (data, averages, distances, imports, first_step)
