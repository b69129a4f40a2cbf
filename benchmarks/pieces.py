"""The data pipeline without a network, and the whole sampler."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.config import BenchConfig, Row, shared
from benchmarks.networks import PRECISION, Subject, Variant, run_config
from benchmarks.steps import Products, against
from benchmarks.timing import Work, synchronize, time_alternately
from diffbench.config.sections import SampleConfig
from diffbench.core import rng
from diffbench.data.datamodule import ImageDataModule, LatentDataModule, PositionDataModule
from diffbench.data.latents import LatentSet
from diffbench.data.sets import ImageSet
from diffbench.runs import build
from diffbench.sampling.cost import network_evaluations
from diffbench.sampling.sampler import Sampler

BATCH = 128
PLAN = {"cpu": ("DiT-S/2", 8, 10), "cuda": ("DiT-XL/2", 256, 250), "tiny": ("DiT-S/2", 4, 2)}
"""Network, number of images and number of steps for the `sampling` part."""
GUIDANCE = 1.5


def data(config: BenchConfig, device: torch.device, deadline: float) -> Iterator[Row]:
    """Yield images per second of the loader, including on-device processing: CIFAR-10-sized images, and latents."""
    count = 1_000 if config.tiny else 20_000
    position = torch.arange(count)
    pixels = rng.words(rng.key("bench", "pixels"), position, 3 * 32 * 32).to(torch.uint8).view(count, 3, 32, 32)
    images, some = ImageSet(pixels, position % 10, 10), position[: count // 4]
    mean, log_variance = (rng.normal(rng.key("bench", n), some, (4, 32, 32)).half() for n in ("mean", "log_variance"))
    latents = LatentSet(mean, log_variance, some % 10, 10)
    flipped = replace(latents, flipped_mean=mean, flipped_log_variance=log_variance)
    sets: list[tuple[str, type[PositionDataModule], Any, bool]] = [
        ("images 3x32x32", ImageDataModule, images, False),
        ("images 3x32x32, flips", ImageDataModule, images, True),
        ("latents 4x32x32", LatentDataModule, latents, False),
        ("latents 4x32x32, flips", LatentDataModule, flipped, True),
    ]
    for (name, kind, part, flip), until in shared(sets, deadline):
        row: Row = {"part": "data", "name": name}
        if until is None:
            yield row | {"skipped": "the time is up"}
            continue
        module = kind(part, part, BATCH, flip=flip, data_on_device=False, endless=True)
        (work,) = time_alternately([Work(name, _loading(module, device))], device, config.rounds, once=config.tiny)
        row |= work.ms()
        yield row | {"batch": BATCH, "images_per_s": BATCH / row["ms"] * 1e3}


def _loading(module: PositionDataModule, device: torch.device) -> Callable[[], Any]:
    batches = iter(module.train_dataloader())

    def one() -> dict[str, Any]:
        batch = next(batches)
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return module.on_after_batch_transfer(moved, 0)

    return one


def sampling(config: BenchConfig, device: torch.device, deadline: float) -> Iterator[Row]:
    """Yield the row of drawing all images once, with the product peak measured before and after.

    If time is too short for all steps, fewer are taken; the row records how many.
    """
    model, count, steps = PLAN["tiny" if config.tiny else device.type]
    row: Row = {"part": "sampling", "name": model, "variant": "default", "work": f"{count} images", "batch": count}
    if time.monotonic() >= deadline:
        yield row | {"skipped": "the time is up"}
        return
    base = run_config(config, model, device.type, (f"trainer.batch_size={min(count, 8)}",))
    subject = Subject(base, Variant(), device)
    low: Any = "bf16-mixed" if base.trainer.precision == "bf16-mixed" else "32-true"
    settings = replace(base.sample, guidance=GUIDANCE, batch_size=count, precision=low)
    products = Products(PRECISION[device.type], device, config.tiny)
    draw(subject, replace(settings, steps="2"))  # warm up
    each = draw(subject, replace(settings, steps="2")) / 2
    taken = int(max(2, min(steps, (deadline - time.monotonic()) / each)))
    settings = replace(settings, steps=str(taken))
    time_alternately(products.works, device, 2, once=config.tiny)
    seconds = draw(subject, settings)
    time_alternately(products.works, device, 2, once=config.tiny)
    evaluations = network_evaluations(subject.process, settings)
    row |= {"steps": taken, "guidance": GUIDANCE, "evaluations": evaluations, "seconds": seconds}
    row |= {"ms": seconds / taken * 1e3, "images_per_s": count / seconds}
    macs = build.cost_of(base, subject.run.train_set).macs
    yield row | against(2.0 * macs * count * evaluations / seconds, products.peak())


def draw(subject: Subject, settings: SampleConfig) -> float:
    """Draw `settings.batch_size` samples at once, without decoding latents, and return the seconds taken."""
    labels = torch.arange(settings.batch_size) % max(1, subject.config.data.num_classes)
    sampler = Sampler(subject.network, subject.process, subject.run.shape, subject.run.null_label, raw=True)
    synchronize(subject.device)
    started = time.perf_counter()
    sampler(labels, settings)
    synchronize(subject.device)
    return time.perf_counter() - started
