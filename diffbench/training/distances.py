"""Distances between samples and real images, measured during training."""

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
    """Callback that records the Fréchet and kernel distance between samples and real images.

    Every measurement uses the same noise and labels, which nothing else uses. With `best`, best.safetensors keeps the
    weights with the lowest distance. Because they were selected on those samples, they are scored again on fresh noise
    at the end of training (max_steps or max_epochs).

    Args:
        real: images to compare with; samples have the same proportions of classes.
        every: training images between measurements.
        extractor: feature extractor: its name, a network from images (B, C, H, W) uint8 to features (B, D), or an
            `Extractor`. It is not part of the module, so checkpoints, averages and parameter counts leave it out.
        count: number of samples, and of real images.
        sampler: samples from the network being trained; None for the module's own.
        settings: sampling settings; None for `SampleConfig()`.
        seed: together with a sample's index it determines its noise.
        best: "fd" or "kid", the distance that selects the best weights; None keeps none.
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
        """Facts about the best weights: images seen, the metric that selected them, its value, sampling settings."""

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
        """Estimate the seconds that one measurement takes."""
        images = sampler.images(torch.zeros(8, *sampler.shape, device=suite.extractor.device))
        extraction = timed(lambda: suite.extractor(images), suite.extractor.device) / len(images)
        return sampling_seconds(sampler, self.settings, suite.count) + suite.count * extraction

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
        """Return {name: distance} for the current weights; each rank draws and scores its share of the samples."""
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
        measured = {"metric": name, "sample": self.settings.sampling_keys()}
        if self.best and any(self.best.get(key) != value for key, value in measured.items()):
            before = f"the best weights, at {self.best['images']:,} images, were selected with other settings"
            (self.logger.say if self.logger else print)(f"note: {before}: selecting again by {name}")
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
        distributed.barrier()  # wait until rank 0 has written the file
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
            # The file is newer than this state: training will reach those weights again, and must then select them.
            self.best = {}

    def _images_on_disk(self) -> float | None:
        if not self.path.is_file():
            return None
        try:
            return float(tensors.read(self.path)[1].get("images", -1))
        except UserError as e:
            print(f"warning: {e}: selecting the best weights from here on only")
            return None
