"""Many images by a whole sampler with guidance: what generating a benchmark's samples costs."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from diffbench import parts
from diffbench.bench.cases import Variant, run_config
from diffbench.bench.clock import in_turns, synchronize
from diffbench.bench.figures import flops, share
from diffbench.bench.peak import Peak
from diffbench.bench.settings import BenchConfig
from diffbench.bench.subject import Subject
from diffbench.training.cost import network_evaluations
from diffbench.training.sampling import generate

GUIDANCE = 1.5
PLAN = {"cpu": ("DiT-S/2", 8, 10), "cuda": ("DiT-XL/2", 256, 250), "tiny": ("DiT-S/2", 4, 2)}
"""Network, images and steps."""

Row = dict[str, Any]


def measure(config: BenchConfig, device: torch.device, deadline: float) -> Iterator[Row]:
    """One row: all images once, after two steps of warming up, with the product peak before and after.

    Where the time left would not do for all steps, fewer are taken, and the row says how many.
    """
    model, count, steps = PLAN["tiny" if config.tiny else device.type]
    row: Row = {"part": "sampling", "name": model, "work": f"{count} images"}
    if time.monotonic() > deadline:
        yield row | {"skipped": "the time is up"}
        return
    base = run_config(config, model, device.type, (f"trainer.batch_size={min(count, 8)}",))
    subject = Subject(base, Variant(), device)
    subject.network.eval()
    labels = torch.arange(count) % base.data.num_classes
    peak = Peak(base.trainer.precision, device, config.tiny)
    ceilings = peak.works()

    def draw(some: int) -> float:
        settings = replace(base.sample, steps=str(some), guidance=GUIDANCE, batch_size=count)
        null = subject.run.null_label
        synchronize(device)
        started = time.perf_counter()
        with subject.mode():
            # Latents as they are: what decodes them is measured nowhere here.
            generate(
                subject.network, subject.process, settings, labels, subject.run.shape, null_label=null, decode=_as_it_is
            )
        synchronize(device)
        return time.perf_counter() - started

    draw(2)  # compiles and allocates
    each = draw(2) / 2
    taken_steps = int(max(2, min(steps, (deadline - time.monotonic()) / each)))
    in_turns(ceilings, device, 2, once=config.tiny)
    seconds = draw(taken_steps)
    in_turns(ceilings, device, 2, once=config.tiny)
    found = peak.of(ceilings)
    settings = replace(base.sample, steps=str(taken_steps), guidance=GUIDANCE)
    evaluations = network_evaluations(subject.process, settings)
    achieved = flops(parts.cost_of(base, subject.run.train_set).macs, count, evaluations) / seconds
    yield row | {
        "batch": count,
        "steps": taken_steps,
        "guidance": GUIDANCE,
        "evaluations": evaluations,
        "seconds": seconds,
        "ms": seconds / taken_steps * 1e3,
        "images_per_s": count / seconds,
        "flops_per_s": achieved,
        "peak": found,
        "share": share(achieved, found["flops_per_s"]),
    }


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x.float()
