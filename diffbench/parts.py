"""What a config describes: its data and its network, and a check of both before anything is trained or written."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffbench import spaces
from diffbench.config_kinds import BaseConfig, RunConfig
from diffbench.data.latents import LatentSet
from diffbench.data.sources import SOURCES, ImageSet, balanced
from diffbench.denoisers import build
from diffbench.denoisers.cost import Cost, count
from diffbench.diffusion import PROCESSES, Process
from diffbench.training.settings import AUGMENT_WIDTH

if TYPE_CHECKING:
    from diffbench.data.module import PositionDataModule


def load_data(config: BaseConfig) -> tuple[ImageSet, ImageSet]:
    """The training and held-out parts of the config's data set."""
    return SOURCES[config.data.name].load(config.data)


def null_label(config: RunConfig, data: ImageSet) -> int | None:
    """The label that means "no class", or None where labels are never dropped."""
    return data.num_classes if config.trainer.label_dropout else None


def build_process(config: Any) -> Process:
    """The process of a section `process`."""
    return PROCESSES[config.name].build(config)


def build_denoiser(config: RunConfig, data: ImageSet) -> nn.Module:
    """The config's network for images like those of `data`, or for their latents."""
    channels, size, _ = spaces.shape(config, data)
    return build(
        config.denoiser.name,
        config.denoiser,
        image_size=size,
        channels=channels,
        num_classes=data.num_classes,
        null_class=null_label(config, data) is not None,
        learn_sigma=getattr(config.process, "variance", None) == "learned_range",
    )


def data_module(config: BaseConfig, train_set: Any, held_out: Any) -> "PositionDataModule[Any]":
    """The batches of a run, of pictures or of latents as the two sets are."""
    from diffbench.data.latent_module import LatentDataModule
    from diffbench.data.module import ImageDataModule

    kind: type[PositionDataModule[Any]] = LatentDataModule if isinstance(train_set, LatentSet) else ImageDataModule
    return kind(
        train=train_set,
        held_out=held_out,
        seed=config.seed,
        batch_size=config.trainer.batch_size,
        accumulate=config.trainer.accumulate,
        num_workers=config.data.num_workers,
        only_first_batch=config.debug == "overfit",
    )


def cost_of(config: RunConfig, data: ImageSet) -> Cost:
    """Parameters and multiply-accumulates of the config's network."""
    channels, size, _ = spaces.shape(config, data)
    return count(lambda: build_denoiser(config, data), channels, size)


def check(config: RunConfig) -> None:
    """Finds what would fail only once a run is under way: in seconds, before anything is written.

    Raises:
        ValueError: a line that begins with the key.
    """
    check_device(config.trainer.accelerator)
    check_sizes("denoiser", config.denoiser)
    train_set, _ = load_data(config)
    spaces.shape(config, train_set)
    with naming("denoiser"):
        cost_of(config, train_set)
    if config.trainer.augment and getattr(config.denoiser, "augment_dim", None) != AUGMENT_WIDTH:
        raise ValueError(
            f"trainer.augment: denoiser.name={config.denoiser.name} is not told what was done to an image, so that the"
            f" changes would leak into samples; allowed: 0, or a network with denoiser.augment_dim={AUGMENT_WIDTH}"
        )
    check_evaluation(config, train_set)


def check_evaluation(config: RunConfig, train_set: ImageSet) -> None:
    """Whether as many real images as samples are there to compare with.

    Raises:
        ValueError: if not.
    """
    found = len(balanced(train_set.labels, config.evaluate.count))
    if found < config.evaluate.count:
        rarest = int(train_set.labels.bincount(minlength=train_set.num_classes).min())
        raise ValueError(
            f"evaluate.count: must be at most {rarest * train_set.num_classes}, as many real images of each class as"
            f" data.name={config.data.name} has, got {config.evaluate.count}"
        )


def check_sizes(section: str, config: Any) -> None:
    """Whether the sizes of a network are positive, and its dropout is a share.

    Raises:
        ValueError: naming the key.
    """
    for key, value in _numbers(dataclasses.asdict(config)):
        if key == "dropout" and not 0 <= value < 1:
            raise ValueError(f"{section}.dropout: must lie in [0, 1), got {value}")
        if key != "dropout" and value <= 0:
            raise ValueError(f"{section}.{key}: must be positive, got {value}")


@contextlib.contextmanager
def naming(section: str) -> Iterator[None]:
    """Makes whatever a network of impossible sizes raises begin with its section."""
    try:
        yield
    except ValueError as e:
        # Naming the section too: the key may stand in a base, and what it does not fit on the command line.
        named = str(e).startswith(f"{section}.")
        raise ValueError(f"{e} (section {section})" if named else f"{section}: {e}") from None
    except (RuntimeError, ArithmeticError, IndexError, TypeError) as e:
        raise ValueError(f"{section}: no network has these sizes ({' '.join(str(e).split())[:200]})") from None


def check_device(accelerator: str) -> None:
    """Raises ValueError, naming the key, where the machine lacks what `trainer.accelerator` asks for."""
    there = {"gpu": torch.cuda.is_available() or torch.backends.mps.is_available()}
    there["mps"] = torch.backends.mps.is_available()
    if not there.get(accelerator, True):
        raise ValueError(f"trainer.accelerator: this machine has no {accelerator}; choose from auto, cpu")


def _numbers(sizes: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in sizes.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield key, number
