"""Size matching: the width or depth at which a backbone's parameters or multiply-accumulates meet a target."""

import contextlib
import operator
from typing import Any, Literal

import torch

from diffbench.config.kinds import RunConfig
from diffbench.config.load import change, flatten, to_dict
from diffbench.core.errors import UserError
from diffbench.data.sets import ImageSet
from diffbench.denoisers import registry
from diffbench.denoisers.flops import parameters
from diffbench.runs import build
from diffbench.studies.config import nest_keys

LARGEST = 32
"""Largest factor by which a width or depth may grow."""


def size_of(config: RunConfig, data: ImageSet, by: Literal["parameters", "gmacs"]) -> float:
    """Return the number of parameters, or of multiply-accumulates in 1e9."""
    if by == "gmacs":
        return build.cost_of(config, data).gmacs
    with torch.device("meta"):
        return float(parameters(build.build_denoiser(config, data)))


def match_size(
    config: RunConfig,
    data: ImageSet,
    by: Literal["parameters", "gmacs"],
    target: float,
    what: Literal["width", "depth"],
) -> RunConfig:
    """Return the config with the width or depth whose size is nearest to the target.

    Widths that the network rejects (not divisible by its heads or groups) are skipped; a list of widths grows in
    proportion to its first one.

    Raises:
        UserError: if the denoiser has no key for that dimension, or no size fits.
    """
    name, key = config.denoiser.name, registry.size_key(config.denoiser, what)
    if not key:
        raise UserError(
            f"match.change: denoiser.name={name} has no key for its {what}; for a custom network, name it with"
            f" denoiser.{what}=KEY, or choose match.by=none"
        )
    given = flatten(to_dict(config))[f"denoiser.{key}"]
    first = given[0] if isinstance(given, list) and given else given
    if not isinstance(first, int):
        raise UserError(f"match.change: denoiser.{key}: must be a whole number or a list of them, got {given!r}")
    share, most = target / size_of(config, data, by), LARGEST * first
    guess = max(1, min(most, round(first * (share**0.5 if what == "width" else share))))
    fits: list[tuple[float, RunConfig]] = []
    for numbers, passed in ((range(guess, 0, -1), operator.le), (range(guess + 1, most + 1), operator.ge)):
        for n in numbers:
            with contextlib.suppress(UserError, ValueError, RuntimeError, ArithmeticError):  # rejected by the network
                candidate = change(config, nest_keys({f"denoiser.{key}": _scaled(given, n)}))
                fits.append((size_of(candidate, data, by), candidate))
                if passed(fits[-1][0], target):
                    break
    if not fits:
        raise UserError(f"match: denoiser.{key}: no value from 1 to {most} makes a {name} of {target:g} {by}")
    return min(fits, key=lambda entry: abs(entry[0] - target))[1]


def _scaled(given: Any, n: int) -> Any:
    """Return width n, or the list of widths scaled to begin with n; ValueError if one would not be whole."""
    if not isinstance(given, list):
        return n
    if any(value * n % given[0] for value in given):
        raise ValueError("a width would not be an integer")
    return [value * n // given[0] for value in given]


def size_text(config: RunConfig, what: Literal["width", "depth"]) -> str:
    """Return the key and value that matching chose, such as "hidden_size=64"."""
    key = registry.size_key(config.denoiser, what)
    return f"{key.removeprefix('args.')}={flatten(to_dict(config))[f'denoiser.{key}']}"
