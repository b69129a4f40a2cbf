"""Lightning's loop, with all that a run does in a step, against a bare loop of the same network, in turns."""

import contextlib
import io
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.cases import Variant, run_config
from benchmarks.clock import synchronize
from benchmarks.figures import covered, differences, share, spread
from benchmarks.settings import BenchConfig
from benchmarks.subject import Subject
from diffbench.config.kinds import RunConfig
from diffbench.config.load import to_yaml
from diffbench.core import rng
from diffbench.data.latents import LatentSet
from diffbench.data.sets import ImageSet
from diffbench.runs import build
from diffbench.training.trainer import fit

PAIRS = 5
"""What is compared: steps of each loop."""
TURN = 10
"""Steps after which the loops take turns, so that a pair's halves meet the same machine."""
WARM = 4
"""Steps at least, before any is timed: until then memory grows."""
TRACED = 8
"""Steps under the profiler, on a GPU; the first quarter fills its queue."""
STEPS = {"cpu": {"experiments/digits/dit.yaml": 100, "DiT-S/2": 1}, "cuda": {"DiT-XL/2": 10, "DiT-S/2": 50}}
"""Network -> steps of each half of a pair."""

Row = dict[str, Any]


class Enough(Exception):
    """Everything is measured: leaves the loop without a final save."""


def measure(config: BenchConfig, device: torch.device, deadline: float) -> Iterator[Row]:
    """A row for each network of `STEPS`."""
    for model, steps in STEPS[device.type].items():
        if time.monotonic() > deadline:
            yield {"part": "loop", "name": model, "skipped": "the time is up"}
            continue
        steps = 2 if config.tiny else 10 if config.full and steps < 10 else steps
        yield {"part": "loop", "name": model} | compare(run_config(config, model, device.type), device, steps)


def compare(config: RunConfig, device: torch.device, steps: int) -> Row:
    """One network trained by Lightning and, in turns, its twin by a bare loop.

    Lightning's side draws its batches and keyed noise, keeps the average and logs once a pair. All five pairs come
    from one fit, so that both sides meet the same machine.
    """
    batch = config.trainer.batch_size
    steps_in_all = (2 * (PAIRS + 1) * steps + WARM + TRACED + 8) * batch
    trainer = replace(config.trainer, max_images=steps_in_all, log_images=steps * batch, checkpoint_images=10**12)
    config = replace(config, trainer=trainer)
    twin, trained = Subject(config, Variant(), device), Subject(config, Variant(), torch.device("cpu"))
    twin.network.train()
    data = synthetic(config, 50 * batch)
    module = build.data_module(config, data, data)
    stamps = Alternating(twin, steps, device)
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet, contextlib.suppress(Enough):
        fit(trained.module, module, Path(folder), trainer, config.ema, to_yaml(config), lambda log, ema: [stamps])
    return stamps.figures(batch)


def synthetic(config: RunConfig, count: int) -> ImageSet | LatentSet:
    """Pictures, or latents where there are four channels, of the config's shape, of noise."""
    classes, shape = config.data.num_classes, (config.data.channels, config.data.image_size, config.data.image_size)
    position = torch.arange(count)
    labels = position % max(1, classes)
    noise = [rng.normal(rng.key("bench", name), position, shape) for name in ("mean", "log_variance")]
    if shape[0] == 4:
        return LatentSet(noise[0].half(), (noise[1] - 4).half(), labels, classes)
    return ImageSet((noise[0] * 60 + 128).clamp(0, 255).to(torch.uint8), labels, classes)


class Alternating(L.Callback):
    """Stops after some of Lightning's steps, times as many bare steps, and goes on.

    Args:
        twin: what the bare loop trains.
        steps: of each half of a pair.
        device: where both are.
    """

    def __init__(self, twin: Subject, steps: int, device: torch.device) -> None:
        self.turns = max(1, steps // TURN)
        self.twin, self.steps, self.device = twin, steps // self.turns, device
        self.ours: list[float] = []
        self.bare: list[float] = []
        self.waits: list[float] = []
        """Seconds from a step's end to the arrival of the next batch, of all steps."""
        self.trace: Row = {"idle_share": None, "synchronizations_per_step": None}
        self._began = self._ended = 0.0
        self._stack = contextlib.ExitStack()
        self._profile: Any = None
        self._warned: list[Any] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> Any:
        if self._ended:
            self.waits.append(time.perf_counter() - self._ended)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1
        warm = max(self.steps, WARM)
        end = warm + PAIRS * self.turns * self.steps
        if warm <= done <= end and (done - warm) % self.steps == 0:
            self._turn()
        if done == end:
            if self.device.type != "cuda":
                raise Enough
            self._start_trace()
        if done == end + TRACED:
            self._end_trace()
            raise Enough
        self._ended = time.perf_counter()

    def _turn(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self._began:
            self.ours.append((now - self._began) / self.steps)
        started = time.perf_counter()
        for _ in range(self.steps if self._began else max(self.steps, WARM // 2)):
            self.twin.bare()
        synchronize(self.device)
        if self._began:
            self.bare.append((time.perf_counter() - started) / self.steps)
        self._began = time.perf_counter()

    def _start_trace(self) -> None:
        self._warned = self._stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profile.start()

    def _end_trace(self) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._stack.close()
        synchronize(self.device)
        self._profile.stop()
        found = [e for e in self._profile.events() if e.device_type.name == "CUDA"]
        self.trace = {
            "idle_share": idle([(e.time_range.start, e.time_range.end) for e in found], after=0.25),
            "synchronizations_per_step": len([w for w in self._warned if "synchroniz" in str(w.message)]) / TRACED,
        }

    def figures(self, batch: int) -> Row:
        """What the pairs say, in ms a step."""
        pairs = [torch.tensor(side).reshape(-1, self.turns).mean(1).tolist() for side in (self.ours, self.bare)]
        ours, bare = map(spread, pairs)
        more = differences(*pairs).scaled(1e3)
        return {
            "batch": batch,
            "work": "lightning step",
            "ms": ours.median * 1e3,
            "bare_ms": bare.median * 1e3,
            "overhead_ms": more.median,
            "overhead_low": more.low,
            "overhead_high": more.high,
            "pairs": more.n,
            "steps": self.steps * self.turns,
            "data_wait_share": share(sum(self.waits) / len(self.waits), ours.median) if self.waits else None,
            **self.trace,
        }


def idle(kernels: list[tuple[float, float]], after: float = 0.0) -> float:
    """The share of time in which no kernel ran, until the last one's end.

    Args:
        kernels: start and end of each.
        after: the first part of the time from the first start to the last end that is left out.
    """
    if not kernels:
        return 1.0
    first, last = min(start for start, _ in kernels), max(end for _, end in kernels)
    begin = first + after * (last - first)
    return 1 - share(covered((max(start, begin), end) for start, end in kernels if end > begin), last - begin)
