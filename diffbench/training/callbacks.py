"""What is measured and drawn in training: every so many images, with averaged weights, and off the training clock."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from diffbench.autoencoders import KLAutoencoder
from diffbench.config.sections import SampleConfig
from diffbench.core import distributed, rng, tensors
from diffbench.core.errors import UserError
from diffbench.core.progress import span
from diffbench.data.coding import at_once, reconstruct, side_by_side
from diffbench.data.latents import LatentSet
from diffbench.data.sets import ImageSet
from diffbench.evaluation.validation_error import (
    accuracy,
    accuracy_metrics,
    bound_metrics,
    classified,
    error_sums,
    mean_errors,
    validation_sets,
)
from diffbench.metrics.reconstruction import psnr, ssim
from diffbench.metrics.registry import metric_name, metric_of
from diffbench.metrics.suite import Suite
from diffbench.sampling.cost import network_evaluations, seconds_per_evaluation, timed
from diffbench.sampling.images import Trajectory, class_columns
from diffbench.sampling.sampler import Sampler
from diffbench.training.clock import at_step_end, due
from diffbench.training.ema import EMA
from diffbench.training.fsdp import shard_of, weights_replaced
from diffbench.training.logger import RunLogger
from diffbench.training.signals import Interrupted, StopOnSignal


class EveryNImages(L.Callback):
    """Calls `act` every `every` images, with averaged weights in place and the training clock paused.

    A signal interrupts it, if it calls `stop.check` between batches inside `stop.interruptible`; see `StopOnSignal`.

    Args:
        logger: records what is found; its clock stands still meanwhile.
        ema: the averages; the first one is in place.
        every: images between two calls.
    """

    stage = "validating"
    """What a bar says meanwhile."""
    at_end = True
    """Whether to act after the last step too, wherever it falls."""

    def __init__(self, logger: RunLogger, ema: EMA, every: int) -> None:
        self.logger, self.ema, self.every = logger, ema, every

    def act(self, trainer: L.Trainer, module: Any) -> None:
        """Measures or draws; called on all ranks. May raise Interrupted, on all of them."""
        raise NotImplementedError

    def run(self, trainer: L.Trainer, module: Any) -> None:
        """Calls `act` with averaged weights in place."""
        with self.ema.applied():
            self.act(trainer, module)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        found = [callback for callback in trainer.callbacks if isinstance(callback, StopOnSignal)]  # type: ignore[attr-defined]
        self.stop = found[0] if found else StopOnSignal(self.logger.folder, trainer.max_steps)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.state_key in self.stop.owed:
            self._run(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_step_end(trainer, batch_idx):
            return
        if (self.at_end and is_last(trainer)) or due(trainer.global_step, self.logger.batch_size, self.every):
            self._run(trainer, pl_module)

    def _run(self, trainer: L.Trainer, module: Any) -> None:
        owed = [key for key in self.stop.owed if key != self.state_key]
        try:
            with self.logger.paused(self.stage):
                self.run(trainer, module)
        except Interrupted:
            owed.append(self.state_key)
        self.stop.owed = owed


def is_last(trainer: L.Trainer) -> bool:
    """Whether all steps are done."""
    return trainer.global_step == trainer.max_steps


class Validation(EveryNImages):
    """Records a denoiser's bound and its errors by noise level, on held-out and on as many training images.

    Args:
        logger: records the values.
        ema: the averages; the first is measured.
        held_out: images or latents.
        log_snr: (levels,) rising.
        every: images between two measurements.
        train: what is trained on; None measures held-out images alone.
    """

    def __init__(
        self,
        logger: RunLogger,
        ema: EMA,
        held_out: ImageSet | LatentSet,
        log_snr: Sequence[float],
        every: int,
        train: ImageSet | LatentSet | None = None,
    ) -> None:
        super().__init__(logger, ema, every)
        self.sets, self.log_snr = validation_sets(held_out, train), log_snr
        logger.levels = log_snr

    def act(self, trainer: L.Trainer, module: Any) -> None:
        values: dict[str, float] = {}
        for part, sums in self.stop.interruptible(lambda: self._sums(module)).items():
            values |= bound_metrics(part, mean_errors(self.log_snr, sums))
        self.logger.record(values)

    def _sums(self, module: Any) -> dict[str, Tensor]:
        return {
            part: error_sums(module.network, module.process, data, self.log_snr, check=self.stop.check)
            for part, data in self.sets.items()
        }


class Accuracy(EveryNImages):
    """Records a noise-aware classifier's accuracy on held-out images."""

    def __init__(self, logger: RunLogger, ema: EMA, data: ImageSet, log_snr: Sequence[float], every: int) -> None:
        super().__init__(logger, ema, every)
        self.data, self.log_snr = data, log_snr

    def act(self, trainer: L.Trainer, module: Any) -> None:
        right = self.stop.interruptible(
            lambda: classified(module.network, module.process, self.data, self.log_snr, check=self.stop.check)
        )
        self.logger.record(accuracy_metrics(accuracy(self.log_snr, right, len(self.data))))


class Reconstructions(EveryNImages):
    """Records PSNR and SSIM of an autoencoder's reconstructions of held-out images, and the divergence of latents."""

    def __init__(self, logger: RunLogger, ema: EMA, data: ImageSet, every: int) -> None:
        super().__init__(logger, ema, every)
        self.images = data.images

    def act(self, trainer: L.Trainer, module: Any) -> None:
        mine = self.images[distributed.rank_slice(len(self.images))]  # each rank has some
        found = self.stop.interruptible(lambda: self._reconstruct(module.network, mine))
        restored, divergence = map(distributed.all_gather_rows, found)
        scores = {"val/psnr": psnr(restored, self.images), "val/ssim": ssim(restored, self.images)}
        self.logger.record(scores | {"val/kl": float(divergence.double().mean())})

    def _reconstruct(self, autoencoder: KLAutoencoder, images: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for part in images.split(at_once(*images.shape[2:])):
            self.stop.check()
            parts.append(reconstruct(autoencoder, part))
        return torch.cat([restored for restored, _ in parts]), torch.cat([divergence for _, divergence in parts])


class ReconstructionGrid(EveryNImages):
    """Draws held-out images above their reconstructions; PNG and TensorBoard."""

    def __init__(self, logger: RunLogger, ema: EMA, data: ImageSet, every: int) -> None:
        super().__init__(logger, ema, every)
        self.images = data.images[:40]

    def act(self, trainer: L.Trainer, module: Any) -> None:
        autoencoder: KLAutoencoder = module.network
        self.logger.record_grid(side_by_side(autoencoder, self.images), 10)


class SampleGrid(EveryNImages):
    """Draws a grid of samples with fixed noise, a named column for each class; PNG and TensorBoard.

    Args:
        class_names: by label; none for a network without classes.
    """

    stage, at_end = "sampling", False

    def __init__(
        self,
        logger: RunLogger,
        ema: EMA,
        sampler: Sampler,
        config: SampleConfig,
        class_names: Sequence[str],
        every: int,
    ) -> None:
        super().__init__(logger, ema, every)
        self.sampler, self.config, self.class_names = sampler, config, class_names

    def act(self, trainer: L.Trainer, module: Any) -> None:
        trajectory = Trajectory(self.sampler.images)
        columns, names = class_columns(len(self.class_names)), self.class_names
        labels = torch.arange(columns).repeat(4) % max(1, len(names))

        def watch(step: int, x: Tensor, x0: Tensor) -> None:
            self.stop.check()
            trajectory(step, x, x0)

        split = len(labels) >= distributed.world_size()  # of fewer, each rank draws all
        mine = distributed.rank_slice(len(labels)) if split else torch.arange(len(labels))
        images = self.stop.interruptible(
            lambda: self.sampler(labels[mine], self.config, first=int(mine[0]), callback=watch)
        )
        images = distributed.all_gather_rows(images) if split else images
        self.logger.record_grid(images, columns, [names[label] for label in labels] if names else None)
        self.logger.show_image("samples/steps", trajectory.strip())


class Distance(EveryNImages):
    """Records the Fréchet and kernel distance of samples to real images.

    The samples have the same noise and labels each time, and serve nothing else. With `best`, the weights of the least
    distance stay in best.safetensors; the choice was made on those samples, so at the end the best weights are scored
    again on fresh noise.

    Args:
        logger: records the values.
        ema: the averages; the first is scored.
        suite: makes the metrics, empty. They live here, outside the module: no weight of an extractor enters a
            checkpoint, an average or a count of parameters.
        sampler: draws from the network that is trained.
        config: how samples are drawn.
        labels: (N,) that samples are drawn for.
        every: images between distances.
        seed: of the run; with a sample's number it fixes its noise.
        best: "fd" or "kid", whose least value marks the best weights; None keeps none.
    """

    def __init__(
        self,
        logger: RunLogger,
        ema: EMA,
        suite: Callable[[], Suite],
        sampler: Sampler,
        config: SampleConfig,
        labels: Tensor,
        every: int,
        seed: int,
        best: str | None = None,
    ) -> None:
        super().__init__(logger, ema, every)
        self.suite, self.sampler, self.config = suite, sampler, config
        self.labels, self.seed, self.best_by = labels, seed, best
        self.best: dict[str, float] = {}
        """Of the best weights: images, and value of the metric on the samples that chose them."""

    @property
    def path(self) -> Path:
        """Where the best weights stay."""
        return self.logger.folder / "best.safetensors"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        suite = self.suite()
        suite.extractor.to(trainer.strategy.root_device)
        with self.logger.clock.paused():
            each = self._cost(suite)
        left = trainer.max_steps * self.logger.batch_size - self.logger.images
        self.logger.say(
            f"distances with {suite.extractor.name}: {suite.count:,} samples every {self.every:,} images, about"
            f" {span(each)} each, {max(1, left // self.every)} times"
        )
        super().on_train_start(trainer, pl_module)

    def _cost(self, suite: Suite) -> float:
        once = seconds_per_evaluation(self.sampler, self.config.batch_size)
        drawing = once * network_evaluations(self.sampler.process, self.config)
        shown = self.sampler.images(torch.zeros(8, *self.sampler.shape, device=suite.extractor.device))
        looking = timed(lambda: suite.extractor(shown), suite.extractor.device) / len(shown)
        return suite.count * (drawing + looking)

    def run(self, trainer: L.Trainer, module: Any) -> None:
        with self.ema.applied():
            values = self.measure(trainer, "distance")
        self._keep_if_best(module.network, values)
        if is_last(trainer) and self.best:
            with self._best_weights(module):
                again = self.measure(trainer, "fresh distance")
            values |= {f"best/{name}": value for name, value in again.items()}
            values["best/images"] = self.best["images"]
        self.logger.record(values)

    def measure(self, trainer: L.Trainer, what: str) -> dict[str, float]:
        """Name -> distance of samples of the present weights; each rank draws and scores its slice."""
        suite = self.suite()
        suite.extractor.to(trainer.strategy.root_device)
        self.stop.interruptible(lambda: self._feed(suite, rng.key(self.seed, what)))
        return {metric_name(name, suite.extractor, suite.count): value for name, value in suite.compute().items()}

    def _feed(self, suite: Suite, seed: int) -> None:
        mine = distributed.rank_slice(suite.count)
        for index in mine.split(self.config.batch_size) if len(mine) else ():
            images = self.sampler(
                self.labels[index], self.config, seed=seed, first=int(index[0]), callback=self.stop.check
            )
            suite.update(images, index)

    def _keep_if_best(self, network: nn.Module, values: dict[str, float]) -> None:
        if self.best_by is None:
            return
        found = {name: metric_of(name) for name in values}
        name = next(n for n, metric in found.items() if self.best_by in (metric.name, metric.computed))
        if values[name] >= self.best.get("value", float("inf")):
            return
        self.best = {"images": self.logger.images, "value": values[name]}
        decay = self.ema.config.decays[0]
        names = [name for name, _ in network.named_parameters()]
        weights = network.state_dict() | dict(zip(names, self.ema.full_average(decay), strict=True))
        if distributed.rank() == 0:
            facts = {k: str(v) for k, v in self.best.items()} | {"metric": name, "decay": str(decay)}
            tensors.write(self.path, weights, facts)

    @contextmanager
    def _best_weights(self, module: Any) -> Iterator[None]:
        """The module with the best weights while the block runs."""
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
