"""Forward, training and sampling steps of networks and their variants, alternating with large matrix products."""

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.config import BenchConfig, Row, shared
from benchmarks.networks import PRECISION, SAMPLE_STEPS, Subject, run_config, selected_models, variants
from benchmarks.timing import Work, ratio, spread, time_alternately
from diffbench.denoisers.linear import linear_as_convolution
from diffbench.runs import build
from diffbench.training.speed import float32_products

DTYPES = {"32-true": torch.float32, "tf32": torch.float32, "bf16-mixed": torch.bfloat16}
SIZES: dict[str, list[tuple[int, int, int]]] = {
    "cpu": [(2048, 2048, 2048), (4096, 384, 1536)],
    "cuda": [(8192, 8192, 8192), (32768, 1152, 4608)],
    "tiny": [(128, 128, 128), (256, 128, 128)],
}
"""(rows, inner, columns) of products: a square one, and a tall one, like tokens times weights."""
LONGEST = 15.0
"""Longest training step, in seconds at the product peak, with which a network is measured."""
COMPILING = {"none": 0.0, "block": 40.0, "model": 90.0}
"""Seconds that must be left before the deadline of all networks to start compiling one."""


class Products:
    """Large matrix products, whose rate is the ceiling; time them alternating with what is compared with them.

    On a CPU, a float32 product may be faster as a 1x1 convolution (see `denoisers.linear`); both ways are measured.

    Args:
        kind: precision of the products: tf32, or a value of `trainer.precision`.
        device: the device to run on.
        tiny: whether to use small sizes.
    """

    def __init__(self, kind: str, device: torch.device, tiny: bool) -> None:
        self.kind, self.flops = kind, dict[str, float]()
        self.works: list[Work] = []
        for rows, inner, columns in SIZES["tiny" if tiny else device.type]:
            # Random numbers, because zeros multiply faster than real weights.
            a, b = (torch.randn(*s, device=device).to(DTYPES[kind]) for s in ((rows, inner), (inner, columns)))
            ways: dict[str, Callable[[], Any]] = {"mm": partial(torch.mm, a, b)}
            if device.type == "cpu" and kind == "32-true":
                ways["convolution"] = partial(linear_as_convolution, a, b.t().contiguous())
            for way, call in ways.items():
                name = f"{way} {rows}x{inner}x{columns}"
                self.flops[name] = 2.0 * rows * inner * columns
                self.works.append(Work(name, float32_products(kind == "tf32")(call)))

    def peak(self) -> Row:
        """Return the fastest product by median time, its rate in FLOP/s, and the highest rate of torch.mm."""
        rates = {work.name: self.flops[work.name] / spread(work.times)["median"] for work in self.works}
        best = max(rates, key=lambda name: rates[name])
        mm = max(rate for name, rate in rates.items() if name.startswith("mm "))
        return {"precision": self.kind, "product": best, "flops_per_s": rates[best], "mm_flops_per_s": mm}


def against(achieved: float, peak: Row) -> Row:
    """Return `achieved` FLOP/s with its shares of the fastest product and of torch.mm."""
    shares = {"share": achieved / peak["flops_per_s"], "mm_share": achieved / peak["mm_flops_per_s"]}
    return {"flops_per_s": achieved, "peak": peak} | shares


def measure(config: BenchConfig, device: torch.device, deadline: float) -> Iterator[Row]:
    """Yield the rows of every network that fits, as they are measured.

    Args:
        config: the benchmark's config.
        device: the device to run on.
        deadline: time on the clock of `time.monotonic` after which no network begins.
    """
    products = Products(PRECISION[device.type], device, config.tiny)
    time_alternately(products.works, device, 2, once=config.tiny)
    rate = products.peak()["flops_per_s"]
    for model, until in shared(selected_models(config), deadline):
        if until is None:
            yield {"part": "models", "name": model, "skipped": "the time is up"}
            continue
        yield from _network(config, model, device, rate, until, deadline)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _network(
    config: BenchConfig, model: str, device: torch.device, rate: float, until: float, deadline: float
) -> Iterator[Row]:
    """Yield a network's rows: its default, and its variants with their ratios to the default.

    Args:
        rate: FLOP/s of the fastest product.
        until: end of this network's time, after which no further round begins.
        deadline: end of the time for all networks, by which the compilation of a variant must end.
    """
    named: Row = {"part": "models", "name": model}
    base = run_config(config, model, device.type)
    cost, batch = build.cost_of(base, build.load_data(base)[0]), base.trainer.batch_size
    if (step := cost.training_flops(batch) / rate) > LONGEST:
        yield named | {"skipped": f"a training step at batch {batch} takes {step:.0f} s"}
        return
    subjects: list[Subject] = []
    works: list[dict[str, Work]] = []
    for variant in variants(config, model, base, device.type):
        changed = run_config(config, model, device.type, variant.overrides)
        if variant.overrides and changed == base:
            continue  # the same as the default
        compiled = changed.trainer.compile
        if subjects and time.monotonic() > (until if compiled == "none" else deadline - COMPILING[compiled]):
            yield named | {"variant": variant.name, "skipped": "the time is up"}
            continue
        like = subjects[0] if subjects and variant.same_network else None
        # Inductor takes minutes even for a tiny network.
        backend = "eager" if config.tiny else "inductor"
        subject = Subject(changed, variant, device, like=like, backend=backend)
        steps = subject.works()
        if subjects and (compiled == "model" if config.gpu else not (config.full or config.models)):
            steps = {"train": steps["train"]}  # the others would compile again, or the short form has no time for them
        error = _first_calls(subject, steps)
        if error:
            yield named | {"variant": variant.name, "skipped": error}
        else:
            subjects.append(subject)
            works.append(steps)
    if not subjects:
        return
    products = {kind: Products(kind, device, config.tiny) for kind in dict.fromkeys(s.products for s in subjects)}
    everything = [w for steps in works for w in steps.values()] + [w for p in products.values() for w in p.works]
    time_alternately(everything, device, config.rounds, once=config.tiny, deadline=until)
    for subject, steps in zip(subjects, works, strict=True):
        for kind, work in steps.items():
            calls = SAMPLE_STEPS if kind == "sample" else 1
            flops = {"forward": 2.0 * cost.macs, "train": cost.training_flops(1)}
            flops["sample"] = 2.0 * cost.macs * subject.evaluations() / calls
            row = named | {"variant": subject.variant.name, "work": kind, "batch": batch} | work.ms(1 / calls)
            row |= {"images_per_s": batch / row["ms"] * 1e3, "memory_bytes": work.memory, "first_s": work.first}
            row |= against(flops[kind] * row["images_per_s"], products[subject.products].peak())
            row |= {"parameters": cost.parameters, "gmacs": cost.gmacs}
            if subject is not subjects[0]:
                row["ratio"] = ratio(work.times, works[0][kind].times)
            yield row


def _first_calls(subject: Subject, steps: Mapping[str, Work]) -> str:
    """Call each step of a variant for the first time; return the error if it does not run here, or ""."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # attention kernels warn when they cannot handle a call
            for work in steps.values():
                work.begin(subject.device)
        return ""
    except torch.OutOfMemoryError:
        return "out of memory"
    except (RuntimeError, NotImplementedError) as e:  # no such kernel, or no compiler
        return " ".join(str(e).split())[:120]
    finally:
        subject.optimizer.zero_grad(set_to_none=True)
