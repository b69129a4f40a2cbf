"""Forward, training and sampling steps of the networks, with their variants and the machine's ceiling in turns."""

import gc
import importlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks import cases
from benchmarks.cases import Variant
from benchmarks.clock import Work, in_turns, synchronize
from benchmarks.figures import PASSES, against, flops, ratio, share, spread
from benchmarks.machine import free_bytes
from benchmarks.peak import Peak, copy_rate
from benchmarks.roofline import roofline, written
from benchmarks.settings import BenchConfig
from benchmarks.subject import KINDS, Subject
from diffbench.config.kinds import RunConfig
from diffbench.core.errors import UserError
from diffbench.runs import build

PER_PARAMETER = 4 * 5
"""Bytes that training keeps of each: the weight, its gradient, two moments, an average, all float32."""
LONGEST = 15.0
"""Seconds of a training step at the product peak beyond which a batch is halved."""
COMPILING = 100.0
"""Seconds that must be left to compile a whole network."""

Row = dict[str, Any]


def measure(config: BenchConfig, device: torch.device, deadline: float) -> Iterator[Row]:
    """Rows of every network that fits, as they are measured.

    Args:
        config: what to measure.
        device: where.
        deadline: on `time.monotonic`'s clock; no network begins after it.
    """
    copies = copy_rate(device, config.tiny)
    yield {"part": "models", "name": "copy", "work": "copy", "bytes_per_s": copies}
    for model in cases.models(config):
        if time.monotonic() > deadline:
            yield {"part": "models", "name": model, "skipped": "the time is up"}
            continue
        yield from _network(config, model, device, copies, deadline)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _network(config: BenchConfig, model: str, device: torch.device, copies: float, deadline: float) -> Iterator[Row]:
    """A network's rows: its default, and its variants with their ratios to it."""
    name: Row = {"part": "models", "name": model}
    peaks = {p: Peak(p, device, config.tiny) for p in [cases.precision(config, device.type)]}
    base, why = _fitting(config, model, device, next(iter(peaks.values())).best)
    if why:
        yield name | {"skipped": why}
        return
    batch = f"trainer.batch_size={base.trainer.batch_size}"
    subjects: list[Subject] = []
    for variant in cases.variants(config, model, base, device.type):
        changed = cases.run_config(config, model, device.type, (batch, *variant.overrides))
        if changed.trainer.compile == "model" and time.monotonic() > deadline - COMPILING:
            yield name | {"variant": variant.name, "skipped": "no time to compile"}
            continue
        like = subjects[0] if subjects and not _makes_another(base, variant) else None
        # A compiler of code takes minutes, however small the network.
        subject = Subject(changed, variant, device, like=like, backend="eager" if config.tiny else "inductor")
        failed = _try(subject)
        if failed:
            yield name | {"variant": variant.name, "skipped": failed}
        else:
            subjects.append(subject)
    other = _other(config, model, base)
    if other is not None:
        subjects.append(Subject(base, Variant("other"), device, other))
        failed = _try(subjects[-1])
        if failed:
            raise UserError(f"other: {config.other} does not train as {model}: {failed}")
    if not subjects:
        return
    # The short form has time for the training steps of variants alone.
    brief = not (config.full or config.gpu or config.models)
    works = {s.variant.name: s.works(("train",) if brief and s is not subjects[0] else KINDS) for s in subjects}
    used = {s.products for s in subjects}
    peaks = {p: peaks.get(p) or Peak(p, device, config.tiny) for p in used}
    ceilings = {p: peak.works() for p, peak in peaks.items()}
    everything = [w for kind in works.values() for w in kind.values()]
    everything += [w for some in ceilings.values() for w in some]
    in_turns(everything, device, config.rounds, once=config.tiny)
    cost = build.cost_of(base, subjects[0].run.train_set)
    for subject in subjects:
        peak = peaks[subject.products].of(ceilings[subject.products])
        for kind, work in works[subject.variant.name].items():
            row = name | {"variant": subject.variant.name, "work": kind}
            row |= _figures(subject, work, kind, cost.macs, peak)
            row |= {"parameters": cost.parameters, "gmacs": cost.gmacs}
            row["first_s"] = subject.first if kind == "train" else work.first
            if subject is not subjects[0]:
                row["ratio"] = vars(ratio(work.times, works[subjects[0].variant.name][kind].times))
            elif kind == "train":
                row |= _floors(subject, row, peak["flops_per_s"], copies)
            yield row


def _figures(subject: Subject, work: Work, kind: str, macs: int, peak: dict[str, Any]) -> Row:
    steps = subject.steps if kind == "sample" else 1
    taken, batch = spread(work.times).scaled(1 / steps), subject.config.trainer.batch_size
    passes = subject.evaluations if kind == "sample" else PASSES[kind]
    achieved = flops(macs, batch, passes) / taken.median
    ms = taken.scaled(1e3)
    return {
        "batch": batch,
        "ms": ms.median,
        "ms_low": ms.low,
        "ms_high": ms.high,
        "rounds": ms.n,
        "images_per_s": batch / taken.median,
        "memory_bytes": work.memory,
        "state_bytes": subject.state_bytes(kind == "train"),
    } | against(achieved, peak)


def _floors(subject: Subject, row: Row, peak: float, copies: float) -> Row:
    """What part of the roofline a training step reaches."""
    floor = roofline(subject.bare, peak, copies)
    return {
        "roofline_ms": floor.operators * 1e3,
        "products_ms": floor.products * 1e3,
        "roofline_share": share(floor.operators * 1e3, row["ms"]),
        "products_share": share(floor.products * 1e3, row["ms"]),
    }


def _fitting(config: BenchConfig, model: str, device: torch.device, rate: float) -> tuple[RunConfig, str]:
    """A network's experiment at the largest batch, halved as often as needed, that fits the memory and the time."""
    base = cases.run_config(config, model, device.type)
    data = build.load_data(base)[0]
    cost, kept, batch = build.cost_of(base, data), kept_bytes(base), base.trainer.batch_size
    room = 0.9 * free_bytes(device) - cost.parameters * PER_PARAMETER
    fits = min(room / kept, LONGEST * rate / flops(cost.macs, 1, PASSES["train"]))
    while batch > max(1, fits) and config.batch is None:
        batch //= 2
    if batch > fits:
        needed = batch * kept + cost.parameters * PER_PARAMETER
        step = flops(cost.macs, batch, PASSES["train"]) / rate
        return base, f"at batch {batch} it needs about {needed / 2**30:.1f} GiB, and {step:.0f} s for a training step"
    return cases.run_config(config, model, device.type, (f"trainer.batch_size={batch}",)), ""


def kept_bytes(config: RunConfig) -> int:
    """About what a training step keeps of each image for the backward pass."""
    data = build.load_data(config)[0]
    with torch.device("meta"):
        network = build.build_denoiser(config, data)
        x = torch.empty(1, *data.images.shape[1:])
        kept = written(lambda: network(x, torch.empty(1), torch.zeros(1, dtype=torch.int64)))
    return kept // 2 if config.trainer.precision == "bf16-mixed" else kept


def _makes_another(base: RunConfig, variant: Variant) -> bool:
    """Whether a variant's keys change the network itself, or how its weights lie in memory."""
    same = {"trainer.precision=32-true", "trainer.precision=bf16-mixed"}
    return base.trainer.precision == "64-true" or bool({*variant.overrides} - same)


def _try(subject: Subject) -> str:
    """Whether a variant runs here at all: why it does not, or nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why a kernel does not take a call
            subject.ready()
            started = time.perf_counter()
            subject.train()
            synchronize(subject.device)
            subject.first = time.perf_counter() - started
        return ""
    except torch.OutOfMemoryError:
        return "out of memory"
    except (RuntimeError, NotImplementedError) as e:  # no such kernel, or no compiler
        return " ".join(str(e).split())[:120]
    finally:
        subject.optimizer.zero_grad(set_to_none=True)


def _other(config: BenchConfig, model: str, base: RunConfig) -> nn.Module | None:
    if config.other is None:
        return None
    module, _, attribute = config.other.partition(":")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise UserError(f"other: {config.other} cannot be imported: {e}") from None
    return make(model, base)
