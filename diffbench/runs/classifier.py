"""The run of a noise-aware classifier, used by `sample.classifier` and `evaluate.judge`."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn

from diffbench.config.kinds import ClassifierRunConfig, RunConfig
from diffbench.config.layers import located
from diffbench.core.errors import UserError
from diffbench.data.places import first_few
from diffbench.denoisers.classifier import NoisyClassifier
from diffbench.denoisers.flops import Cost, count
from diffbench.diffusion import Process
from diffbench.runs import build, checks
from diffbench.runs.base import Run, open_run

if TYPE_CHECKING:
    from diffbench.training.classifier import ClassifierModule


class ClassifierRun(Run[ClassifierRunConfig]):
    """The run of a classifier, a network (x, t) -> logits."""

    kind = "classifier"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the images."""
        return self.facts.shape

    @cached_property
    def process(self) -> Process:
        """The process under which it was trained."""
        return build.build_process(self.config.process)

    def build(self) -> nn.Module:
        return _network(self.config, self.facts)

    def count(self) -> Cost:
        return _cost(self.config, self.facts)

    @classmethod
    def check(cls, config: ClassifierRunConfig) -> None:
        super().check(config)
        with checks.size_errors("classifier"):
            _cost(config, checks.empty_set(config))
        train_set, _ = build.load_data(config)
        if train_set.num_classes < 2:
            raise ValueError(f"data.name: {config.data.name} has no classes to distinguish")
        with checks.size_errors("classifier"):
            _cost(config, train_set)

    def module(self) -> "ClassifierModule":
        from diffbench.training.classifier import ClassifierModule

        c = self.config
        return ClassifierModule(self.network, self.process, c.optimizer, c.seed_of("noise"))

    def callbacks(self) -> "list[Any]":
        from diffbench.training.callbacks import Accuracy

        c = self.config
        held_out = self.held_out.balanced_subset(c.validation.count)
        return [Accuracy(held_out, c.trainer.validate_images, c.validation.log_snr)]


def check_judge(config: RunConfig, shape: tuple[int, int, int], names: Sequence[str] | None = None) -> None:
    """Raise ValueError unless `evaluate.judge` is a trained classifier of images of this shape and these classes."""
    if config.evaluate.judge is None:
        return
    with located(key="evaluate.judge"):
        judge = open_run(config.evaluate.judge, [ClassifierRun])
        if not judge.has_weights:
            raise UserError(f"{judge.folder}: no weights yet; train the run first")
        if judge.shape != shape:
            raise UserError(f"{judge.folder} classifies images {judge.shape}, not {shape}")
        if names is not None and judge.facts.names != names:
            raise UserError(
                f"{judge.folder} has the classes {first_few(judge.facts.names, 10)}, not {first_few(names, 10)}"
            )


def _network(config: ClassifierRunConfig, data: build.Shaped) -> NoisyClassifier:
    return NoisyClassifier(config.classifier, build.image_size(data.shape), data.shape[0], data.num_classes)


def _cost(config: ClassifierRunConfig, data: build.Shaped) -> Cost:
    return count(lambda: _network(config, data), data.shape[0], build.image_size(data.shape))
