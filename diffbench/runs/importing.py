"""Import a published checkpoint: write a run folder with its weights and a config that samples as its release does."""

import argparse
import dataclasses
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from diffbench.config.documents import untyped
from diffbench.config.kinds import RunConfig
from diffbench.config.layers import COMMAND_LINE, located, parse_overrides
from diffbench.config.load import from_layers, to_yaml
from diffbench.core.errors import UserError, suggest
from diffbench.core.files import sha256, write_text
from diffbench.denoisers import from_reference
from diffbench.denoisers.custom import described
from diffbench.denoisers.pretrained.checkpoint import weight_sets
from diffbench.denoisers.pretrained.convert import RECIPES, describe, infer
from diffbench.denoisers.pretrained.recipe import Blueprint
from diffbench.runs import weights
from diffbench.runs.build import build_denoiser, load_data

# Types that training scripts save next to weights (arguments, paths, a best score); unpickling them runs no code.
_NUMBERS = (np.float64, np.float32, np.int64, np.int32, np.bool_)
_SCALAR = np.float64(0).__reduce__()[0]  # known by another name before numpy 2
HARMLESS: list[Any] = [argparse.Namespace, PosixPath, np.dtype, *(type(np.dtype(kind)) for kind in _NUMBERS)]
HARMLESS += [_SCALAR, (_SCALAR, "numpy.core.multiarray.scalar")]
AUTOENCODER = "stabilityai/sd-vae-ft-ema"
"""The decoder of the latents of DiT, SiT, DiffiT and U-ViT."""


def import_reference(source: str, checkpoint: Path, out: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, str]:
    """Write a run folder that `sample` and `evaluate` accept like that of a trained run.

    Args:
        source: one of `RECIPES`.
        checkpoint: a torch or safetensors file with a state dict, possibly nested in dictionaries.
        out: the run folder, which must not exist.
        overrides: config keys; `arguments.NAME=value` for the reference's constructor if the network is not a
            published one; `weights=KEY` for one of several sets of weights, by default the average; `ignore=[KEY]`
            for names that do not belong to the network.

    Returns:
        The run's config, and a phrase that names the weights used.

    Raises:
        UserError: if the folder exists, the file cannot be read without running code, or the weights, the arguments
            and the config do not fit together.
    """
    if source not in RECIPES:
        known = ", ".join(RECIPES)
        raise UserError(f"{COMMAND_LINE}: unknown source {source!r}; choose from {known}{suggest(source, RECIPES)}")
    if os.path.lexists(out):
        raise UserError(f"{out}: already exists; choose another folder")
    changes = parse_overrides(overrides)
    given, key, ignored = (changes.pop(name, None) for name in ("arguments", "weights", "ignore"))
    if not isinstance(given or {}, dict):
        raise UserError(f"{COMMAND_LINE}: arguments: must be given by name, such as arguments.num_heads=16")
    stored = read_checkpoint(checkpoint)
    try:
        name, sets = weight_sets(source, stored, None if key is None else str(key))
        state = dict(sets[name])
        for unwanted in map(str, ignored if isinstance(ignored, list) else [ignored] if ignored else []):
            if unwanted not in state:
                hint = suggest(unwanted, state)
                raise ValueError(f"ignore: {unwanted} is not a name among these weights{hint}")
            del state[unwanted]
        arguments = infer(source, state, {k: untyped(v) for k, v in (given or {}).items()})
        plan = describe(source, arguments)
        net = from_reference(source, arguments, state)
        made = as_config(source, plan)
    except ValueError as e:
        hint = "; skip names with ignore=[NAME]" if " unexpected: " in str(e) else ""
        raise UserError(f"{checkpoint}: {e}{hint}") from None
    except (TypeError, AttributeError, RuntimeError) as e:
        raise UserError(f"{COMMAND_LINE}: arguments: no network of {source} has these ({described(e)})") from None
    stack = [(f"import {source}", made), (COMMAND_LINE, changes)]
    config = from_layers(stack)
    assert isinstance(config, RunConfig)
    with located(stack):
        train_set, _ = load_data(config)
        with torch.device("meta"):  # the command line may have changed the network
            ours = build_denoiser(config, train_set)
    if wrong := weights.mismatch(ours.state_dict(), net.state_dict()):
        raise UserError(f"{COMMAND_LINE}: the config's network does not fit the weights of {checkpoint}: {wrong}")
    facts = {"source": source, "checkpoint": checkpoint.name, "sha256": sha256(checkpoint), "weights": name}
    _write(out, config, net, facts)
    others = [other for other in sets if other != name]
    return config, f"{name or 'the only ones'}" + (f"; the file also has {', '.join(others)}" if others else "")


def read_checkpoint(path: Path) -> Mapping[Any, Any]:
    """Read a checkpoint without running any code in it; UserError if it is damaged, or contains code or no tensors."""
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a checkpoint' if path.is_dir() else 'no such file'}")
    try:
        stored: Any = load_file(path) if path.suffix == ".safetensors" else _loaded(path)
    except pickle.UnpicklingError as e:
        with path.open("rb") as file:
            pickled = file.read(1) == b"\x80"  # the first byte of a bare pickle
        if not pickled and "GLOBAL" not in str(e):
            raise UserError(f"{path}: damaged, or not a checkpoint") from None
        raise UserError(
            f"{path}: contains pickled code, which is never run; export plain weights where it was made, with"
            " torch.save(net.state_dict(), 'weights.pt'); in EDM's repository,"
            " net = pickle.load(open('network.pkl', 'rb'))['ema']"
        ) from None
    except PermissionError:
        raise UserError(f"{path}: not readable (permission denied)") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError):
        raise UserError(f"{path}: damaged, or not a checkpoint") from None
    if not isinstance(stored, Mapping):
        raise UserError(f"{path}: contains a {type(stored).__name__}, not a state dict")
    return stored


def _loaded(path: Path) -> Any:
    with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # raised for pickles that torch then refuses
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files written before torch 1.6 cannot be memory-mapped
            return torch.load(path, map_location="cpu", weights_only=True)


def as_config(source: str, plan: Blueprint) -> dict[str, Any]:
    """Return the config of a published network: the process of its training, and its release's sampling settings."""
    size, channels, classes = (plan.shape[key] for key in ("image_size", "channels", "num_classes"))
    null = plan.shape["null_class"] and classes > 0
    vp: dict[str, Any] = {"name": "vp", "steps": 1000, "schedule": "linear", "prediction": "eps"}
    if source == "uvit" and channels == 4:
        vp["schedule"] = "scaled_linear"
    if plan.shape["learn_sigma"]:
        vp |= {"variance": "learned_range", "loss": "hybrid"}
    ddpm = {"sampler": "ddpm", "steps": "250"}
    # Latent models guide three of the four channels, as DiT's release does.
    latent = {"guidance": 4.0 if null else 1.0, "guidance_channels": 3, "clip": False}
    weight = {"guidance": 4.4, "guidance_schedule": "power_cosine"} if size <= 32 else {"guidance": 1.49}
    weak = 1.7 if size == 64 else 1.4  # at 512x512 and 256x256
    process, sample = {
        "dit": (vp, ddpm | latent),
        "sit": ({"name": "flow"}, {"sampler": "euler_maruyama", "steps": "250"} | latent),
        "diffit": (vp, ddpm | latent | (weight if null else {})),
        "adm": (vp | ({"schedule": "cosine"} if size == 64 else {}), ddpm),
        "uvit": (
            vp,
            {"sampler": "dpm_solver", "steps": "50", "guidance": weak if null else 1.0, "clip": False},
        ),
        "ddpmpp": ({"name": "edm"}, {"sampler": "heun", "steps": "18" if size <= 32 else "40"}),
    }[source]
    return {
        "autoencoder": AUTOENCODER if source not in ("adm", "ddpmpp") and channels == 4 else None,
        "data": {"name": "none", "channels": channels, "image_size": size, "num_classes": classes},
        "denoiser": {"name": plan.denoiser, **dataclasses.asdict(plan.config)},
        "process": process,
        "trainer": {"label_dropout": 0.1 if null else 0.0},
        "sample": sample,
        # Only levels that this schedule reaches.
        **({"validation": {"log_snr": [-4.0, -2.0, 0.0, 2.0, 4.0, 6.0]}} if vp["schedule"] == "scaled_linear" else {}),
    }


def _write(out: Path, config: RunConfig, net: nn.Module, facts: dict[str, str]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        staged.chmod(0o755)
        write_text(staged / "config.yaml", to_yaml(config))
        weights.export(staged, net, config.ema.decays[0], list(net.parameters()), images=0, facts=facts)
        staged.rename(out)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
