"""Published networks as ours: `from_reference` reads the state dicts of DiT, SiT, DiffiT, ADM and DDPM++."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffbench.denoisers.pretrained.recipe import REQUIRED, Blueprint, Recipe
from diffbench.denoisers.pretrained.transformers import DIFFIT, DIT, SIT
from diffbench.denoisers.pretrained.unets import ADM, DDPMPP

RECIPES: dict[str, Recipe] = {"dit": DIT, "sit": SIT, "diffit": DIFFIT, "adm": ADM, "ddpmpp": DDPMPP}


def from_reference(source: str, arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Builds our network from a published one's constructor arguments and loads its weights.

    Args:
        source: "dit", "sit", "diffit" (latent), "adm" or "ddpmpp".
        arguments: constructor arguments under the reference's own names; the others take its defaults.
        state_dict: weights under the reference's own keys; half precision is widened.

    Returns:
        A float32 network in eval mode; its forward takes (x, t, y) with t in the reference's own units (timesteps for
        DiT, DiffiT and ADM; 0 to 1 for SiT; ln(sigma)/4 for DDPM++) and y as class indices. Where the reference was
        built without a null class, y is needed.

    Raises:
        ValueError: if an argument or a key is unknown or missing, or a shape or a constant buffer is another; each
            message names it.
    """
    blueprint = describe(source, arguments)
    with torch.random.fork_rng(devices=[]):
        net = RECIPES[source].build(blueprint.config, **blueprint.shape)
    net.load_state_dict(_weights(source, net, state_dict, _complete(source, arguments)))
    return net.eval()


def describe(source: str, arguments: Mapping[str, Any]) -> Blueprint:
    """What `from_reference` builds: our name, config and shape.

    Raises:
        ValueError: if the source or an argument is unknown, missing or has no counterpart here.
    """
    return RECIPES[_known(source)].blueprint(_complete(source, arguments))


def reference_names(source: str, net: nn.Module) -> dict[str, str]:
    """The reference's name of each weight of our network, and ours."""
    rules = [(re.compile(pattern), replacement) for pattern, replacement in RECIPES[source].rules(net)]

    def theirs(name: str) -> str:
        for pattern, replacement in rules:
            name = pattern.sub(replacement, name)
        return name

    return {theirs(name): name for name in net.state_dict()}


def _known(source: str) -> str:
    if source not in RECIPES:
        raise ValueError(f"unknown source {source!r}; choose from {', '.join(RECIPES)}")
    return source


def _complete(source: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    defaults = RECIPES[source].defaults
    for name in arguments:
        if name not in defaults:
            raise ValueError(f"{source}: unknown argument {name}; known: {', '.join(defaults)}")
    complete = {**defaults, **arguments}
    for name, value in complete.items():
        if value is REQUIRED:
            raise ValueError(f"{source}: the argument {name} is missing")
    return complete


def _weights(
    source: str, net: nn.Module, state_dict: Mapping[str, Tensor], arguments: dict[str, Any]
) -> dict[str, Tensor]:
    """A reference's state dict under our names and in our order; see `from_reference`."""
    recipe, ours = RECIPES[source], net.state_dict()
    keys, constants = reference_names(source, net), recipe.buffers(net)
    required = set(keys) if recipe.buffers_optional else set(keys) | set(constants)
    _check_keys(source, required, set(constants), set(state_dict))
    for key, constant in constants.items():
        found = state_dict.get(key, constant).to(constant)
        if found.shape != constant.shape or not torch.equal(found, constant):
            raise ValueError(f"{source}: the constant buffer {key} differs from the one that these arguments make")
    loaded = {}
    for key, name in keys.items():
        tensor, want = state_dict[key], recipe.shape(name, ours[name], arguments)
        if tuple(tensor.shape) != want:
            raise ValueError(f"{source}: {key} has the shape {list(tensor.shape)}, these arguments make {list(want)}")
        loaded[name] = recipe.arrange(name, tensor, net, arguments).reshape(ours[name].shape)
    return loaded


def _check_keys(source: str, wanted: set[str], optional: set[str], given: set[str]) -> None:
    missing, unexpected = sorted(wanted - given), sorted(given - wanted - optional)
    found = [
        f"{len(keys)} {what}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
        for what, keys in {"missing": missing, "unexpected": unexpected}.items()
        if keys
    ]
    if found:
        raise ValueError(f"{source}: of the {len(wanted)} keys that these arguments make, {'; '.join(found)}")
