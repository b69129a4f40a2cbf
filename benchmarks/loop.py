"""Overhead of Lightning: a run's training steps alternating with a bare loop on the same network."""

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.config import BenchConfig, Row, shared
from benchmarks.networks import Subject, Variant, run_config
from benchmarks.timing import spread, synchronize
from diffbench.config.kinds import RunConfig
from diffbench.core import rng
from diffbench.data.datamodule import ImageDataModule, LatentDataModule
from diffbench.data.latents import LatentSet
from diffbench.data.sets import ImageSet
from diffbench.training.trainer import fit

PAIRS = 5
"""Pairs to compare; each consists of some steps of either loop."""
TURN = 10
"""Steps after which the loops alternate, so that both halves of a pair see the machine in the same state."""
WARM = 4
"""Minimum number of steps before timing starts; memory still grows until then."""
STEPS = {"cpu": {"experiments/digits/dit.yaml": 100, "DiT-S/2": 1}, "cuda": {"DiT-XL/2": 10, "DiT-S/2": 50}}
"""Network -> steps of each loop in a pair, by device."""


class Enough(Exception):
    """Everything is measured; ends the fit without a final save."""


def measure(config: BenchConfig, device: torch.device, deadline: float) -> Iterator[Row]:
    """Yield a row for each network of `STEPS`."""
    for (model, steps), until in shared(list(STEPS[device.type].items()), deadline):
        row: Row = {"part": "loop", "name": model}
        if until is None:
            yield row | {"skipped": "the time is up"}
        else:
            steps = 2 if config.tiny else max(steps, 10) if config.full else steps
            yield row | compare(run_config(config, model, device.type), device, steps, until)


def compare(config: RunConfig, device: torch.device, steps: int, until: float) -> Row:
    """Train one network with Lightning and a copy with a bare loop, alternating, and return their times.

    Lightning's side loads batches, draws keyed noise, updates the average and logs once per pair. All pairs come from
    one fit, so that both sides see the machine in the same state.
    """
    batch = config.trainer.batch_size
    trainer = replace(config.trainer, max_images=10**9 * batch, log_images=steps * batch, checkpoint_images=10**12)
    config = replace(config, trainer=trainer)
    twin, trained = Subject(config, Variant(), device), Subject(config, Variant(), torch.device("cpu"))
    twin.network.train()
    data = synthetic(config, 50 * batch)
    turns = Alternating(twin, steps, until)
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet, contextlib.suppress(Enough):
        kind = LatentDataModule if isinstance(data, LatentSet) else ImageDataModule
        module = kind(data, batch_size=batch, data_on_device=trainer.data_on_device, endless=True)
        fit(trained.module, module, Path(folder), replace(config, trainer=trainer), [turns])
    return turns.row(batch)


def synthetic(config: RunConfig, count: int) -> ImageSet | LatentSet:
    """Return a data set of noise in the config's shape: latents if it has four channels, else images."""
    classes, shape = config.data.num_classes, (config.data.channels, config.data.image_size, config.data.image_size)
    position = torch.arange(count)
    labels = position % max(1, classes)
    noise = [rng.normal(rng.key("bench", name), position, shape) for name in ("mean", "log_variance")]
    if shape[0] == 4:
        return LatentSet(noise[0].half(), (noise[1] - 4).half(), labels, classes)
    return ImageSet((noise[0] * 60 + 128).clamp(0, 255).to(torch.uint8), labels, classes)


class Alternating(L.Callback):
    """Callback that interrupts Lightning every few steps to time as many steps of the bare loop.

    Args:
        twin: the copy that the bare loop trains.
        steps: steps of each loop in a pair.
        until: time on the clock of `time.monotonic` after which no third or later pair begins.
    """

    def __init__(self, twin: Subject, steps: int, until: float) -> None:
        self.turns = max(1, steps // TURN)
        self.twin, self.steps, self.until = twin, steps // self.turns, until
        self.ours: list[float] = []
        self.bare: list[float] = []
        self.waits: list[float] = []
        """Seconds from the end of each step to the arrival of the next batch."""
        self._began = self._ended = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> Any:
        if self._ended:
            self.waits.append(time.perf_counter() - self._ended)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        since = batch_idx + 1 - max(self.steps, WARM)
        if since >= 0 and since % self.steps == 0:
            self._turn()
        pairs, odd = divmod(len(self.ours), self.turns)
        if not odd and (pairs == PAIRS or (pairs >= 2 and time.monotonic() > self.until)):
            raise Enough
        self._ended = time.perf_counter()

    def _turn(self) -> None:
        synchronize(self.twin.device)
        now = time.perf_counter()
        if self._began:
            self.ours.append((now - self._began) / self.steps)
        started = time.perf_counter()
        for _ in range(self.steps if self._began else max(self.steps, WARM // 2)):
            self.twin.bare()
        synchronize(self.twin.device)
        if self._began:
            self.bare.append((time.perf_counter() - started) / self.steps)
        self._began = time.perf_counter()

    def row(self, batch: int) -> Row:
        """Return the medians over the pairs, in ms per step."""
        ours, bare = (torch.tensor(side).reshape(-1, self.turns).mean(1).tolist() for side in (self.ours, self.bare))
        step, more = spread(ours)["median"], spread([(a - b) * 1e3 for a, b in zip(ours, bare, strict=True)])
        row: Row = {"batch": batch, "work": "lightning step", "ms": step * 1e3, "bare_ms": spread(bare)["median"] * 1e3}
        row |= {"overhead_ms": more["median"], "overhead_low": more["low"], "overhead_high": more["high"]}
        waits = sum(self.waits) / len(self.waits)
        return row | {"pairs": more["n"], "steps": self.steps * self.turns, "data_wait_share": waits / step}
