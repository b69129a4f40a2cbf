"""Times taken in turns: every work once a round, so that what the machine does meanwhile affects all of them alike."""

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
"""Seconds that one measurement lasts at least; shorter works are repeated inside it."""


@dataclass
class Work:
    """Something to time."""

    name: str
    call: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    """Called before each measurement, outside the time."""
    times: list[float] = field(default_factory=list)
    """Seconds of one call, a value a round."""
    memory: int = 0
    """Bytes at the most while it runs, beyond those in use before."""
    first: float = 0.0
    """Seconds of the first call, compilation included; 0 before it."""

    def begin(self, device: torch.device) -> None:
        """Call it for the first time."""
        self.prepare()
        self.first = seconds(self.call, device)

    def ms(self, calls: float = 1.0) -> dict[str, float]:
        """Median, lowest and highest time of `calls` calls in ms, and the number of rounds."""
        found = spread([1e3 * calls * t for t in self.times])
        return {"ms": found["median"], "ms_low": found["low"], "ms_high": found["high"], "rounds": found["n"]}


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Seconds of one call, the mean of several in a row."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def in_turns(
    works: Sequence[Work], device: torch.device, rounds: int, once: bool = False, deadline: float = math.inf
) -> Sequence[Work]:
    """Warm up every work, then time each once a round, in the opposite order in every other round.

    Args:
        works: what to time; their `times`, `memory` and `first` are filled in.
        device: where they run.
        rounds: measurements of each.
        once: call each once in a measurement, however short it is.
        deadline: on `time.monotonic`'s clock; no round but the first begins after it.
    """
    for work in works:
        if not work.first:
            work.begin(device)
    calls = {}
    for work in works:  # again, once all have run: what compiled in one state may compile for another too
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
    """Yield a function that says, after the block, how many bytes torch held at the most beyond those before it."""
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
    """Median, lowest, highest and number of some measurements."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratio(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """The ratio of times to those of `base`, round by round, as both were measured in turns."""
    return spread([t / b for t, b in zip(times, base, strict=True)])


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent p of value ~ size^p: least squares in the logarithms, 1 for linear growth and 2 for quadratic."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope
