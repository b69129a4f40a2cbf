"""The facts of a published network that reading its weights needs: a `Recipe`, and helpers to write one."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffbench.denoisers.base import Denoiser

Rules = list[tuple[str, str]]
"""Regular expressions and replacements that, one after the other, turn our names into the reference's."""
REQUIRED = object()
"""Stands for the default of an argument that has none."""


@dataclass(frozen=True)
class Blueprint:
    """One of our networks: what a config file needs in order to build it again."""

    denoiser: str
    """Its name in the registry."""
    config: Any
    shape: dict[str, Any]
    """image_size, channels, num_classes, null_class, learn_sigma."""


@dataclass(frozen=True)
class Recipe:
    """The rules for reading one source."""

    build: type[Denoiser]
    """Our class."""
    anchor: str
    """The name of the first layer's weight in the reference, which every network of the source has."""
    defaults: dict[str, Any]
    """The reference's constructor arguments."""
    published: dict[str, dict[str, Any]]
    """Arguments of each published network, besides the defaults."""
    blueprint: Callable[[dict[str, Any]], Blueprint]
    """From the complete arguments; raises ValueError for what ours cannot be."""
    rules: Callable[[Any], Rules]
    """Of our network."""
    free: frozenset[str]
    """Arguments of a published network that may differ with the data: its classes, channels, size, dropout."""
    unseen: tuple[tuple[str, ...], ...] = ()
    """Arguments that no shape shows; of each group, one must be given where the network is not a published one."""
    shape: Callable[[str, Tensor, dict[str, Any]], tuple[int, ...]] = lambda _name, ours, _arguments: tuple(ours.shape)
    """From our name and tensor: the shape in the reference."""
    arrange: Callable[[str, Tensor, Any, dict[str, Any]], Tensor] = lambda _name, theirs, _net, _arguments: theirs
    """From our name and the reference's tensor: its values in our order."""
    buffers: Callable[[Any], dict[str, Tensor]] = lambda _net: {}
    """Of our network: constant buffers by the reference's keys."""
    buffers_optional: bool = False
    """Whether a state dict may lack the buffers."""


def at(places: dict[str, str]) -> Rules:
    """Rules that replace a module's path by another."""
    return [(rf"^{re.escape(ours)}\.", f"{theirs}.") for ours, theirs in places.items()]


def only(source: str, arguments: dict[str, Any], **allowed: Any) -> None:
    """Raise ValueError for an argument with another value than the one that ours can be."""
    for name, value in allowed.items():
        if arguments[name] != value:
            raise ValueError(f"{source}: {name}={arguments[name]!r} has no counterpart here, only {value!r}")


def check_values(source: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError unless a tensor holds finite floating-point weights of 16 bits or more, each of them."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or tensor.layout != torch.strided:
        kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
        raise ValueError(f"{source}: {name} holds {kind}, not floating-point weights")
    if broken := int((~tensor.isfinite()).sum()):
        raise ValueError(f"{source}: {name} holds {broken} values that are not finite, of {tensor.numel()}")


def doubles(source: str, inside: int, out: int) -> bool:
    """Whether the output has a learned variance; raises ValueError if its channels say neither yes nor no."""
    if out not in (inside, 2 * inside):
        raise ValueError(f"{source}: out_channels={out} is neither in_channels={inside} nor twice that")
    return out == 2 * inside
