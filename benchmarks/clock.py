"""Times taken in turns: every work once a round, so that what the machine does meanwhile meets all of them alike."""

import os
import sys
import tempfile
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
    """Seconds of the first call, compilation included."""


def synchronize(device: torch.device) -> None:
    """Waits until a device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Seconds of one call, the mean of several in a row: by device events on a GPU, by the clock on a CPU."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - started) / calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def in_turns(works: Sequence[Work], device: torch.device, rounds: int, once: bool = False) -> Sequence[Work]:
    """Warms every work up, then times each once a round, in the opposite order in every other round.

    Args:
        works: what to time; their `times`, `memory` and `first` are filled in.
        device: where they run.
        rounds: measurements of each.
        once: call each once in a measurement, however short it is.
    """
    for work in works:
        work.prepare()
        started = time.perf_counter()
        work.call()
        synchronize(device)
        work.first = time.perf_counter() - started
    calls = {}
    for work in works:  # again, once all have run: what compiled in one state may compile for another too
        work.prepare()
        with peak_memory(device) as peak:
            work.call()
            synchronize(device)
        work.memory = peak()
        long = once or work.first > 20 * LEAST[device.type]
        calls[id(work)] = 1 if long else max(1, round(LEAST[device.type] / max(seconds(work.call, device), 1e-9)))
    for i in range(rounds):
        for work in works if i % 2 == 0 else reversed(works):
            work.prepare()
            work.times.append(seconds(work.call, device, calls[id(work)]))
    return works


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yields what says, after the block, how many bytes it needed at the most beyond those in use before it.

    Those of torch's allocators; what libraries take besides is not counted.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield lambda: _most(profiled)


def _most(profiled: profile) -> int:
    """The largest sum of what was allocated and not yet freed, over time."""
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events: list[Any] = [e for e in profiled.profiler.kineto_results.events() if e.name() == MEMORY_EVENT_NAME]
    return max(accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keeps back what torch's profiler says of its start and stop, and nothing else, from standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            os.write(2, b"".join(line for line in file if not line.startswith(b"USDT:")))
