"""One run of a denoiser: build its parts, train it, load it again, sample from it; and training of every kind."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffbench import judging, parts, weights
from diffbench.config import change, from_layers, read_layers
from diffbench.config_kinds import RunConfig
from diffbench.config_layers import blaming
from diffbench.core.errors import UserError
from diffbench.core.files import locked
from diffbench.denoisers.cost import Cost
from diffbench.folder import check_place, check_same, folder_for, has_checkpoint, read_config
from diffbench.trained import Trained
from diffbench.training.settings import SampleConfig

if TYPE_CHECKING:
    from lightning import Callback

    from diffbench.data.module import ImageDataModule
    from diffbench.training.ema import EMA
    from diffbench.training.guides import Helpers
    from diffbench.training.log import RunLog
    from diffbench.training.module import DiffusionModule


class Run(Trained[RunConfig]):
    """A denoiser's run folder with its network.

    Attributes:
        train_set: the training part of its data set.
        held_out: the other part.
        shape: (C, H, W) of what the network denoises.
        process: what it was trained under.
        null_label: the label that means "no class", or None.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.train_set, self.held_out = parts.load_data(config)
        self.shape = tuple(self.train_set.images.shape[1:])
        self.process = parts.build_process(config.process)
        self.null_label = parts.null_label(config, self.train_set)
        super().__init__(folder, config)

    @property
    def denoiser(self) -> nn.Module:
        """The network."""
        return self.network

    def build(self) -> nn.Module:
        return parts.build_denoiser(self.config, self.train_set)

    @property
    def cost(self) -> Cost:
        return parts.cost_of(self.config, self.train_set)

    @classmethod
    def check(cls, config: RunConfig) -> None:
        parts.check(config)

    @classmethod
    def start(cls, config: RunConfig) -> dict[str, Tensor] | None:
        return weights.initial(config)

    def module(self) -> "DiffusionModule":
        from diffbench.training.module import DiffusionModule

        c, t = self.config, self.config.trainer
        return DiffusionModule(
            self.network, self.process, c.optimizer, c.seed, t.batch_size, t.label_dropout, self.null_label
        )

    def data(self) -> "ImageDataModule":
        from diffbench.data.module import ImageDataModule

        c, t = self.config, self.config.trainer
        return ImageDataModule(
            train=self.train_set,
            held_out=self.held_out,
            seed=c.seed,
            batch_size=t.batch_size,
            accumulate=t.accumulate,
            num_workers=c.data.num_workers,
            only_first_batch=c.debug == "overfit",
        )

    def scores(self, log: "RunLog", ema: "EMA") -> "list[Callback]":
        from diffbench.training.sampling import SampleGrid
        from diffbench.training.validation import Validation

        c, t = self.config, self.config.trainer
        classes = self.train_set.num_classes
        return [
            Validation(log, ema, self.held_out, c.validation.log_snr, t.validate_images),
            *self._distances(log, ema),
            SampleGrid(log, ema, c.sample, self.shape, classes, t.sample_images, self.helpers(c.sample)),
        ]

    def _distances(self, log: "RunLog", ema: "EMA") -> "list[Callback]":
        c, e = self.config, self.config.evaluate
        if e.every_images is None:
            return []
        from diffbench.training.distance import Distance

        against = judging.in_training(e, self.train_set, parts.device_of(c.trainer.accelerator))
        suite, classes = partial(against.suite, brief=True), self.train_set.num_classes
        return [
            Distance(log, ema, suite, c.sample.unguided(), self.shape, classes, e.every_images, c.seed, e.best),
        ]

    def helpers(self, settings: SampleConfig) -> "Helpers":
        """The networks that guide besides the denoiser, as `weak_model` and `classifier` name them.

        Raises:
            UserError: if a folder holds no such run, or one that does not fit this.
        """
        from diffbench.training.guides import Helpers

        weak = None
        if settings.weak_model is not None and settings.guidance != 1:
            other = load(settings.weak_model)
            if (other.shape, other.config.process) != (self.shape, self.config.process):
                raise UserError(
                    f"sample.weak_model: {settings.weak_model} was trained on other shapes or under another process"
                )
            weak = other.denoiser
        return Helpers(weak)

    def sample(
        self,
        n: int | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | None = None,
        seed: int = 0,
        **changes: Any,
    ) -> list[Image.Image]:
        """Images as Pillow pictures; see `sample_tensor`."""
        images = self.sample_tensor(n, labels, guidance, seed, **changes)
        arrays = images.permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(np.squeeze(a)) for a in arrays]

    def sample_tensor(
        self,
        n: int | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | None = None,
        seed: int = 0,
        **changes: Any,
    ) -> Tensor:
        """Samples, (N, C, H, W) uint8.

        Args:
            n: how many; by default one for each label.
            labels: one class for all, or one for each; by default the classes in turn.
            guidance: weight of guidance; by default the config's.
            seed: sample i's noise follows from (seed, i).
            **changes: other keys of the `sample` section, such as steps="50" or sampler="ddim".

        Raises:
            ValueError: if a label is out of range, or the counts disagree.
            UserError: if a change is no key of the section or out of range, or guidance meets a network without a
                null class.
        """
        if guidance is not None:
            changes["guidance"] = guidance
        settings = change(self.config, {"sample": changes}, "arguments").sample
        return self.generate(self._labels(n, labels), settings, seed)

    def generate(
        self,
        labels: Tensor,
        settings: SampleConfig | None = None,
        seed: int = 0,
        first: int = 0,
        progress: Callable[[int], None] | None = None,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Pictures (N, C, H, W) uint8 of labels (N,); see `training.sampling.generate`."""
        from diffbench.training.sampling import generate  # imports Lightning

        settings = settings or self.config.sample
        return generate(
            self.denoiser,
            self.process,
            settings,
            labels,
            self.shape,
            null_label=self.null_label,
            helpers=self.helpers(settings),
            seed=seed,
            first=first,
            progress=progress,
            callback=callback,
        )

    def _labels(self, n: int | None, labels: int | Sequence[int] | Tensor | None) -> Tensor:
        classes = self.train_set.num_classes
        if n is not None and n < 1:
            raise ValueError(f"n: must be at least 1, got {n}")
        if labels is None:
            return torch.arange(16 if n is None else n) % classes
        y = torch.as_tensor(labels, dtype=torch.int64)
        if y.ndim == 0:
            y = y.repeat(1 if n is None else n)
        if not len(y) or (n is not None and len(y) != n):
            raise ValueError(f"labels: {len(y)} labels for n={n} samples; give one label, or one for each sample")
        if not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise ValueError(f"labels: must lie in 0 to {classes - 1}, got {int(y.min())} to {int(y.max())}")
        return y


def load(folder: str | Path, ema: float | None = None) -> Run:
    """A trained denoiser with its averaged weights, on the CPU, ready to sample.

    Args:
        folder: the run folder.
        ema: decay of the average, one of `config.ema.decays`; by default the first.

    Raises:
        UserError: if the folder holds no denoiser's run, no weights yet, or no such average.
    """
    folder = Path(folder)
    config = read_config(folder)
    if not isinstance(config, RunConfig):
        raise UserError(f"{folder}: a run of kind {config.kind}; choose a denoiser's")
    run = Run(folder, config)
    run.use_average(run.ema if ema is None else ema)
    return run


KINDS: dict[str, type[Trained[Any]]] = {"denoiser": Run}
"""The `kind` of a config -> what trains it."""


def train(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Trains the experiment of a YAML, resumes it, or finds it complete; returns it with averaged weights.

    Returns:
        The `Run`, or what else the config's kind is.

    Raises:
        UserError: for anything in config or folder that the user can mend.
        SystemExit: 143 or 130 after SIGTERM or SIGINT, with the state saved.
    """
    stack = read_layers(path, overrides)
    config = from_layers(stack)
    kind = KINDS[config.kind]
    folder = folder_for(Path(path), overrides, config)
    with blaming(stack):  # all that can be found before the folder is made, or Lightning imported
        kind.check(config)
        check_place(folder)
        start = None if has_checkpoint(folder) else kind.start(config)
    with locked(folder):
        existed = check_same(folder, config)
        kind(folder, config).fit(existed, start)
        trained = kind(folder, config)
        trained.use_average(trained.ema)
        return trained
