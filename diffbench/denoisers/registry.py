"""Registry of the denoisers by name: to add one, write its file and a row here. Other names are custom networks."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffbench.denoisers import ddpmpp, diffit, diffit_latent, dit, laptop, probe, segformer, unet, uvit
from diffbench.denoisers.base import Denoiser, Preset, check_output
from diffbench.denoisers.custom import CustomConfig, CustomDenoiser
from diffbench.denoisers.flops import Cost, count


@dataclass(frozen=True)
class Entry:
    """A registered denoiser."""

    config: type
    """Config dataclass, with the keys of the section `denoiser`."""
    build: type[Denoiser]
    summary: str
    """One line for `diffbench list`."""
    width: str
    """Key that widens the network, a number or a list that is scaled as a whole; studies match sizes with it."""
    depth: str
    """Key that deepens it."""
    presets: dict[str, Preset]
    """Published networks by name, for `denoiser.preset`."""
    laptop: Callable[[int, int], dict[str, Any]] | None = None
    """Image (height, width) -> config keys of a small network, for `denoiser.preset: laptop`."""


DENOISERS = {
    "unet": Entry(
        unet.UNetConfig,
        unet.UNet,
        "U-Net with residual blocks and attention (ADM)",
        "model_channels",
        "num_res_blocks",
        unet.PRESETS,
        unet.laptop_sizes,
    ),
    "dit": Entry(
        dit.DiTConfig,
        dit.DiT,
        "Vision Transformer with adaLN-Zero (DiT)",
        "hidden_size",
        "depth",
        dit.PRESETS,
        laptop.transformer,
    ),
    "diffit": Entry(
        diffit.DiffiTConfig,
        diffit.DiffiT,
        "U-shaped transformer with time-dependent self-attention (DiffiT)",
        "channels",
        "blocks",
        diffit.PRESETS,
        diffit.laptop_sizes,
    ),
    "diffit-latent": Entry(
        diffit_latent.DiffiTLatentConfig,
        diffit_latent.DiffiTLatent,
        "Vision Transformer with time-dependent self-attention (DiffiT for latents)",
        "hidden_size",
        "depth",
        diffit_latent.PRESETS,
        laptop.transformer,
    ),
    "ddpmpp": Entry(
        ddpmpp.DDPMppConfig,
        ddpmpp.DDPMpp,
        "U-Net as trained by EDM (DDPM++)",
        "model_channels",
        "num_blocks",
        ddpmpp.PRESETS,
        ddpmpp.laptop_sizes,
    ),
    "uvit": Entry(
        uvit.UViTConfig,
        uvit.UViT,
        "Vision Transformer with long skips, time and class as tokens (U-ViT)",
        "hidden_size",
        "depth",
        uvit.PRESETS,
        laptop.transformer,
    ),
    "segformer": Entry(
        segformer.SegFormerConfig,
        segformer.SegFormer,
        "Mix Transformer with an all-MLP decoder, made conditional (SegFormer)",
        "hidden_sizes",
        "depths",
        segformer.PRESETS,
        segformer.laptop_sizes,
    ),
}

PRESETS = {name: preset for entry in DENOISERS.values() for name, preset in entry.presets.items()}


def build(name: str, config: Any, noise_level: Callable[[Tensor], Tensor] | None = None, **shape: Any) -> Denoiser:
    """Build a denoiser.

    Args:
        name: name in `DENOISERS`; ignored for the config of a custom network.
        config: instance of its config dataclass.
        noise_level: (B,) times as passed to the network -> (B,) sigma / alpha, for custom networks.
        **shape: image_size, channels, num_classes, null_class, learn_sigma.
    """
    if isinstance(config, CustomConfig):
        return CustomDenoiser(config, noise_level=noise_level, **shape)
    return DENOISERS[name].build(config, **shape)


def cost(config: Any, make: Callable[[], Denoiser], channels: int, image_size: int | tuple[int, int]) -> Cost:
    """Return the cost of the network that `make` builds from a config."""
    return (probe.count if isinstance(config, CustomConfig) else count)(make, channels, image_size)


def check(config: Any, make: Callable[[], Denoiser], x: Tensor, t: Tensor, out_channels: int) -> None:
    """Check the output of the network that `make` builds from a config; a custom one is run, see `probe.probe`.

    Args:
        config: instance of its config dataclass.
        make: builds the network.
        x: (2, C, H, W) input.
        t: (2,) times as passed to the network.
        out_channels: expected number of output channels.

    Raises:
        ValueError: if the output is wrong; the message begins with the key.
    """
    if isinstance(config, CustomConfig):
        with torch.random.fork_rng():
            network = make().to(x.device)
            assert isinstance(network, CustomDenoiser)
            probe.probe(network, x, t, out_channels)
        return
    with torch.device("meta"), torch.no_grad():
        check_output(make()(x.to("meta"), t.to("meta"), torch.zeros(len(x), dtype=torch.int64)), out_channels, x)


def size_key(config: Any, what: Literal["width", "depth"]) -> str:
    """Return the dotted config key that widens or deepens a denoiser, or "" if none does."""
    if isinstance(config, CustomConfig):
        name = getattr(config, what)
        return f"args.{name}" if name else ""
    return getattr(DENOISERS[config.name], what)


def takes_labels(config: Any) -> bool:
    """Return whether the denoiser of a config is called with labels; a custom one need not be."""
    return not isinstance(config, CustomConfig) or config.call.y is not None


def is_stochastic(config: Any) -> bool:
    """Return whether a registered denoiser draws random numbers in training, for dropout or stochastic depth."""
    return any(getattr(config, key, 0) > 0 for key in ("dropout", "drop_path"))


def keep_source(config: Any, folder: Path) -> None:
    """Copy the source of a custom network into a folder, unless it is installed, so that configs there find it."""
    if isinstance(config, CustomConfig):
        config.factory.source.keep(folder)


def from_preset(name: str, **shape: Any) -> Denoiser:
    """Build a published network, such as "DiT-S/2", with random weights.

    Args:
        name: one of `PRESETS`.
        shape: changes to the published image_size, channels, num_classes, null_class or learn_sigma.

    Raises:
        ValueError: if there is no such network, or it does not fit such images.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}{hint}")
    kind = next(kind for kind, entry in DENOISERS.items() if name in entry.presets)
    return build(kind, PRESETS[name].config, **PRESETS[name].shape | shape)


def as_values(network: Any) -> dict[str, Any] | None:
    """Return the arguments of a registered network as plain values for `from_values`; None for any other network."""
    name = next((name for name, entry in DENOISERS.items() if type(network) is entry.build), None)
    if name is None:
        return None
    return {"name": name, **network.built_from, "config": asdict(network.built_from["config"])}


def from_values(values: Mapping[str, Any]) -> Denoiser:
    """Build a new network from the result of `as_values`."""
    shape = dict(values)
    name = shape.pop("name")
    return build(name, DENOISERS[name].config(**shape.pop("config")), **shape)
