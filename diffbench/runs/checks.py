"""Checks of a config against this machine and its data; quick, and made before anything is written."""

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from diffbench.config.kinds import BaseConfig, RunConfig
from diffbench.config.layers import located
from diffbench.config.sections import AUGMENT_WIDTH, EvaluateConfig
from diffbench.config.trainer import TrainerConfig
from diffbench.core import distributed
from diffbench.core.errors import UserError
from diffbench.core.files import cache_folder
from diffbench.data.sets import ImageSet
from diffbench.denoisers import registry
from diffbench.evaluation.reference import extractor_request, make_extractor, suited_extractor
from diffbench.metrics.extractors.base import Request
from diffbench.metrics.extractors.base import check as check_extractor
from diffbench.runs.build import build_denoiser, build_process, cost_of, denoised_shape, device_of, load_data
from diffbench.training.speed import missing_compiler


def check(config: RunConfig) -> None:
    """Find errors that would otherwise appear only during training; a ValueError names the key."""
    with size_errors("denoiser"):  # checked before images are decoded, which may take hours
        cost_of(config, empty_set(config))
    if config.evaluate.extractor is not None:
        check_named_extractor(config.evaluate.extractor, config.evaluate.weights, config.data.shape)
    train_set, _ = load_data(config)
    if not len(train_set):
        raise ValueError(f"data.name: {config.data.name} has no images to train on; choose another")
    if not train_set.num_classes and config.sample.guidance != 1 and config.sample.weak_model is None:
        raise ValueError(
            f"sample.guidance: {config.sample.guidance:g} needs classes, and these images have none; allowed:"
            " sample.guidance=1, sample.weak_model=RUN, or a folder with a sub-folder for each class"
        )
    with size_errors("denoiser"):
        cost_of(config, train_set)
    check_output(config, train_set)
    check_custom_extractor(config.evaluate.extractor, config.evaluate.weights, train_set)
    if config.trainer.augment and getattr(config.denoiser, "augment_dim", None) != AUGMENT_WIDTH:
        raise ValueError(
            f"trainer.augment: denoiser.name={config.denoiser.name} takes no augmentation label, so augmentations"
            f" would leak into samples; allowed: 0, or a network with denoiser.augment_dim={AUGMENT_WIDTH}"
        )
    try:
        check_evaluation(config, train_set)
    except Unscored as e:
        print(f"note: samples will not be scored: {e}")


def check_machine(trainer: TrainerConfig) -> None:
    """Raise an error unless this machine has the devices, loggers and compiler of `trainer`, and a writable cache."""
    if "wandb" in trainer.logger and importlib.util.find_spec("wandb") is None:
        raise ValueError("trainer.logger: wandb is not installed; `pip install wandb`, or leave it at [tensorboard]")
    check_device(trainer)
    mode, compiler = getattr(trainer, "compile", "none"), missing_compiler()
    if mode in ("block", "model") and compiler is not None:
        raise ValueError(
            f"trainer.compile: {mode} needs a C++ compiler, and there is no {compiler}; allowed: auto, none"
        )
    folder = cache_folder()  # checked now because scoring needs it, after hours of training
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(
            f"{folder}: the cache is not writable ({e.strerror}); set DIFFBENCH_CACHE to a writable folder"
        ) from None


def empty_set(config: BaseConfig) -> ImageSet:
    """Return an empty set with the data set's shape, without decoding its images."""
    return ImageSet(torch.empty(0, *config.data.shape, dtype=torch.uint8), torch.empty(0), 2)


def check_named_extractor(name: str, weights: str | None, shape: tuple[int, int, int]) -> None:
    """Check what does not depend on the images: an extractor's name, packages and file of weights."""

    def unread() -> Any:
        raise AssertionError("a check reads no images")

    check_extractor(name, Request(shape, weights, training=unread))


def check_custom_extractor(name: str | None, weights: str | None, train_set: ImageSet) -> None:
    """Raise ValueError if a user's extractor (module:function) cannot be made or does not fit the images."""
    if name is not None and ":" in name:
        make_extractor(name, weights, train_set)


def refuse_unused(values: Mapping[str, Any], used: Sequence[str]) -> None:
    """Raise ValueError for a key of the section `evaluate` that a command does not use."""
    if unused := [key for key in values if key in vars(EvaluateConfig()) and key not in used]:
        allowed = ", ".join(f"evaluate.{key}" for key in used)
        raise ValueError(f"evaluate.{unused[0]}: has no effect here; allowed: {allowed}")


def check_output(config: RunConfig, data: ImageSet) -> None:
    """Raise ValueError unless the network's output has its input's shape, with a learned variance twice the channels.

    A custom network is run on two images, on its training device.
    """
    channels, height, width = denoised_shape(config, data)
    process, device = build_process(config.process), device_of(config.trainer.accelerator)
    u = torch.tensor([0.25, 0.75], dtype=torch.float64)
    x, t = process.inputs(
        torch.linspace(-1, 1, 2 * channels * height * width).reshape(2, channels, height, width), process.time(u)
    )
    out_channels = 2 * channels if process.learn_sigma else channels
    registry.check(config.denoiser, lambda: build_denoiser(config, data), x.to(device), t.to(device), out_channels)


class Unscored(ValueError):
    """Reason why samples cannot be scored; training is possible all the same."""


def check_evaluation(config: RunConfig, train_set: ImageSet) -> None:
    """Raise ValueError unless the extractor is available and there are as many real images as samples."""
    if not len(train_set):
        raise ValueError(
            f"data.name: {config.data.name} has no images to compare samples with; choose the data set that has them"
        )
    e, available = config.evaluate, len(train_set)
    try:
        check_extractor(suited_extractor(config), extractor_request(train_set, e.weights))
    except ValueError as error:
        if e.extractor is not None or e.weights is not None or e.every_images is not None:
            raise
        raise Unscored(str(error)) from None
    limit = f"must be at most {available}, the number of training images of data.name={config.data.name}"
    if e.every_images and available < e.every_count:
        raise ValueError(f"evaluate.every_count: {limit}, got {e.every_count}")
    if available < e.count and e.reference == "same":
        raise Unscored(f"evaluate.count: {limit}, got {e.count}; or compare with all of them: evaluate.reference=all")


@contextlib.contextmanager
def size_errors(section: str) -> Iterator[None]:
    """Context manager that turns errors of impossible network sizes into a ValueError that begins with the section."""
    with located(key=section):
        try:
            yield
        except (RuntimeError, ArithmeticError, IndexError, TypeError) as e:
            raise ValueError(f"no network has these sizes ({' '.join(str(e).split())[:200]})") from None


def check_device(trainer: TrainerConfig) -> None:
    """Raise ValueError, naming the key, if the machine or the launcher lacks the devices that `trainer` asks for."""
    accelerator, (_, world) = trainer.accelerator, distributed.rank_and_world()
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator: this machine has no CUDA GPU; choose from auto, cpu")
    available = torch.cuda.device_count() if device_of(accelerator).type == "cuda" else trainer.devices
    if trainer.devices > available:
        raise ValueError(f"trainer.devices: must be at most {available}, as on this machine, got {trainer.devices}")
    product = f"trainer.devices={trainer.devices} x trainer.num_nodes={trainer.num_nodes}"
    if world != 1 and world != trainer.processes:
        raise ValueError(
            f"trainer.devices: torchrun or srun started {world} processes, but {product} are {trainer.processes}"
        )
    if world == 1 and trainer.num_nodes > 1:
        raise ValueError("trainer.num_nodes: start processes on several machines with torchrun or srun; see the README")
