"""Build what a config describes: data, process, network, and the latents of an autoencoder."""

from pathlib import Path
from typing import Any

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

INSIDE = "autoencoder"
"""Folder inside a run folder with its autoencoder in diffusers' format: trained by the run, or copied into it."""


Shaped = ImageSet | DataFacts
"""A data set, or the stored facts about one: enough to build a network for its images."""


def load_data(config: BaseConfig) -> tuple[ImageSet, ImageSet]:
    """Load the training and held-out parts of the config's data set, with its planted classes."""
    train, held_out = SOURCES[config.data.name].load(config.data)
    planted = getattr(config.data, "planted", {})
    return plant(train, planted), plant(held_out, planted)


def null_label(config: RunConfig, data: Shaped) -> int | None:
    """Return the label that means "no class", or None if labels are never dropped or there are none."""
    return data.num_classes if config.trainer.label_dropout and data.num_classes else None


def build_process(config: Any) -> Process:
    """Build the process of a `process` section."""
    with torch.device("cpu"):  # its tables need values, even inside torch.device("meta")
        return PROCESSES[config.name].build(config)


def build_denoiser(config: RunConfig, data: Shaped, shape: tuple[int, int, int] | None = None) -> Denoiser:
    """Build the config's network for images like those of `data`, or for their latents.

    `shape` is that of what is denoised, if already known.
    """
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
    """Return the image size of a shape (C, H, W): one number if square, else (height, width)."""
    return shape[1] if shape[1] == shape[2] else shape[1:]


_COSTS: dict[str, Cost] = {}
"""Cache of counted networks: a study counts the same networks under many objectives."""


def cost_of(config: RunConfig, data: Shaped, shape: tuple[int, int, int] | None = None) -> Cost:
    """Count the parameters and multiply-accumulates of the config's network."""
    shape = shape or denoised_shape(config, data)
    null = null_label(config, data)
    key = repr((config.denoiser, shape, data.num_classes, null, build_process(config.process).learn_sigma))
    if key not in _COSTS:
        _COSTS[key] = registry.cost(
            config.denoiser, lambda: build_denoiser(config, data, shape), shape[0], image_size(shape)
        )
    return _COSTS[key]


def device_of(accelerator: str) -> torch.device:
    """Return the device for networks outside of training: a GPU if there is one, unless the config names another."""
    if accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return (
        torch.device("cuda", distributed.local_rank()) if distributed.rank_and_world()[1] > 1 else torch.device("cuda")
    )


# Latent space.


def denoised_shape(config: RunConfig, data: Shaped) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of what the config's denoiser works on: images like those of `data`, or their latents.

    Raises:
        ValueError: if the autoencoder does not exist or does not take these images; begins with the key.
    """
    if config.autoencoder is None or config.data.name == "none":  # the shape of "none" is that of the latents
        return data.shape
    with located(key="autoencoder"):
        if is_experiment(config.autoencoder):
            found, _ = autoencoder_experiment(config)
            sizes = found.network.for_channels(found.data.shape[0])
        else:
            sizes = io.read_config(io.find(autoencoder_place(str(config.autoencoder))))
        return sizes.latent_shape(data.shape)


def is_experiment(source: str | None) -> bool:
    """True if `autoencoder` is the YAML of an experiment, which is trained first if its run is missing."""
    return source is not None and source.endswith((".yaml", ".yml"))


def autoencoder_experiment(config: RunConfig) -> tuple[AutoencoderConfig, list[str]]:
    """Return the config of the autoencoder's experiment, and the overrides that it inherits from this config."""
    source, path = str(config.autoencoder), getattr(config.data, "path", None)
    overrides = [f"runs_dir={config.runs_dir}", *(["debug=smoke"] if config.debug == "smoke" else [])]
    own = load(source, overrides)
    if path is not None and own.data.name == config.data.name:  # both read the same images
        overrides.append(f"data.path={path}")
        own = load(source, overrides)
    if not isinstance(own, AutoencoderConfig):
        raise ValueError(f"{source}: its kind is {own.kind}; choose a YAML of kind autoencoder")
    return own, overrides


def autoencoder_place(source: str | Path) -> str | Path:
    """Return the autoencoder folder inside a run folder (ValueError if it has none); any other source unchanged."""
    folder = Path(source)
    if (folder / INSIDE / io.CONFIG).is_file():
        return folder / INSIDE
    if (folder / "config.yaml").is_file():
        raise ValueError(f"{source}: this run has no trained autoencoder; choose a finished run of kind autoencoder")
    return source


def encoded(
    config: RunConfig, data: ImageSet, autoencoder: KLAutoencoder, device: torch.device, flip: bool = False
) -> LatentSet:
    """Return the latents of a data set, encoding those that are not cached; each rank encodes its share."""
    mirrored = "-flipped" if flip else ""
    name = f"{data.name}-{data.fingerprint()}-{autoencoder.fingerprint}-{config.latent_dtype}{mirrored}"
    folder = cache_folder() / "latents" / name
    if not Store(folder).is_complete():
        print(
            f"encoding {len(data):,} images of {data.name} by autoencoder {config.autoencoder} into {folder}",
            flush=True,
        )
    rank, world = distributed.rank_and_world()
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
