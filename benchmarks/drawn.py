"""Many images by a whole sampler with guidance: what generating a benchmark's samples costs."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cases import Variant, run_config
from benchmarks.clock import in_turns, synchronize
from benchmarks.figures import against, flops
from benchmarks.peak import Peak
from benchmarks.settings import BenchConfig
from benchmarks.subject import Subject
from diffbench.config.sections import SampleConfig
from diffbench.runs import build
from diffbench.sampling.cost import network_evaluations
from diffbench.sampling.sampler import Sampler

GUIDANCE = 1.5
PLAN = {"cpu": ("DiT-S/2", 8, 10), "cuda": ("DiT-XL/2", 256, 250), "tiny": ("DiT-S/2", 4, 2)}
"""Network, images and steps."""
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {"default": {}},
    "cuda": {"default": {}, "CUDA graphs": {"cuda_graphs": True}},
}
"""Ways to draw: changes of the section `sample`."""

Row = dict[str, Any]


def measure(config: BenchConfig, device: torch.device, deadline: float) -> Iterator[Row]:
    """A row for each way to draw: all images once, after two steps of warming up, with the product peak around it.

    Where the time left would not do for all steps, fewer are taken, and the row says how many.
    """
    model, count, steps = PLAN["tiny" if config.tiny else device.type]
    base = run_config(config, model, device.type, (f"trainer.batch_size={min(count, 8)}",))
    subject: Subject | None = None
    for name, changes in WAYS[device.type].items():
        row: Row = {"part": "sampling", "name": model, "variant": name, "work": f"{count} images", "batch": count}
        if time.monotonic() > deadline:
            yield row | {"skipped": "the time is up"}
            continue
        subject = subject or Subject(base, Variant(), device)
        low: Any = "bf16-mixed" if base.trainer.precision == "bf16-mixed" else "32-true"
        settings = replace(base.sample, guidance=GUIDANCE, batch_size=count, precision=low, **changes)
        peak = Peak(base.trainer.precision, device, config.tiny)
        ceilings = peak.works()
        draw(subject, replace(settings, steps="2"))  # allocates
        each = draw(subject, replace(settings, steps="2")) / 2
        taken = int(max(2, min(steps, (deadline - time.monotonic()) / each)))
        settings = replace(settings, steps=str(taken))
        in_turns(ceilings, device, 2, once=config.tiny)
        seconds = draw(subject, settings)
        in_turns(ceilings, device, 2, once=config.tiny)
        found, evaluations = peak.of(ceilings), network_evaluations(subject.process, settings)
        achieved = flops(build.cost_of(base, subject.run.train_set).macs, count, evaluations) / seconds
        row |= {
            "steps": taken,
            "guidance": GUIDANCE,
            "evaluations": evaluations,
            "seconds": seconds,
            "ms": seconds / taken * 1e3,
            "images_per_s": count / seconds,
        }
        yield row | against(achieved, found)


def draw(subject: Subject, settings: SampleConfig) -> float:
    """Seconds of drawing `settings.batch_size` samples at once, latents as they are: nothing decodes them."""
    labels = torch.arange(settings.batch_size) % max(1, subject.config.data.num_classes)
    sampler = Sampler(subject.network, subject.process, subject.run.shape, subject.run.null_label, raw=True)
    synchronize(subject.device)
    started = time.perf_counter()
    sampler(labels, settings)
    synchronize(subject.device)
    return time.perf_counter() - started
