"""Distances to real images in training: what averaged weights draw is scored at a fixed number of samples."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch

from diffbench.config.sample_sections import SampleConfig
from diffbench.core import collectives as together
from diffbench.core import rng, tensors
from diffbench.core.errors import UserError
from diffbench.core.progress import span
from diffbench.metrics.suite import Suite, metric_name
from diffbench.sampling.cost import network_evaluations, seconds_per_evaluation, timed
from diffbench.sampling.sampler import Sampler
from diffbench.training.clock import at_step_end, due
from diffbench.training.ema import EMA
from diffbench.training.fsdp import gathered, part_of, sharded
from diffbench.training.logger import RunLog
from diffbench.training.module import DiffusionModule


class Distance(L.Callback):
    """Fréchet and kernel distance of the averaged weights, every `every` images and at the end.

    The same noise and labels each time, drawn for nothing else. With `best`, the weights of the least distance stay in
    best.safetensors; the choice was made on those samples, so at the end they are scored again on fresh noise.

    Args:
        run_log: where values go, and whose clock stands still meanwhile.
        ema: the averages; the first is scored.
        suite: makes the metrics, empty. They live here, outside the module: no weight of an extractor enters a
            checkpoint, an average or a count of parameters.
        sampler: draws from the network that is trained.
        config: how it does.
        num_classes: labels are spread evenly over them.
        every: images between distances.
        seed: of the run; with a sample's number it fixes its noise.
        best: "fd" or "kid", whose least value marks the best weights; None keeps none.
    """

    def __init__(
        self,
        run_log: RunLog,
        ema: EMA,
        suite: Callable[[], Suite],
        sampler: Sampler,
        config: SampleConfig,
        num_classes: int,
        every: int,
        seed: int,
        best: str | None = None,
    ) -> None:
        self.run_log, self.ema, self.suite, self.sampler, self.config = run_log, ema, suite, sampler, config
        self.num_classes, self.every, self.seed, self.best_by = num_classes, every, seed, best
        self.best: dict[str, float] = {}
        """Of the best weights: images, and value of the metric on the samples that chose them."""

    @property
    def path(self) -> Path:
        """Where the best weights stay."""
        return self.run_log.folder / "best.safetensors"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
        suite = self.suite()
        suite.extractor.to(trainer.strategy.root_device)
        with self.run_log.clock.paused():
            each = self._cost(suite)
        left = trainer.max_steps * self.run_log.batch_size - self.run_log.images
        times = max(1, left // self.every)
        self.run_log.say(
            f"distances with {suite.extractor.name}: {suite.count:,} samples every {self.every:,} images, about"
            f" {span(each)} each, {times} times"
        )

    def _cost(self, suite: Suite) -> float:
        once = seconds_per_evaluation(self.sampler, self.config.batch_size)
        drawing = once * network_evaluations(self.sampler.process, self.config)
        shown = self.sampler.images(torch.zeros(8, *self.sampler.shape, device=suite.extractor.device))
        looking = timed(lambda: suite.extractor(shown), suite.extractor.device) / len(shown)
        return suite.count * (drawing + looking)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_step_end(trainer, batch_idx):
            return
        last = trainer.global_step == trainer.max_steps
        if not (last or due(trainer.global_step, self.run_log.batch_size, self.every)):
            return
        assert isinstance(pl_module, DiffusionModule)
        with self.run_log.clock.paused():
            with self.ema.applied():
                values = self.measure(trainer, "distance")
                self._keep_if_best(trainer, pl_module, values)
            if last and self.best:
                with self._best_weights(pl_module):
                    again = self.measure(trainer, "fresh distance")
                values |= {f"best/{name}": value for name, value in again.items()}
                values["best/images"] = self.best["images"]
        self.run_log.record(values)

    def measure(self, trainer: L.Trainer, what: str) -> dict[str, float]:
        """Name -> distance of what the present weights draw; each process draws and scores its share."""
        suite = self.suite()
        suite.extractor.to(trainer.strategy.root_device)
        labels = torch.arange(suite.count) * self.num_classes // suite.count
        mine = torch.arange(suite.count).tensor_split(trainer.world_size)[trainer.global_rank]
        for index in mine.split(self.config.batch_size) if len(mine) else ():
            seed = rng.key(self.seed, what)
            images = self.sampler(labels[index], self.config, seed=seed, first=int(index[0]))
            suite.update(images, index)
        return {metric_name(name, suite.extractor, suite.count): value for name, value in suite.compute().items()}

    def _keep_if_best(self, trainer: L.Trainer, module: DiffusionModule, values: dict[str, float]) -> None:
        if self.best_by is None:
            return
        name = next(n for n in values if n.split("/")[0] in {"fd": ("fd", "fid"), "kid": ("kid",)}[self.best_by])
        if values[name] >= self.best.get("value", float("inf")):
            return
        self.best = {"images": self.run_log.images, "value": values[name]}
        decay = self.ema.config.decays[0]
        average = dict(zip(self.ema.names, self.ema.whole(decay), strict=True))
        if trainer.is_global_zero:
            told = {k: str(v) for k, v in self.best.items()} | {"metric": name, "decay": str(decay)}
            tensors.write(self.path, self.ema.buffers | average, told)

    @contextmanager
    def _best_weights(self, module: DiffusionModule) -> Iterator[None]:
        """The module with the best weights while the block runs, undone on exceptions too."""
        together.wait()  # for the file
        if sharded(module.denoiser):
            best, weights = tensors.read(self.path)[0], dict(module.denoiser.named_parameters())
            with gathered(module.denoiser, list(weights.values()), [part_of(best[n], w) for n, w in weights.items()]):
                yield
            return
        before = {k: v.detach().clone() for k, v in module.denoiser.state_dict().items()}
        try:
            module.denoiser.load_state_dict(tensors.read(self.path)[0], strict=True)
            yield
        finally:
            module.denoiser.load_state_dict(before, strict=True)

    def state_dict(self) -> dict[str, Any]:
        return {"best": dict(self.best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = dict(state_dict["best"])
        if self.best and self._on_disk() != self.best["images"]:
            # The file was written after this state: training will come by there again, and must not pass it over.
            self.best = {}

    def _on_disk(self) -> float | None:
        if not self.path.is_file():
            return None
        try:
            return float(tensors.read(self.path)[1].get("images", -1))
        except UserError as e:
            print(f"warning: {e}: the best weights are looked for anew from here on")
            return None
