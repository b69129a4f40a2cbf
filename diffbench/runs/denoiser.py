"""One run of a denoiser: its parts, what trains it, and samples from it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from diffbench.autoencoders import KLAutoencoder
from diffbench.config.kinds import RunConfig
from diffbench.config.load import change
from diffbench.config.sample_sections import SampleConfig
from diffbench.core import ranks
from diffbench.core.errors import UserError
from diffbench.core.files import write_text
from diffbench.data.coding import decode
from diffbench.data.latents import LatentSet
from diffbench.data.sets import ImageSet
from diffbench.denoisers.flops import Cost
from diffbench.evaluation import judging
from diffbench.runs import build as parts
from diffbench.runs import classifier as classifier_run
from diffbench.runs import spaces, weights
from diffbench.runs.base import Trained, open_run

if TYPE_CHECKING:
    from lightning import Callback, LightningDataModule

    from diffbench.sampling.guided import GuidanceModels
    from diffbench.sampling.sampler import Sampler
    from diffbench.training.ema import EMA
    from diffbench.training.logger import RunLog
    from diffbench.training.module import DiffusionModule


class Run(Trained[RunConfig]):
    """A denoiser's run folder with its network.

    Attributes:
        train_set: the training part of its data set.
        held_out: the other part.
        shape: (C, H, W) of what the network denoises: the data set's pictures, or their latents.
        process: what it was trained under.
        null_label: the label that means "no class", or None.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.train_set, self.held_out = parts.load_data(config)
        self.shape = spaces.shape(config, self.train_set)
        self.process = parts.build_process(config.process)
        self.null_label = parts.null_label(config, self.train_set)
        super().__init__(folder, config)

    @property
    def denoiser(self) -> nn.Module:
        """The network."""
        return self.network

    @cached_property
    def autoencoder(self) -> KLAutoencoder | None:
        """What leads from pictures to latents and back, or None in pixel space.

        Raises:
            UserError: if there is none, or the denoiser was trained on another's latents.
        """
        source, known = self.config.autoencoder, self.folder / "autoencoder.txt"
        if source is None:
            return None
        net = spaces.load_autoencoder(source)
        if known.is_file() and (before := known.read_text().strip()) != net.fingerprint:
            raise UserError(
                f"{self.folder}: trained on the latents of autoencoder {before}, but {source} holds {net.fingerprint}"
                " now; bring that back, or choose another tag=NAME"
            )
        return net

    def build(self) -> nn.Module:
        return parts.build_denoiser(self.config, self.train_set)

    def fit(self, existed: bool, start: dict[str, Tensor] | None) -> None:
        """Trains as every kind does; a run in latent space notes whose latents they are."""
        if self.autoencoder is not None and ranks.leads():
            write_text(self.folder / "autoencoder.txt", f"{self.autoencoder.fingerprint}\n")
        super().fit(existed, start)

    @property
    def raw(self) -> bool:
        """Whether what the network denoises neither is a picture, grey or red, green and blue, nor becomes one."""
        return self.config.autoencoder is None and self.shape[0] not in (1, 3)

    @property
    def cost(self) -> Cost:
        return parts.cost_of(self.config, self.train_set)

    @classmethod
    def check(cls, config: RunConfig) -> None:
        parts.check(config)
        if config.sample.weak_model is not None or config.sample.classifier is not None:
            guidance_models(config.sample, config, spaces.shape(config, parts.load_data(config)[0]))

    @classmethod
    def start(cls, config: RunConfig) -> dict[str, Tensor] | None:
        return weights.initial(config)

    def module(self) -> "DiffusionModule":
        from diffbench.training.module import DiffusionModule
        from diffbench.training.speed import compile_network

        c, t = self.config, self.config.trainer
        compile_network(self.network, t.compile)
        return DiffusionModule(
            self.network,
            self.process,
            c.optimizer,
            c.seed,
            t.batch_size,
            label_dropout=t.label_dropout if self.null_label is not None else 0.0,
            null_label=self.null_label,
            time_sampling=t.time_sampling,
            augment=t.augment,
        )

    def data(self) -> "LightningDataModule":
        return parts.data_module(self.config, *self.sets)

    @cached_property
    def sets(self) -> tuple[ImageSet | LatentSet, ImageSet | LatentSet]:
        """What training and validation read: the pictures, or their latents, encoded where they are not yet."""
        held_out = self.held_out.spread(self.config.validation.count)
        if self.autoencoder is None:
            return self.train_set, held_out
        c, net, device = self.config, self.autoencoder, parts.device_of(self.config.trainer.accelerator)
        flip = getattr(c.data, "flip", False)
        return spaces.encoded(c, self.train_set, net, device, flip), spaces.encoded(c, held_out, net, device)

    def scores(self, log: "RunLog", ema: "EMA") -> "list[Callback]":
        from diffbench.training.sample_grid import SampleGrid
        from diffbench.training.validation import Validation

        c, t = self.config, self.config.trainer
        classes = self.train_set.num_classes
        return [
            Validation(log, ema, self.sets[1], c.validation.log_snr, t.validate_images),
            *self._distances(log, ema),
            SampleGrid(log, ema, self.sampler(c.sample), c.sample, classes, t.sample_images),
        ]

    def _distances(self, log: "RunLog", ema: "EMA") -> "list[Callback]":
        c, e = self.config, self.config.evaluate
        if e.every_images is None:
            return []
        from diffbench.training.distance import Distance

        against = judging.in_training(e, self.train_set, parts.device_of(c.trainer.accelerator))
        suite, classes = partial(against.suite, brief=True), self.train_set.num_classes
        how = c.sample.unguided()
        return [Distance(log, ema, suite, self.sampler(how), how, classes, e.every_images, c.seed, e.best)]

    def guidance_models(self, settings: SampleConfig) -> "GuidanceModels":
        """The networks that guide besides the denoiser; see `guidance_models`."""
        return guidance_models(settings, self.config, self.shape)

    def sampler(self, settings: SampleConfig) -> "Sampler":
        """What draws images from the network, guided as the settings say."""
        from diffbench.sampling.sampler import Sampler

        autoencoder = self.autoencoder  # missed now rather than after hours of sampling
        return Sampler(
            self.denoiser,
            self.process,
            self.shape,
            self.null_label,
            self.guidance_models(settings),
            decode=None if autoencoder is None else partial(decode, autoencoder),
            raw=self.raw,
            name=str(self.folder),
        )

    def sample(
        self,
        n: int | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | None = None,
        seed: int = 0,
        **changes: Any,
    ) -> list[Image.Image]:
        """Images as Pillow pictures; see `sample_tensor`.

        Raises:
            ValueError: also if what the network denoises is no picture.
        """
        if self.raw:
            raise ValueError(f"{self.folder}: {self.shape[0]} channels make no picture; take sample_tensor")
        images = self.sample_tensor(n, labels, guidance, seed, **changes)
        arrays = images.permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(np.squeeze(a)) for a in arrays]

    def sample_tensor(
        self,
        n: int | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | None = None,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        **changes: Any,
    ) -> Tensor:
        """Samples, (N, C, H, W) uint8; float32 as denoised where they are no pictures.

        Args:
            n: how many; by default one for each label.
            labels: one class for all, or one for each; by default the classes in turn.
            guidance: weight of guidance; by default the config's.
            seed: sample i's noise follows from (seed, i).
            progress: called with the number of images done after each batch.
            callback: called after each step of each batch with (step, x, predicted x0).
            **changes: other keys of the `sample` section, such as steps="50" or sampler="ddim".

        Raises:
            ValueError: if a label is out of range, or the counts disagree.
            UserError: if a change is no key of the section or out of range, or guidance meets a network without a
                null class.
        """
        if guidance is not None:
            changes["guidance"] = guidance
        settings = change(self.config, {"sample": changes}, "arguments").sample
        y = parts.labels_for(n, labels, self.train_set.num_classes)
        return self.generate(y, settings, seed, progress=progress, callback=callback)

    def generate(
        self,
        labels: Tensor,
        settings: SampleConfig | None = None,
        seed: int = 0,
        first: int = 0,
        progress: Callable[[int], None] | None = None,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Images (N, C, H, W) uint8 of labels (N,), or raw float32; see `Sampler`."""
        settings = settings or self.config.sample
        sampler = self.sampler(settings)
        return sampler(labels, settings, seed=seed, first=first, progress=progress, callback=callback)

    def pictures(self, n: int) -> Tensor:
        """Samples of the classes in turn."""
        return self.sample_tensor(n)


def load(folder: str | Path, ema: float | None = None) -> Run:
    """A trained denoiser with its averaged weights, on the CPU, ready to sample.

    Args:
        folder: the run folder.
        ema: decay of the average, one of `config.ema.decays`; by default the first.

    Raises:
        UserError: if the folder holds no denoiser's run, no weights yet, or no such average.
    """
    run = open_run(folder, {"denoiser": Run}, ema)
    assert isinstance(run, Run)
    return run


def guidance_models(settings: SampleConfig, config: RunConfig, shape: tuple[int, ...]) -> "GuidanceModels":
    """The networks that guide a denoiser of this config and shape, as `weak_model` and `classifier` name them.

    Raises:
        ValueError: if a folder holds no such run, or one that does not fit.
    """
    from diffbench.sampling.guided import GuidanceModels

    weak = judge = None
    with naming_key("sample.weak_model"):
        if settings.weak_model is not None and settings.guidance != 1:
            other = load(settings.weak_model)
            if (other.shape, other.config.process) != (shape, config.process):
                raise UserError(f"{settings.weak_model} was trained on other shapes or under another process")
            if other.config.autoencoder != config.autoencoder and not spaces.is_experiment(config.autoencoder or ""):
                raise UserError(f"{settings.weak_model} was trained on other latents: {other.config.autoencoder}")
            weak = other.denoiser
    with naming_key("sample.classifier"):
        if settings.classifier is not None and settings.classifier_scale:
            found = classifier_run.load(settings.classifier)
            noising = parts.build_process(config.process).noising()
            if (found.shape, found.process.noising()) != (shape, noising):
                raise UserError(f"{settings.classifier} was trained on images of another shape or noise")
            judge = found.network
    return GuidanceModels(weak, judge)


@contextlib.contextmanager
def naming_key(key: str) -> Iterator[None]:
    """Puts a key before what a UserError says."""
    try:
        yield
    except UserError as e:
        raise ValueError(f"{key}: {e}") from None
