"""One run of a noise-aware classifier, for `sample.classifier`."""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from diffbench.config.kinds import ClassifierRunConfig
from diffbench.denoisers.classifier import NoisyClassifier
from diffbench.denoisers.flops import Cost, count
from diffbench.runs import build as parts
from diffbench.runs.base import Trained, open_run

if TYPE_CHECKING:
    from lightning import Callback, LightningDataModule

    from diffbench.training.classifier import ClassifierModule
    from diffbench.training.ema import EMA
    from diffbench.training.logger import RunLog


class ClassifierRun(Trained[ClassifierRunConfig]):
    """A classifier's run folder with its network (x, t) -> logits."""

    def __init__(self, folder: Path, config: ClassifierRunConfig) -> None:
        self.train_set, self.held_out = parts.load_data(config)
        self.shape = tuple(self.train_set.images.shape[1:])
        self.process = parts.build_process(config.process)
        super().__init__(folder, config)

    def build(self) -> nn.Module:
        return _network(self.config, self.shape, self.train_set.num_classes)

    @property
    def cost(self) -> Cost:
        return _cost(self.config, self.shape, self.train_set.num_classes)

    @classmethod
    def check(cls, config: ClassifierRunConfig) -> None:
        parts.check_device(config.trainer)
        train_set, _ = parts.load_data(config)
        if train_set.num_classes < 2:
            raise ValueError(f"data.name: {config.data.name} has no classes to tell apart")
        with parts.naming("classifier"):
            _cost(config, tuple(train_set.images.shape[1:]), train_set.num_classes)

    def module(self) -> "ClassifierModule":
        from diffbench.training.classifier import ClassifierModule

        c = self.config
        return ClassifierModule(self.network, self.process, c.optimizer, c.seed, c.trainer.batch_size)

    def data(self) -> "LightningDataModule":
        return parts.data_module(self.config, self.train_set, self.held_out)

    def scores(self, log: "RunLog", ema: "EMA") -> "list[Callback]":
        from diffbench.training.classifier import Accuracy

        c = self.config
        held_out = self.held_out.spread(c.validation.count)
        return [Accuracy(log, ema, held_out, c.validation.log_snr, c.trainer.validate_images)]


def _network(config: ClassifierRunConfig, shape: tuple[int, ...], classes: int) -> NoisyClassifier:
    return NoisyClassifier(config.classifier, shape[1], shape[0], classes)


def _cost(config: ClassifierRunConfig, shape: tuple[int, ...], classes: int) -> Cost:
    return count(lambda: _network(config, shape, classes), shape[0], shape[1])


def load(folder: str | Path) -> ClassifierRun:
    """A trained classifier with its averaged weights, on the CPU.

    Raises:
        UserError: if the folder holds no classifier's run, or no weights yet.
    """
    run = open_run(folder, {"classifier": ClassifierRun})
    assert isinstance(run, ClassifierRun)
    return run
