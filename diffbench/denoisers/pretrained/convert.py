"""Conversion of published networks to ours: `from_reference` reads the state dicts of seven published families."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffbench.denoisers.base import Denoiser
from diffbench.denoisers.pretrained import segformer
from diffbench.denoisers.pretrained.recipe import REQUIRED, Blueprint, Recipe, check_values
from diffbench.denoisers.pretrained.transformers import DIFFIT, DIT, SIT, UVIT
from diffbench.denoisers.pretrained.unets import ADM, DDPMPP

RECIPES: dict[str, Recipe] = {"dit": DIT, "sit": SIT, "diffit": DIFFIT, "adm": ADM, "ddpmpp": DDPMPP, "uvit": UVIT}


def from_reference(source: str, arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Denoiser:
    """Build our network from a published one's constructor arguments and load its weights.

    Args:
        source: "dit", "sit", "diffit" (latent), "adm", "ddpmpp", "uvit", or "segformer", see `segformer.read`.
        arguments: constructor arguments under the reference's own names; missing ones take its defaults.
        state_dict: weights under the reference's own names; half precision is converted to float32.

    Returns:
        A float32 network in eval mode; its forward takes (x, t, y) with t in the reference's own units (0 to 1 for
        SiT, ln(sigma)/4 for DDPM++, timesteps for the others) and y as class indices. If the reference was built
        without a null class, y is required.

    Raises:
        ValueError: if an argument or a key is unknown or missing, a shape or a constant buffer differs, or weights
            are not finite; the message names it.
    """
    if source == "segformer":
        return segformer.read(arguments, state_dict)
    if source not in RECIPES:
        raise ValueError(f"unknown source {source!r}; choose from {', '.join([*RECIPES, 'segformer'])}")
    blueprint = describe(source, arguments)
    with torch.random.fork_rng(devices=[]):
        net = RECIPES[source].build(blueprint.config, **blueprint.shape)
    net.load_state_dict(_weights(source, net, state_dict, _complete(source, arguments)))
    return net.eval()


def describe(source: str, arguments: Mapping[str, Any]) -> Blueprint:
    """Describe the network that `from_reference` builds: our name, config and shape.

    Raises:
        ValueError: if the source or an argument is unknown, missing or has no counterpart here.
    """
    complete = _complete(source, arguments)
    return RECIPES[source].blueprint(complete)


def infer(source: str, state_dict: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Infer the constructor arguments from weights: those of a matching published network, or else the given ones.

    Args:
        source: one of `RECIPES`.
        state_dict: weights under the reference's own names.
        given: arguments that the caller knows.

    Raises:
        ValueError: if an argument is unknown, or neither a published network nor the given arguments match the
            shapes; the message names the closest network and the first shape that differs.
    """
    fits: list[tuple[int, dict[str, Any]]] = []
    nearest: list[tuple[int, str]] = []
    for name, arguments in _candidates(source, given):
        try:
            wanted = shapes(source, arguments)
        except ValueError:
            if name not in RECIPES[source].published:
                raise
            continue  # this network is impossible with the given arguments
        actual = {key: list(state_dict[key].shape) if key in state_dict else "missing" for key in wanted}
        misfits = [key for key in wanted if actual[key] != wanted[key]]
        if not misfits:
            fits.append((len(wanted), arguments))
            continue
        first = f"{misfits[0]} is {actual[misfits[0]]}, not {wanted[misfits[0]]}"
        nearest.append((len(misfits), f"{name} ({len(misfits)} of {len(wanted)} differ: {first})"))
    if fits:
        return max(fits, key=lambda fit: fit[0])[1]  # a shallower network fits a deeper one's weights too
    _, differs = min(nearest, key=lambda near: near[0])
    raise ValueError(
        f"{source}: the shapes do not match {differs}; give the constructor's arguments as arguments.NAME=VALUE, with"
        f" NAME one of {', '.join(RECIPES[source].defaults)}"
    )


def _candidates(source: str, given: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and complete arguments of each candidate: published networks, and the one that is given."""
    recipe = RECIPES[source]
    _check_known(source, given)
    networks = {
        name: {**recipe.defaults, **published, **given}
        for name, published in recipe.published.items()
        if all(key in recipe.free or {**recipe.defaults, **published}[key] == value for key, value in given.items())
    }
    if not networks or not set(given) <= recipe.free:
        for group in recipe.unseen:
            if not set(group) & set(given):
                raise ValueError(f"arguments.{group[0]}: no shape reveals it; give it as arguments.{group[0]}=VALUE")
        networks["the given arguments"] = _complete(source, given)
    for name, arguments in networks.items():
        yield name, arguments
        if "class_dropout_prob" in recipe.defaults and "class_dropout_prob" not in given:
            yield name, arguments | {"class_dropout_prob": 0.0}  # trained without "no class": one row fewer


def shapes(source: str, arguments: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the shape of each weight of the reference with these arguments, by the reference's names."""
    recipe, complete = RECIPES[source], _complete(source, arguments)
    blueprint = recipe.blueprint(complete)
    with torch.device("meta"):
        net = recipe.build(blueprint.config, **blueprint.shape)
    ours = net.state_dict()
    names = reference_names(source, net)
    return {key: list(recipe.shape(name, ours[name], complete)) for key, name in names.items()}


def reference_names(source: str, net: Denoiser) -> dict[str, str]:
    """Map the reference's name of each weight of our network to our name."""
    rules = [(re.compile(pattern), replacement) for pattern, replacement in RECIPES[source].rules(net)]

    def theirs(name: str) -> str:
        for pattern, replacement in rules:
            name = pattern.sub(replacement, name)
        return name

    return {theirs(name): name for name in net.state_dict()}


def _check_known(source: str, arguments: Mapping[str, Any]) -> None:
    if source not in RECIPES:
        raise ValueError(f"unknown source {source!r}; choose from {', '.join(RECIPES)}")
    defaults = RECIPES[source].defaults
    for name, value in arguments.items():
        if name not in defaults:
            raise ValueError(f"{source}: unknown argument {name}; known: {', '.join(defaults)}")
        if isinstance(defaults[name], bool) and value not in (False, True):
            raise ValueError(f"{source}: {name}={value!r} must be true or false")


def _complete(source: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    _check_known(source, arguments)
    complete = {**RECIPES[source].defaults, **arguments}
    for name, value in complete.items():
        if value is REQUIRED:
            raise ValueError(f"{source}: the argument {name} is missing")
    return complete


def _weights(
    source: str, net: Denoiser, state_dict: Mapping[str, Tensor], arguments: dict[str, Any]
) -> dict[str, Tensor]:
    """Convert a reference's state dict to our names and layout; see `from_reference`."""
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
            raise ValueError(f"{source}: {key} has shape {list(tensor.shape)}, but these arguments make {list(want)}")
        check_values(source, key, tensor)
        loaded[name] = recipe.arrange(name, tensor, net, arguments).reshape(ours[name].shape)
    return loaded


def _check_keys(source: str, wanted: set[str], optional: set[str], given: set[str]) -> None:
    missing, unexpected = sorted(wanted - given), sorted(given - wanted - optional)
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
        for what, keys in {"missing": missing, "unexpected": unexpected}.items()
        if keys
    ]
    if problems:
        raise ValueError(f"{source}: of the {len(wanted)} keys that these arguments make, {'; '.join(problems)}")
