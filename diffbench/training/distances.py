"""Distances between samples and real images in training."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import nn

from diffbench.config.sections import SampleConfig
from diffbench.core import distributed, rng, tensors
from diffbench.core.errors import UserError
from diffbench.core.progress import span
from diffbench.data.batches import AnyDataset, image_set
from diffbench.data.sets import ImageSet
from diffbench.evaluation.reference import make_extractor, sample_labels
from diffbench.evaluation.samples import SIZE
from diffbench.evaluation.scorer import training_measurement
from diffbench.metrics import Extractor
from diffbench.metrics.extractors.base import plain
from diffbench.metrics.registry import metric_name, metric_of
from diffbench.metrics.suite import Suite
from diffbench.sampling.cost import sampling_seconds, timed
from diffbench.sampling.sampler import Sampler
from diffbench.training.callbacks import EveryNImages, check_images
from diffbench.training.clock import is_last
from diffbench.training.fsdp import shard_of, weights_replaced
from diffbench.training.module import TrainingModule


class FrechetDistance(EveryNImages):
    """Records the Fréchet and kernel distance of samples to real images.

    The samples have the same noise and labels each time, and serve nothing else. With `best`, the weights of the least
    distance stay in best.safetensors; the choice was made on those samples, so at the end (of max_steps or max_epochs)
    the best weights are scored again on fresh noise.

    Args:
        real: images to compare with, and whose classes are drawn.
        every: images between distances.
        extractor: whose features are compared: its name, a network from images (B, C, H, W) uint8 to features (B, D),
            or one that is made already. It lives outside the module: none of its weights enters a checkpoint, an
            average or a count of parameters.
        count: samples, and real images.
        sampler: draws from the network that is trained; None for the module's own.
        settings: how samples are drawn; None for `SampleConfig()`.
        seed: with a sample's number it fixes its noise.
        best: "fd" or "kid", whose least value marks the best weights; None keeps none.
    """

    stage = "scoring"

    def __init__(
        self,
        real: ImageSet | AnyDataset,
        every: int,
        extractor: str | nn.Module | Extractor,
        count: int = 500,
        sampler: Sampler | None = None,
        settings: SampleConfig | None = None,
        seed: int = 0,
        best: str | None = None,
    ) -> None:
        super().__init__(every)
        images = image_set(real)
        if isinstance(extractor, nn.Module):
            extractor = plain(type(extractor).__name__, extractor, images.shape)
        elif isinstance(extractor, str):
            extractor = make_extractor(extractor, None, images)
        self.suite = partial(Suite, training_measurement(extractor, images, count), brief=True)
        self.sampler, self.settings = sampler, settings or SampleConfig()
        self.labels, self.seed, self.best_by = sample_labels(images, count), seed, best
        self.best: dict[str, Any] = {}
        """Of the best weights: images, the metric that chose them, its value on those samples, and how these were
        drawn."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.path = self.folder / "best.safetensors"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.logger is not None and self.sampler is not None:
            assert isinstance(pl_module, TrainingModule)
            suite = self.suite()
            suite.extractor.to(trainer.strategy.root_device)
            with self.logger.clock.paused():
                each = self._cost(suite, self.sampler)
            left = trainer.max_steps * pl_module.batch_size - pl_module.images_seen
            self.logger.say(
                f"distances with {suite.extractor.name}: {suite.count:,} samples every {self.every:,} images, about"
                f" {span(each)} each, {max(1, left // self.every)} times"
            )
        super().on_train_start(trainer, pl_module)

    def _cost(self, suite: Suite, sampler: Sampler) -> float:
        shown = sampler.images(torch.zeros(8, *sampler.shape, device=suite.extractor.device))
        looking = timed(lambda: suite.extractor(shown), suite.extractor.device) / len(shown)
        return sampling_seconds(sampler, self.settings, suite.count) + suite.count * looking

    def run(self, trainer: L.Trainer, module: Any) -> None:
        with self.averaged():
            values = self.measure(trainer, module, "distance")
        self._keep_if_best(module, values)
        if is_last(trainer) and self.best:
            with self._best_weights(module):
                again = self.measure(trainer, module, "fresh distance")
            values |= {f"best/{name}": value for name, value in again.items()}
            values["best/images"] = self.best["images"]
        self.record(trainer, module, values)

    def measure(self, trainer: L.Trainer, module: Any, what: str) -> dict[str, float]:
        """Name -> distance of samples of the present weights; each rank draws and scores its slice."""
        suite = self.suite()
        suite.extractor.to(trainer.strategy.root_device)
        sampler = self.sampler or module.sampler()
        check_images(sampler)
        self.stop.interruptible(lambda: self._feed(suite, sampler, rng.key(self.seed, what)))
        return {metric_name(name, suite.extractor, suite.count): value for name, value in suite.compute().items()}

    def _feed(self, suite: Suite, sampler: Sampler, seed: int) -> None:
        mine = distributed.rank_slice(suite.count)
        for index in mine.split(SIZE) if len(mine) else ():
            images = sampler(self.labels[index], self.settings, seed=seed, first=int(index[0]), check=self.stop.check)
            suite.update(images, index, self.labels[index])

    def _keep_if_best(self, module: Any, values: dict[str, float]) -> None:
        if self.best_by is None:
            return
        found = {name: metric_of(name) for name in values}
        name = next(n for n, metric in found.items() if self.best_by in (metric.name, metric.computed))
        measured = {"metric": name, "sample": self.settings.numbers()}
        if self.best and any(self.best.get(key) != value for key, value in measured.items()):
            before = f"the best weights, of {self.best['images']:,} images, were chosen by another measure"
            (self.logger.say if self.logger else print)(f"note: {before}: {name} chooses anew")
            self.best = {}
        if values[name] >= self.best.get("value", float("inf")):
            return
        self.best = {"images": module.images_seen, "value": values[name], **measured}
        weights, decay = module.network.state_dict(), "none"
        if self.ema is not None:
            first = self.ema.config.decays[0]
            weights |= tensors.by_name(module.network, self.ema.full_average(first))
            decay = str(first)
        if distributed.rank() == 0:
            facts = {key: str(self.best[key]) for key in ("images", "value", "metric")} | {"decay": decay}
            tensors.write(self.path, weights, facts)

    @contextlib.contextmanager
    def _best_weights(self, module: Any) -> Iterator[None]:
        distributed.barrier()  # for the file
        best = tensors.read(self.path)[0]
        weights = dict(module.network.named_parameters())
        with weights_replaced(
            module.network, list(weights.values()), [shard_of(best[n], w) for n, w in weights.items()]
        ):
            yield

    def state_dict(self) -> dict[str, Any]:
        return {"best": dict(self.best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = dict(state_dict["best"])
        if self.best and self._images_on_disk() != self.best["images"]:
            # The file was written after this state: training will come by there again, and must not pass it over.
            self.best = {}

    def _images_on_disk(self) -> float | None:
        if not self.path.is_file():
            return None
        try:
            return float(tensors.read(self.path)[1].get("images", -1))
        except UserError as e:
            print(f"warning: {e}: the best weights are looked for anew from here on")
            return None
