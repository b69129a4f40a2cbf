"""Interleaved timing: every workload runs once per round, so that other load on the machine affects all alike."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch.autograd.profiler_util import MEMORY_EVENT_NAME
from torch.profiler import ProfilerActivity, profile

LEAST = {"cpu": 0.02, "cuda": 0.1}
"""Least duration of a measurement in seconds; shorter workloads are repeated within it."""


@dataclass
class Work:
    """A workload to time, and its measurements."""

    name: str
    call: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    """Called before each measurement, and not timed."""
    times: list[float] = field(default_factory=list)
    """Seconds of one call, in each round."""
    memory: int = 0
    """Peak bytes while it runs, beyond those in use before."""
    first: float = 0.0
    """Seconds of the first call, including compilation; 0 until then."""

    def begin(self, device: torch.device) -> None:
        """Run and time the first call."""
        self.prepare()
        self.first = seconds(self.call, device)

    def ms(self, calls: float = 1.0) -> dict[str, float]:
        """Return the median, lowest and highest time of `calls` calls in ms, and the number of rounds."""
        found = spread([1e3 * calls * t for t in self.times])
        return {"ms": found["median"], "ms_low": found["low"], "ms_high": found["high"], "rounds": found["n"]}


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Return the seconds of one call, averaged over several in a row."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def time_alternately(
    works: Sequence[Work], device: torch.device, rounds: int, once: bool = False, deadline: float = math.inf
) -> Sequence[Work]:
    """Warm up every workload, then time each once per round, reversing the order in every other round.

    Args:
        works: the workloads; their `times`, `memory` and `first` are filled in.
        device: the device they run on.
        rounds: number of measurements of each.
        once: call each once per measurement, however short it is.
        deadline: time on the clock of `time.monotonic` after which no round but the first begins.
    """
    for work in works:
        if not work.first:
            work.begin(device)
    calls = {}
    for work in works:  # a second warm-up after all have run: a changed state can trigger another compilation
        work.prepare()
        with peak_memory(device) as peak:
            taken = seconds(work.call, device)
        work.memory = peak()
        long = once or taken > 20 * LEAST[device.type]
        calls[id(work)] = 1 if long else max(1, round(LEAST[device.type] / max(seconds(work.call, device), 1e-9)))
    for i in range(rounds):
        if i and time.monotonic() > deadline:
            break
        for work in works if i % 2 == 0 else reversed(works):
            work.prepare()
            work.times.append(seconds(work.call, device, calls[id(work)]))
    return works


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that returns, after the block, the peak bytes torch allocated in it beyond those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield lambda: _most(profiled)


def _most(profiled: profile) -> int:
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events: list[Any] = [e for e in profiled.profiler.kineto_results.events() if e.name() == MEMORY_EVENT_NAME]
    return max(accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, lowest and highest of some measurements, and their number."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratio(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Return the spread of the ratios of `times` to `base`, round by round, as both were measured alternately."""
    return spread([t / b for t, b in zip(times, base, strict=True)])


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the exponent p of value ~ size^p by least squares on the logarithms; linear growth gives 1."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope
