"""The sets of weights in a checkpoint, raw or averaged, by name, and the choice of one of them."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from diffbench.denoisers.pretrained.convert import RECIPES

AVERAGE = re.compile(r"(?<![a-z])ema|ema(?![a-z])|averag|shadow|(?<![a-z])(avg|swa)(?![a-z])", re.IGNORECASE)
"""Common names of averaged weights."""
RAW = re.compile(r"online|(?<![a-z])raw(?![a-z])|current", re.IGNORECASE)
"""Common names of the raw weights next to an average."""

WeightSets = dict[str, dict[str, Tensor]]


def weight_sets(source: str, checkpoint: Any, key: str | None = None) -> tuple[str, WeightSets]:
    """Find every set of weights of a source in a checkpoint, and choose one.

    Args:
        source: one of `RECIPES`.
        checkpoint: weights by name, or nested dictionaries that contain them.
        key: the name of the set to choose, or a part of it; by default the average, or the only set.

    Returns:
        The chosen name, and all sets with the reference's own weight names. A set's name consists of the keys that lead
        to it and of any prefix from wrappers, as in "state_dict.model" or "ema.module"; a plain state dict is "".

    Raises:
        ValueError: if no set or several fit, or an average cannot be read; the message lists the sets.
    """
    anchor, tensors = RECIPES[source].anchor, dict(_tensors(checkpoint))
    prefixes = [name.removesuffix(anchor) for name in tensors if re.search(rf"(^|[./]){re.escape(anchor)}$", name)]
    sets: WeightSets = {}
    for prefix in prefixes:
        others = tuple(other for other in prefixes if len(other) > len(prefix))
        names = [n for n in tensors if n.startswith(prefix) and not n.startswith(others)]
        weights = {n.removeprefix(prefix): tensors[n] for n in names if "/" not in n.removeprefix(prefix)}
        sets[_shown(prefix)] = weights
        sets |= _without_dots(tensors, prefix, weights)
    if not sets:
        looks = [name for name, recipe in RECIPES.items() if any(n.endswith(recipe.anchor) for n in tensors)]
        near = f"; these weights look like {looks[0]}" if looks else ""
        raise ValueError(f"{source}: no {anchor} among {len(tensors)} names{near}")
    return _choose(sets, tensors, key), sets


def is_average(name: str) -> bool:
    """Return whether the name of a set says that it is an average."""
    return AVERAGE.search(name) is not None and RAW.search(name) is None


def _choose(sets: WeightSets, tensors: Mapping[str, Tensor], key: str | None) -> str:
    names = ", ".join(name or "the file itself" for name in sets)
    averages = [name for name in sets if is_average(name)]
    if key is not None:
        chosen = [name for name in sets if name == key] or [name for name in sets if f".{key}." in f".{name}."]
    elif any(name.startswith("current_model_state") for name in sets):
        chosen = [name for name in sets if name.startswith("state_dict")]  # Lightning's WeightAveraging: the average
    else:
        chosen = averages or [name for name in sets if not RAW.search(name)]
        unread = [] if averages else _unread(tensors)
        if unread:
            raise ValueError(
                f"weights: {unread[0]} is an average that cannot be read: with the code that made it, copy it into the"
                f" network and save its state_dict(); or choose another set with weights=KEY: {names}"
            )
    if len(chosen) != 1:
        raise ValueError(f"weights: choose one set with weights=KEY: {names}")
    return chosen[0]


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in nested dictionaries and lists, with the keys that lead to it joined by slashes."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping | list | tuple):
        for key, inside in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(inside, f"{path}/{key}" if path else str(key))


def _without_dots(tensors: Mapping[str, Tensor], prefix: str, weights: Mapping[str, Tensor]) -> WeightSets:
    """Find the average that latent diffusion's code saves next to a set: "model_ema." and names without their dots."""
    path, _, wrapper = prefix.rpartition("/")
    for place in dict.fromkeys(name.removeprefix(f"{path}/").partition(".")[0] for name in tensors):
        for start in (wrapper, wrapper.partition(".")[2]):
            names = {n: f"{path}/{place}.{(start + n).replace('.', '')}".lstrip("/") for n in weights}
            if is_average(place) and all(name in tensors for name in names.values()):
                return {_shown(f"{path}/{place}"): {n: tensors[name] for n, name in names.items()}}
    return {}


def _unread(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the prefixes, up to a word for "average", that several tensor names share."""
    pattern = re.compile(rf"^(.*?)({AVERAGE.pattern})[^./]*(?=[./])", re.IGNORECASE)
    found = Counter(_shown(match[0]) for match in map(pattern.search, tensors) if match is not None)
    return [name for name, count in found.items() if count > 1]


def _shown(place: str) -> str:
    return place.replace("/", ".").strip(".")
