"""What a config describes: its data and its network, and a check of both before anything is trained or written."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from diffbench.config_kinds import BaseConfig, RunConfig
from diffbench.data.sources import SOURCES, ImageSet, balanced
from diffbench.denoisers import build
from diffbench.denoisers.cost import Cost, count
from diffbench.diffusion import PROCESSES, Process
from diffbench.references import check_extractor


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
    """The config's network for images like those of `data`."""
    channels, size, _ = data.images.shape[1:]
    return build(
        config.denoiser.name,
        config.denoiser,
        image_size=size,
        channels=channels,
        num_classes=data.num_classes,
        null_class=null_label(config, data) is not None,
        learn_sigma=getattr(config.process, "variance", None) == "learned_range",
    )


def cost_of(config: RunConfig, data: ImageSet) -> Cost:
    """Parameters and multiply-accumulates of the config's network."""
    return count(lambda: build_denoiser(config, data), data.images.shape[1], data.images.shape[2])


def check(config: RunConfig) -> None:
    """Finds what would fail only once a run is under way: in seconds, before anything is written.

    Raises:
        ValueError: a line that begins with the key.
    """
    _check_device(config.trainer.accelerator)
    for key, value in _numbers(dataclasses.asdict(config.denoiser)):
        if key == "dropout" and not 0 <= value < 1:
            raise ValueError(f"denoiser.dropout: must lie in [0, 1), got {value}")
        if key != "dropout" and value <= 0:
            raise ValueError(f"denoiser.{key}: must be positive, got {value}")
    train_set, _ = load_data(config)
    try:
        cost_of(config, train_set)
    except ValueError as e:
        # Naming the section too: the key may stand in a base, and what it does not fit on the command line.
        raise ValueError(f"{e} (section denoiser)" if str(e).startswith("denoiser.") else f"denoiser: {e}") from None
    except (RuntimeError, ArithmeticError, IndexError, TypeError) as e:
        raise ValueError(f"denoiser: no network has these sizes ({' '.join(str(e).split())[:200]})") from None
    check_evaluation(config, train_set)


def check_evaluation(config: RunConfig, train_set: ImageSet) -> None:
    """Whether the extractor can be made here, and as many real images as samples are there to compare with.

    Raises:
        ValueError: if not.
    """
    e = config.evaluate
    check_extractor(e.extractor, e.weights, train_set)
    for name, wanted in (("count", e.count), ("every_count", e.every_count if e.every_images else 0)):
        found = len(balanced(train_set.labels, wanted))
        if found < wanted and not (name == "count" and e.reference == "all"):
            rarest = int(train_set.labels.bincount().min())
            raise ValueError(
                f"evaluate.{name}: must be at most {rarest * len(train_set.labels.unique())}, as many real images of"
                f" each class as data.name={config.data.name} has, got {wanted}"
            )


def device_of(accelerator: str) -> torch.device:
    """Where networks run outside of training: on a GPU where there is one, unless the config names something else."""
    if accelerator == "mps":
        return torch.device("mps")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def _check_device(accelerator: str) -> None:
    there = {"gpu": torch.cuda.is_available() or torch.backends.mps.is_available()}
    there["mps"] = torch.backends.mps.is_available()
    if not there.get(accelerator, True):
        raise ValueError(f"trainer.accelerator: this machine has no {accelerator}; choose from auto, cpu")


def _numbers(sizes: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in sizes.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield key, number
