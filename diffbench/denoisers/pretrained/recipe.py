"""The facts about a published network that are needed to load its weights: a `Recipe`, and helpers to write one."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffbench.denoisers.base import Denoiser

Rules = list[tuple[str, str]]
"""Regular expressions and replacements that, applied in order, turn our weight names into the reference's."""
REQUIRED = object()
"""Marks an argument without a default."""


@dataclass(frozen=True)
class Blueprint:
    """Everything that a config file needs to build one of our networks."""

    denoiser: str
    """Name in the registry."""
    config: Any
    shape: dict[str, Any]
    """image_size, channels, num_classes, null_class, learn_sigma."""


@dataclass(frozen=True)
class Recipe:
    """The rules for loading the weights of one published family, the source."""

    build: type[Denoiser]
    """Our class."""
    anchor: str
    """The reference's name of the first layer's weight, which every network of the source has."""
    defaults: dict[str, Any]
    """The reference's constructor arguments and their defaults."""
    published: dict[str, dict[str, Any]]
    """Arguments of each published network that differ from the defaults, by preset name."""
    blueprint: Callable[[dict[str, Any]], Blueprint]
    """Complete arguments -> our network; raises ValueError for arguments that ours does not support."""
    rules: Callable[[Any], Rules]
    """Our network -> the rules that rename its weights."""
    free: frozenset[str]
    """Arguments of a published network that may be changed to suit the data: classes, channels, size, dropout."""
    unseen: tuple[tuple[str, ...], ...] = ()
    """Groups of arguments that no shape reveals; one per group must be given unless the network is a published one."""
    shape: Callable[[str, Tensor, dict[str, Any]], tuple[int, ...]] = lambda _name, ours, _arguments: tuple(ours.shape)
    """Our name, our tensor, arguments -> the shape in the reference."""
    arrange: Callable[[str, Tensor, Any, dict[str, Any]], Tensor] = lambda _name, theirs, _net, _arguments: theirs
    """Our name, the reference's tensor, our network, arguments -> the tensor's values in our order."""
    buffers: Callable[[Any], dict[str, Tensor]] = lambda _net: {}
    """Our network -> constant buffers by the reference's names."""
    buffers_optional: bool = False
    """Whether a state dict may lack the buffers."""


def at(places: dict[str, str]) -> Rules:
    """Return rules that replace paths of our modules by the reference's."""
    return [(rf"^{re.escape(ours)}\.", f"{theirs}.") for ours, theirs in places.items()]


def require_values(source: str, arguments: dict[str, Any], **allowed: Any) -> None:
    """Raise ValueError if an argument differs from the only value that our network supports."""
    for name, value in allowed.items():
        if arguments[name] != value:
            raise ValueError(f"{source}: {name}={arguments[name]!r} has no counterpart here, only {value!r}")


def check_values(source: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError unless a tensor consists of finite floating-point numbers of at least 16 bits."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or tensor.layout != torch.strided:
        kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
        raise ValueError(f"{source}: {name} holds {kind}, not floating-point weights")
    if broken := int((~tensor.isfinite()).sum()):
        raise ValueError(f"{source}: {name} holds {broken} values that are not finite, out of {tensor.numel()}")


def has_learned_variance(source: str, inside: int, out: int) -> bool:
    """Return whether the output has a learned variance: `out` is twice `inside`; raise ValueError if it is neither."""
    if out not in (inside, 2 * inside):
        raise ValueError(f"{source}: out_channels={out} is neither in_channels={inside} nor twice that")
    return out == 2 * inside
