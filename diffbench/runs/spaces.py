"""What a denoiser works on: pixels, or the latents of the autoencoder that the key `autoencoder` names."""

from pathlib import Path

import torch

from diffbench.autoencoders import KLAutoencoder, KLConfig
from diffbench.autoencoders import io as files
from diffbench.config.kinds import AutoencoderConfig, RunConfig
from diffbench.config.load import load
from diffbench.core import ranks
from diffbench.core.errors import UserError
from diffbench.core.files import cache_folder
from diffbench.core.store import is_complete
from diffbench.data.coding import at_once
from diffbench.data.latents import LatentSet, encode
from diffbench.data.registry import SOURCES
from diffbench.data.sets import ImageSet

INSIDE = "autoencoder"
"""Where a run folder holds its trained autoencoder, in diffusers' format."""


def encoded(
    config: RunConfig, data: ImageSet, autoencoder: KLAutoencoder, device: torch.device, flip: bool = False
) -> LatentSet:
    """The latents of a data set under the config's autoencoder: from the cache, or encoded into it on a device.

    The ranks of a job encode shares of it.

    Raises:
        UserError: if the disk is full, or the cache holds something else.
    """
    mirrored = "-flipped" if flip else ""
    name = f"{data.name}-{data.fingerprint()}-{autoencoder.fingerprint}-{config.latent_dtype}{mirrored}"
    folder = cache_folder() / "latents" / name
    if not is_complete(folder):
        print(
            f"encoding {len(data):,} images of {data.name} by autoencoder {config.autoencoder} into {folder}",
            flush=True,
        )
    rank, world = ranks.place()
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


def is_experiment(source: str) -> bool:
    """Whether `autoencoder` names the YAML of an autoencoder, to be trained where its run is missing."""
    return source.endswith((".yaml", ".yml"))


def experiment(config: RunConfig) -> tuple[AutoencoderConfig, list[str]]:
    """The config of the experiment that `autoencoder` names, and the overrides that it shares with this one.

    Raises:
        ValueError: if it is no autoencoder's.
    """
    source, path = str(config.autoencoder), getattr(config.data, "path", None)
    overrides = [f"runs_dir={config.runs_dir}", *(["debug=smoke"] if config.debug == "smoke" else [])]
    try:
        found = load(source, overrides)
        if path is not None and found.data.name == config.data.name:  # one place of the pictures serves both
            overrides.append(f"data.path={path}")
            found = load(source, overrides)
    except UserError as e:
        raise ValueError(str(e)) from None
    if not isinstance(found, AutoencoderConfig):
        raise ValueError(f"{source}: its kind is {found.kind}; choose a YAML of kind autoencoder")
    return found, overrides


def shape(config: RunConfig, data: ImageSet) -> tuple[int, int, int]:
    """(C, H, W) of what the config's denoiser works on, for pictures like those of `data`.

    Raises:
        ValueError: if there is no such autoencoder, or it does not take these pictures; begins with the key.
    """
    channels, height, width = data.images.shape[1:]
    if config.autoencoder is None or config.data.name == "none":  # which has the shape of what is denoised
        return channels, height, width
    try:
        return _sizes(config).latent_shape((channels, height, width))
    except ValueError as e:
        raise ValueError(f"autoencoder: {e}") from None


def load_autoencoder(source: str) -> KLAutoencoder:
    """The autoencoder that the key names, with its scale, in eval mode.

    Raises:
        UserError: if there is none.
    """
    try:
        return files.load(_place(source))
    except ValueError as e:
        raise UserError(f"autoencoder: {e}") from None


def _sizes(config: RunConfig) -> KLConfig:
    source = str(config.autoencoder)
    if not is_experiment(source):
        return files.read_config(files.find(_place(source)))
    found, _ = experiment(config)
    train_set, _ = SOURCES[found.data.name].load(found.data)
    return found.network.for_channels(train_set.images.shape[1])


def _place(source: str) -> str | Path:
    """A run folder's autoencoder; other sources as they are."""
    folder = Path(source)
    if (folder / INSIDE).is_dir():
        return folder / INSIDE
    if (folder / "config.yaml").is_file():
        raise ValueError(f"{source}: this run holds no trained autoencoder; choose a finished run of kind autoencoder")
    return source
