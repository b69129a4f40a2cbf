"""Builds what a config describes: data, process, network, and the autoencoder between images and latents."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffbench.autoencoders import KLAutoencoder, io
from diffbench.config.kinds import AutoencoderConfig, BaseConfig, RunConfig
from diffbench.config.layers import located
from diffbench.config.load import load
from diffbench.core import distributed
from diffbench.core.files import cache_folder
from diffbench.core.store import Store
from diffbench.data.coding import at_once
from diffbench.data.facts import DataFacts
from diffbench.data.latents import LatentSet, encode
from diffbench.data.planted import plant
from diffbench.data.registry import SOURCES
from diffbench.data.sets import ImageSet
from diffbench.denoisers import build, registry
from diffbench.denoisers.base import Denoiser
from diffbench.denoisers.flops import Cost
from diffbench.diffusion import PROCESSES, Process

if TYPE_CHECKING:
    from diffbench.data.datamodule import PositionDataModule

INSIDE = "autoencoder"
"""Name of a run's autoencoder in its folder, in diffusers' format: trained by the run, or copied into it."""


Shaped = ImageSet | DataFacts
"""A data set, or the facts that a run folder keeps of one: what a network must know of its images."""


def load_data(config: BaseConfig) -> tuple[ImageSet, ImageSet]:
    """Loads the training and held-out parts of the config's data set, with the classes that it plants."""
    train, held_out = SOURCES[config.data.name].load(config.data)
    planted = getattr(config.data, "planted", {})
    return plant(train, planted), plant(held_out, planted)


def null_label(config: RunConfig, data: Shaped) -> int | None:
    """The label that means "no class", or None where labels are never dropped, or there are none."""
    return data.num_classes if config.trainer.label_dropout and data.num_classes else None


def build_process(config: Any) -> Process:
    """The process of a section `process`."""
    with torch.device("cpu"):  # its tables need values, also where a network is to have none
        return PROCESSES[config.name].build(config)


def build_denoiser(config: RunConfig, data: Shaped, shape: tuple[int, int, int] | None = None) -> Denoiser:
    """The config's network for images like those of `data`, or for their latents; `shape` where that is known."""
    shape = shape or denoised_shape(config, data)
    process = build_process(config.process)
    return build(
        config.denoiser.name,
        config.denoiser,
        image_size=image_size(shape),
        channels=shape[0],
        num_classes=data.num_classes,
        null_class=null_label(config, data) is not None,
        learn_sigma=process.learn_sigma,
        noise_level=process.noise_level,
    )


def image_size(shape: tuple[int, int, int]) -> int | tuple[int, int]:
    """The image size that a network is built for: the side of a square (C, H, W), else height and width."""
    return shape[1] if shape[1] == shape[2] else shape[1:]


_COSTS: dict[str, Cost] = {}
"""The networks counted so far: a study asks for the same networks under many objectives."""


def cost_of(config: RunConfig, data: Shaped, shape: tuple[int, int, int] | None = None) -> Cost:
    """Parameters and multiply-accumulates of the config's network."""
    shape = shape or denoised_shape(config, data)
    null = null_label(config, data)
    key = repr((config.denoiser, shape, data.num_classes, null, build_process(config.process).learn_sigma))
    if key not in _COSTS:
        _COSTS[key] = registry.cost(
            config.denoiser, lambda: build_denoiser(config, data, shape), shape[0], image_size(shape)
        )
    return _COSTS[key]


def data_module(
    config: BaseConfig, train_set: ImageSet | LatentSet, held_out: ImageSet | LatentSet
) -> "PositionDataModule":
    """The batches of a run, of images or of latents as the two sets are."""
    from diffbench.data.datamodule import ImageDataModule, LatentDataModule

    return (LatentDataModule if isinstance(train_set, LatentSet) else ImageDataModule)(
        train_set.first(config.trainer.batch_size) if config.debug == "overfit" else train_set,
        held_out,
        config.trainer.batch_size,
        config.seed_of("data"),
        num_workers=config.data.num_workers,
        flip=getattr(config.data, "flip", False),
        data_on_device=config.trainer.data_on_device,
        endless=True,
    )


def device_of(accelerator: str) -> torch.device:
    """The device for networks outside of training: a GPU where there is one, unless the config names another."""
    if accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", distributed.local_rank()) if distributed.place()[1] > 1 else torch.device("cuda")


# Latent space.


def denoised_shape(config: RunConfig, data: Shaped) -> tuple[int, int, int]:
    """(C, H, W) of what the config's denoiser works on: images like those of `data`, or their latents.

    Raises:
        ValueError: if there is no such autoencoder, or it does not take these images; begins with the key.
    """
    if config.autoencoder is None or config.data.name == "none":  # which has the shape of what is denoised
        return data.shape
    with located(key="autoencoder"):
        if is_experiment(config.autoencoder):
            found, _ = autoencoder_experiment(config)
            sizes = found.network.for_channels(found.data.shape[0])
        else:
            sizes = io.read_config(io.find(autoencoder_place(str(config.autoencoder))))
        return sizes.latent_shape(data.shape)


def is_experiment(source: str | None) -> bool:
    """True if `autoencoder` names the YAML of an autoencoder, which is trained if its run is missing."""
    return source is not None and source.endswith((".yaml", ".yml"))


def autoencoder_experiment(config: RunConfig) -> tuple[AutoencoderConfig, list[str]]:
    """The config of the experiment that `autoencoder` names, and the overrides that it shares with this one."""
    source, path = str(config.autoencoder), getattr(config.data, "path", None)
    overrides = [f"runs_dir={config.runs_dir}", *(["debug=smoke"] if config.debug == "smoke" else [])]
    found = load(source, overrides)
    if path is not None and found.data.name == config.data.name:  # one place of the images serves both
        overrides.append(f"data.path={path}")
        found = load(source, overrides)
    if not isinstance(found, AutoencoderConfig):
        raise ValueError(f"{source}: its kind is {found.kind}; choose a YAML of kind autoencoder")
    return found, overrides


def autoencoder_place(source: str | Path) -> str | Path:
    """The folder of a run's autoencoder, ValueError if it has none; other sources as they are."""
    folder = Path(source)
    if (folder / INSIDE / io.CONFIG).is_file():
        return folder / INSIDE
    if (folder / "config.yaml").is_file():
        raise ValueError(f"{source}: this run holds no trained autoencoder; choose a finished run of kind autoencoder")
    return source


def encoded(
    config: RunConfig, data: ImageSet, autoencoder: KLAutoencoder, device: torch.device, flip: bool = False
) -> LatentSet:
    """The latents of a data set: from the cache, or encoded into it on a device; the ranks of a job encode shares."""
    mirrored = "-flipped" if flip else ""
    name = f"{data.name}-{data.fingerprint()}-{autoencoder.fingerprint}-{config.latent_dtype}{mirrored}"
    folder = cache_folder() / "latents" / name
    if not Store(folder).is_complete():
        print(
            f"encoding {len(data):,} images of {data.name} by autoencoder {config.autoencoder} into {folder}",
            flush=True,
        )
    rank, world = distributed.place()
    return encode(
        data,
        autoencoder.to(device),
        folder,
        dtype=config.latent_dtype,
        batch_size=at_once(*data.images.shape[2:]),
        device=device,
        flip=flip,
        scale=autoencoder.config.scaling_factor,
        shift=autoencoder.config.shift_factor,
        rank=rank,
        world=world,
    )
