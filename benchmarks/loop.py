"""Lightning's loop, with all that a run does in a step, against a bare loop of the same network, in turns."""

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
"""Of what is compared: some steps of each loop."""
TURN = 10
"""Steps after which the loops take turns, so that a pair's halves meet the same machine."""
WARM = 4
"""Steps at least, before any is timed: until then memory grows."""
STEPS = {"cpu": {"experiments/digits/dit.yaml": 100, "DiT-S/2": 1}, "cuda": {"DiT-XL/2": 10, "DiT-S/2": 50}}
"""Network -> steps of each half of a pair."""


class Enough(Exception):
    """Everything is measured: leaves the loop without a final save."""


def measure(config: BenchConfig, device: torch.device, deadline: float) -> Iterator[Row]:
    """A row for each network of `STEPS`."""
    for (model, steps), until in shared(list(STEPS[device.type].items()), deadline):
        row: Row = {"part": "loop", "name": model}
        if until is None:
            yield row | {"skipped": "the time is up"}
        else:
            steps = 2 if config.tiny else max(steps, 10) if config.full else steps
            yield row | compare(run_config(config, model, device.type), device, steps, until)


def compare(config: RunConfig, device: torch.device, steps: int, until: float) -> Row:
    """One network trained by Lightning and, in turns, its twin by a bare loop.

    Lightning's side draws its batches and keyed noise, keeps the average and logs once a pair. All pairs come from one
    fit, so that both sides meet the same machine.
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
    """Images, or latents where there are four channels, of the config's shape, of noise."""
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
        until: on `time.monotonic`'s clock; no third or later pair begins after it.
    """

    def __init__(self, twin: Subject, steps: int, until: float) -> None:
        self.turns = max(1, steps // TURN)
        self.twin, self.steps, self.until = twin, steps // self.turns, until
        self.ours: list[float] = []
        self.bare: list[float] = []
        self.waits: list[float] = []
        """Seconds from a step's end to the arrival of the next batch, of all steps."""
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
        """Medians of the pairs, in ms a step."""
        ours, bare = (torch.tensor(side).reshape(-1, self.turns).mean(1).tolist() for side in (self.ours, self.bare))
        step, more = spread(ours)["median"], spread([(a - b) * 1e3 for a, b in zip(ours, bare, strict=True)])
        row: Row = {"batch": batch, "work": "lightning step", "ms": step * 1e3, "bare_ms": spread(bare)["median"] * 1e3}
        row |= {"overhead_ms": more["median"], "overhead_low": more["low"], "overhead_high": more["high"]}
        waits = sum(self.waits) / len(self.waits)
        return row | {"pairs": more["n"], "steps": self.steps * self.turns, "data_wait_share": waits / step}
