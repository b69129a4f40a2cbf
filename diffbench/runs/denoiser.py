"""A denoiser's run: how it is trained, and how samples are drawn from it."""

import os
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffbench.autoencoders import KLAutoencoder, io
from diffbench.config.kinds import RunConfig
from diffbench.config.layers import located
from diffbench.config.load import change
from diffbench.config.sections import SampleConfig
from diffbench.core.errors import UserError
from diffbench.data.coding import decode
from diffbench.data.facts import DataFacts, labels_for
from diffbench.data.latents import LatentSet
from diffbench.data.sets import ImageSet
from diffbench.denoisers import registry
from diffbench.denoisers.flops import Cost
from diffbench.diffusion import Process
from diffbench.evaluation import reference
from diffbench.runs import build, checks, weights
from diffbench.runs.base import Run, open_run
from diffbench.runs.classifier import ClassifierRun, check_judge
from diffbench.sampling.guided import GuidanceModels
from diffbench.sampling.sampler import Sampler
from diffbench.training import speed

if TYPE_CHECKING:
    from diffbench.training.diffusion import DiffusionModule


class DenoiserRun(Run[RunConfig]):
    """The run of a denoiser."""

    kind = "denoiser"
    _compiled = False

    @property
    def denoiser(self) -> nn.Module:
        return self.network

    @cached_property
    def process(self) -> Process:
        return build.build_process(self.config.process)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of what the network denoises: the images of the data set, or their latents."""
        own = self.folder / build.INSIDE
        if self.config.autoencoder is not None and (own / io.CONFIG).is_file():
            return io.read_config(own).latent_shape(self.facts.shape)
        return build.denoised_shape(self.config, self.facts)

    @property
    def null_label(self) -> int | None:
        """The label that means "no class", or None."""
        return build.null_label(self.config, self.facts)

    def build(self) -> nn.Module:
        return build.build_denoiser(self.config, self.facts, self.shape)

    def count(self) -> Cost:
        return build.cost_of(self.config, self.facts, self.shape)

    @cached_property
    def autoencoder(self) -> KLAutoencoder | None:
        """The autoencoder between images and latents, from the run folder if it has a copy; None in pixel space."""
        if self.config.autoencoder is None:
            return None
        own = self.folder / build.INSIDE
        try:
            return io.load(own if (own / io.CONFIG).is_file() else build.autoencoder_place(self.config.autoencoder))
        except ValueError as e:
            raise UserError(f"autoencoder: {e}") from None

    def _keep_autoencoder(self) -> None:
        """Copy the autoencoder into the run folder unless it comes from the hub; print a note if it has changed."""
        source = build.autoencoder_place(str(self.config.autoencoder))
        own = self.folder / build.INSIDE
        if not Path(source).is_dir():
            return
        if not (own / io.CONFIG).is_file():
            own.mkdir(exist_ok=True)
            for name in (io.WEIGHTS, io.CONFIG):  # the config comes last: it marks the copy as complete
                (own / name).unlink(missing_ok=True)
                try:
                    os.link(os.path.realpath(Path(source, name)), own / name)  # a hub snapshot consists of symlinks
                except OSError:  # source on another disk
                    shutil.copy2(Path(source, name), own / name)
        elif io.read_notes(own) != io.read_notes(Path(source)):
            print(f"note: {self.config.autoencoder} has changed; the run keeps using its own copy, {own}")

    @property
    def raw(self) -> bool:
        """True if samples are not images: not of one or three channels, and not decoded by an autoencoder."""
        return self.config.autoencoder is None and self.shape[0] not in (1, 3)

    @classmethod
    def check(cls, config: RunConfig) -> None:
        super().check(config)
        if config.sample.weak_model is not None or config.sample.classifier is not None:
            guidance_models(config.sample, config, build.denoised_shape(config, checks.empty_set(config)))
        check_judge(config, config.data.shape)
        checks.check(config)
        if config.evaluate.judge is not None:
            check_judge(config, config.data.shape, DataFacts.of(build.load_data(config)[0]).names)

    @classmethod
    def start(cls, config: RunConfig) -> dict[str, Tensor] | None:
        """Return the averaged weights of `init_from`, or None; ValueError if they do not fit the config's network."""
        if config.init_from is None:
            return None
        with located(key="init_from"):
            other = open_run(config.init_from, [cls])
            averaged, _ = weights.read(other.folder, other.config, other.network, other.ema)
        train_set, _ = build.load_data(config)
        with torch.device("meta"):
            ours = build.build_denoiser(config, train_set)
        if wrong := weights.mismatch(ours.state_dict(), averaged):
            raise ValueError(f"init_from: {config.init_from} has a different network: {wrong}")
        return averaged

    def prepare(self) -> None:
        """Also keep copies of the autoencoder and of the source of a custom network."""
        super().prepare()
        registry.keep_source(self.config.denoiser, self.folder)
        if self.config.autoencoder is not None:
            self._keep_autoencoder()

    def module(self) -> "DiffusionModule":
        from diffbench.training.diffusion import DiffusionModule

        c, t = self.config, self.config.trainer
        self.compile(self.cost.training_flops(t.max_images) / t.processes)
        module = DiffusionModule(
            self.network,
            self.process,
            c.optimizer,
            seed=c.seed_of("noise"),
            label_dropout=t.label_dropout if self.null_label is not None else 0.0,
            null_label=self.null_label,
            time_sampling=t.time_sampling,
            augment=t.augment,
        )
        module.in_halves = self.halves_batches and self.at_once > 1
        return module

    @property
    def halves_batches(self) -> bool:
        """Whether the halves of a training batch may be computed concurrently.

        That takes one process and a network of this package (others may have state), without dropout, not compiled.
        """
        c, t = self.config, self.config.trainer
        own = c.denoiser.name in registry.DENOISERS and not registry.is_stochastic(c.denoiser)
        return own and t.processes == 1 and t.strategy != "fsdp" and t.compile in ("auto", "none")

    def compile(self, flops: float) -> None:
        """Compile the network in place, following `trainer.compile`, for work of this many FLOPs on each device."""
        t = self.config.trainer
        if not self._compiled and t.strategy != "fsdp":
            how = speed.compile_here(self.network, t.compile, flops, build.device_of(t.accelerator).type == "cuda")
            speed.compile_network(self.network, how)
            self._compiled = how != "none"

    @cached_property
    def sets(self) -> tuple[ImageSet | LatentSet, ImageSet | LatentSet]:
        """Training and validation data: images, or their latents, which are encoded first if not cached."""
        held_out = self.held_out.balanced_subset(self.config.validation.count)
        if self.autoencoder is None:
            return self.train_set, held_out
        c, net, device = self.config, self.autoencoder, build.device_of(self.config.trainer.accelerator)
        flip = getattr(c.data, "flip", False)
        return build.encoded(c, self.train_set, net, device, flip), build.encoded(c, held_out, net, device)

    def callbacks(self) -> "list[Any]":
        from diffbench.training import FrechetDistance, SampleGrid, ValidationError

        c, t, e = self.config, self.config.trainer, self.config.evaluate
        train, held_out = self.sets
        callbacks: list[Any] = [ValidationError(held_out, t.validate_images, c.validation.log_snr, train)]
        if e.every_images is not None:
            extractor = reference.run_extractor(c, self.train_set, build.device_of(t.accelerator))
            settings, seed = c.sample.unguided(), c.seed_of("sample")
            drawn = self.sampler(settings), settings, seed, e.best
            callbacks.append(FrechetDistance(self.train_set, e.every_images, extractor, e.every_count, *drawn))
        return [*callbacks, SampleGrid(t.sample_images, self.sampler(c.sample), c.sample, self.label_names)]

    def guided_by(self, settings: SampleConfig) -> GuidanceModels:
        """Load the networks that guide sampling under these settings; errors name the key."""
        if settings.guidance != 1 and settings.weak_model is None and self.null_label is None:
            raise UserError(
                f"sample.guidance: {settings.guidance:g} needs classes, and {self.folder} was trained without; allowed:"
                " sample.guidance=1, sample.weak_model=RUN"
            )
        return guidance_models(settings, self.config, self.shape)

    def sampler(self, settings: SampleConfig, raw: bool = False) -> Sampler:
        """Return the sampler of the network, guided as in the settings; `raw` skips the autoencoder."""
        if settings.weak_model is not None and settings.guidance == 1:
            print("note: sample.weak_model has no effect at sample.guidance=1")
        models = self.guided_by(settings)
        autoencoder = None if raw else self.autoencoder  # loaded here, so that a missing one fails before sampling
        return Sampler(
            self.network,
            self.process,
            self.shape,
            self.null_label,
            models,
            decode=None if autoencoder is None else partial(decode, autoencoder),
            raw=raw or self.raw,
            name=str(self.folder),
            at_once=self.at_once if self.config.denoiser.name in registry.DENOISERS else 1,
        )

    def sample(
        self,
        n: int | None = None,
        labels: int | str | Sequence[int | str] | Tensor | None = None,
        guidance: float | None = None,
        seed: int = 0,
        **changes: Any,
    ) -> list[Image.Image]:
        """Draw samples as Pillow images; see `sample_tensor`. ValueError also if they are not images."""
        if self.raw:
            raise ValueError(f"{self.folder}: {self.shape[0]} channels are not an image; use sample_tensor")
        images = self.sample_tensor(n, labels, guidance, seed, **changes)
        arrays = images.permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(np.squeeze(a)) for a in arrays]

    def sample_tensor(
        self,
        n: int | None = None,
        labels: int | str | Sequence[int | str] | Tensor | None = None,
        guidance: float | None = None,
        seed: int = 0,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        **changes: Any,
    ) -> Tensor:
        """Draw samples, (N, C, H, W) uint8; float32 as denoised if they are not images.

        Args:
            n: number of samples; by default one for each label.
            labels: one class for all samples or one for each, see `data.facts.labels_for`; by default all classes in
                turn.
            guidance: guidance weight; by default the config's.
            seed: the noise of sample i is a function of (seed, i).
            callback: called after each step of each batch with (step, x, predicted x0).
            **changes: other keys of the `sample` section, such as steps="50" or sampler="ddim".

        Raises:
            ValueError: if a class does not exist, or the counts disagree.
            UserError: if a change is not a key of the section or is out of range, or guidance needs a null class that
                the network lacks.
        """
        if guidance is not None:
            changes["guidance"] = guidance
        settings = change(self.config, {"sample": changes}, "arguments").sample
        y = self.labels_for(n, labels)
        return self.sampler(settings)(y, settings, seed=seed, callback=callback)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes that samples can be drawn of; empty if the network takes no labels."""
        return self.facts.names if registry.takes_labels(self.config.denoiser) else ()

    def labels_for(self, n: int | None, labels: int | str | Sequence[int | str] | Tensor | None) -> Tensor:
        """Return labels (N,) of samples; see `data.facts.labels_for`. ValueError if the network takes none."""
        if labels is not None and self.facts.names and not self.label_names:
            raise ValueError("labels: denoiser.call.y=null gives this network none; leave them out")
        return labels_for(n, labels, self.facts)


def guidance_models(settings: SampleConfig, config: RunConfig, shape: tuple[int, ...]) -> GuidanceModels:
    """Load the networks that guide a denoiser of this config and shape; ValueError if one is missing or unfit."""
    weak_model = classifier = None
    with located(key="sample.weak_model"):
        if settings.weak_model is not None and settings.guidance != 1:
            other = open_run(settings.weak_model, [DenoiserRun]).use_average()
            if (other.shape, other.config.process) != (shape, config.process):
                raise UserError(f"{settings.weak_model} was trained with a different shape or process")
            if other.config.autoencoder != config.autoencoder and not build.is_experiment(config.autoencoder):
                raise UserError(f"{settings.weak_model} was trained on different latents: {other.config.autoencoder}")
            weak_model = other.network
    with located(key="sample.classifier"):
        if settings.classifier is not None and settings.classifier_scale:
            run = open_run(settings.classifier, [ClassifierRun]).use_average()
            noising = build.build_process(config.process).noising_key()
            if (run.shape, run.process.noising_key()) != (shape, noising):
                raise UserError(f"{settings.classifier} was trained with a different image shape or noise process")
            classifier = run.network
    return GuidanceModels(weak_model, classifier)
