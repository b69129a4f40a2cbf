"""What a config describes: its data and its network, and a check of both before anything is trained or written."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffbench.config.kinds import BaseConfig, RunConfig
from diffbench.config.sections import AUGMENT_WIDTH, TrainerConfig
from diffbench.core import ranks
from diffbench.data.latents import LatentSet
from diffbench.data.registry import SOURCES, ImageSet, balanced
from diffbench.denoisers import build
from diffbench.denoisers.flops import Cost, count
from diffbench.diffusion import PROCESSES, Process
from diffbench.runs import spaces

if TYPE_CHECKING:
    from diffbench.data.datamodule import PositionDataModule


def load_data(config: BaseConfig) -> tuple[ImageSet, ImageSet]:
    """The training and held-out parts of the config's data set."""
    return SOURCES[config.data.name].load(config.data)


def null_label(config: RunConfig, data: ImageSet) -> int | None:
    """The label that means "no class", or None where labels are never dropped, or there are none."""
    return data.num_classes if config.trainer.label_dropout and data.num_classes else None


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


def data_module(
    config: BaseConfig, train_set: ImageSet | LatentSet, held_out: ImageSet | LatentSet
) -> "PositionDataModule":
    """The batches of a run, of pictures or of latents as the two sets are."""
    from diffbench.data.datamodule import ImageDataModule, LatentDataModule

    return (LatentDataModule if isinstance(train_set, LatentSet) else ImageDataModule)(
        train=train_set,
        held_out=held_out,
        seed=config.seed,
        batch_size=config.trainer.batch_size,
        accumulate=config.trainer.accumulate_grad_batches,
        num_workers=config.data.num_workers,
        only_first_batch=config.debug == "overfit",
        flip=getattr(config.data, "flip", False),
        resident=config.trainer.data_on_device,
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
    check_device(config.trainer)
    check_compiler(config.trainer.compile)
    train_set, _ = load_data(config)
    if not len(train_set):
        raise ValueError(f"data.name: {config.data.name} holds no images to train on; choose another")
    if not train_set.num_classes and config.sample.guidance != 1 and config.sample.weak_model is None:
        raise ValueError(
            f"sample.guidance: {config.sample.guidance:g} needs classes, and these images have none; allowed:"
            " sample.guidance=1, sample.weak_model=RUN, or a folder with a sub-folder for each class"
        )
    spaces.shape(config, train_set)
    with naming("denoiser"):
        cost_of(config, train_set)
    if config.trainer.augment and getattr(config.denoiser, "augment_dim", None) != AUGMENT_WIDTH:
        raise ValueError(
            f"trainer.augment: denoiser.name={config.denoiser.name} is not told what was done to an image, so that the"
            f" changes would leak into samples; allowed: 0, or a network with denoiser.augment_dim={AUGMENT_WIDTH}"
        )
    try:
        check_evaluation(config, train_set)
    except Missing as e:
        if config.evaluate.extractor is not None or config.evaluate.every_images is not None:
            raise
        print(f"note: samples will not be scored: {e}")


class Missing(ValueError):
    """What a config does not ask for by name, and this machine lacks."""


def check_evaluation(config: RunConfig, train_set: ImageSet) -> None:
    """Whether the extractor can be made here, and as many real images as samples are there to compare with.

    Raises:
        ValueError: if not.
    """
    if not len(train_set):
        raise ValueError(
            f"data.name: {config.data.name} holds no images to compare samples with; name the set that has them"
        )
    e = config.evaluate
    for name, wanted in (("count", e.count), ("every_count", e.every_count if e.every_images else 0)):
        found = len(balanced(train_set.labels, wanted))
        if found < wanted and not (name == "count" and e.reference == "all"):
            rarest = int(train_set.labels.bincount().min())
            raise ValueError(
                f"evaluate.{name}: must be at most {rarest * len(train_set.labels.unique())}, as many real images of"
                f" each class as data.name={config.data.name} has, got {wanted}"
            )
    from diffbench.evaluation.reference import check_extractor  # seconds, which tables and reports need not wait

    try:
        check_extractor(e.extractor, e.weights, train_set)
    except ValueError as error:
        raise Missing(str(error)) from None


def device_of(accelerator: str) -> torch.device:
    """Where networks run outside of training: on a GPU where there is one, unless the config names something else."""
    if accelerator == "mps":
        return torch.device("mps")
    if accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", ranks.local()) if ranks.place()[1] > 1 else torch.device("cuda")


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


def check_device(trainer: TrainerConfig) -> None:
    """Raises ValueError, naming the key, where the machine or who started us lacks what `trainer` asks for."""
    accelerator, (_, world) = trainer.accelerator, ranks.place()
    there = {"gpu": torch.cuda.is_available() or torch.backends.mps.is_available()}
    there["mps"] = torch.backends.mps.is_available()
    if not there.get(accelerator, True):
        raise ValueError(f"trainer.accelerator: this machine has no {accelerator}; choose from auto, cpu")
    device = device_of("mps" if accelerator == "auto" and there["mps"] else accelerator)
    found = torch.cuda.device_count() if device.type == "cuda" else 1 if device.type == "mps" else trainer.devices
    if trainer.devices > found:
        raise ValueError(
            f"trainer.devices: must be at most {found}, as many as this machine has, got {trainer.devices}"
        )
    asked = f"trainer.devices={trainer.devices} x trainer.num_nodes={trainer.num_nodes}"
    if world != 1 and world != trainer.processes:
        raise ValueError(
            f"trainer.devices: torchrun or srun started {world} processes, and {asked} are {trainer.processes}"
        )
    if world == 1 and trainer.num_nodes > 1:
        raise ValueError(
            "trainer.num_nodes: processes on several machines are started by torchrun or srun; see the README"
        )


def check_compiler(how: str) -> None:
    """Raises ValueError, naming the key, where `trainer.compile` finds no C++ compiler: $CXX, or g++."""
    name = os.environ.get("CXX", "g++")
    if how != "none" and shutil.which(name) is None:
        raise ValueError(f"trainer.compile: {how} needs a C++ compiler, and there is no {name}; allowed: none")


def labels_for(n: int | None, labels: int | Sequence[int] | Tensor | None, classes: int) -> Tensor:
    """Labels (N,) of samples: those given, one for all, or by default the classes in turn.

    Raises:
        ValueError: if one is out of range, or the counts disagree.
    """
    if n is not None and n < 1:
        raise ValueError(f"n: must be at least 1, got {n}")
    if labels is None:
        return torch.arange(16 if n is None else n) % max(1, classes)
    y = torch.as_tensor(labels, dtype=torch.int64)
    if y.ndim == 0:
        y = y.repeat(1 if n is None else n)
    if not len(y) or (n is not None and len(y) != n):
        raise ValueError(f"labels: {len(y)} labels for n={n} samples; give one label, or one for each sample")
    if not classes:
        raise ValueError("labels: this network was trained without classes; leave them out")
    if not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(f"labels: must lie in 0 to {classes - 1}, got {int(y.min())} to {int(y.max())}")
    return y
