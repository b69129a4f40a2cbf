"""Loading and saving autoencoders in diffusers' format: a folder with config.json and safetensors, or a hub name."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from diffbench.autoencoders.kl import KLAutoencoder, KLConfig

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
# Names of attention layers in old checkpoints, some of which store them as 1x1 convolutions.
LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Keys of a config.json besides KLConfig's fields, with the only value that kl.py implements.
ONLY = {"_class_name": "AutoencoderKL", "act_fn": "silu", "latents_mean": None, "latents_std": None}
# Keys that do not affect the output.
IGNORED = {"_diffusers_version", "_name_or_path", "sample_size", "force_upcast", "down_block_types", "up_block_types"}


def load(source: str | Path) -> KLAutoencoder:
    """Load an autoencoder from a folder in diffusers' format, or from the hub.

    Args:
        source: the folder, or a hub name such as stabilityai/sd-vae-ft-ema; a folder of that name takes precedence.
            Files missing from the hub's cache are downloaded, after a line that says so.

    Returns:
        The float32 network in eval mode, with gradients disabled.

    Raises:
        ValueError: if something is missing, unknown, does not fit or cannot be downloaded; the message is one line that
            begins with the source or its file.
    """
    folder = find(source)
    config, weights = read_config(folder), _read_weights(folder)
    with torch.device("meta"):
        net = KLAutoencoder(config)
    wanted, given = net.state_dict(), {_current_name(key): tensor for key, tensor in weights.items()}
    for what, keys in {"missing": wanted.keys() - given.keys(), "unexpected": given.keys() - wanted.keys()}.items():
        if keys:
            raise ValueError(f"{folder / WEIGHTS}: {len(keys)} keys {what}: {', '.join(sorted(keys)[:4])}")
    for key, like in wanted.items():
        if given[key].numel() == like.numel() and given[key].ndim == 4:
            given[key] = given[key].reshape(like.shape)
        if given[key].shape != like.shape:
            shapes = f"{list(given[key].shape)}, but {CONFIG} makes {list(like.shape)}"
            raise ValueError(f"{folder / WEIGHTS}: {key} has shape {shapes}")
    net.load_state_dict({key: given[key].float() for key in wanted}, assign=True)
    if read_notes(folder).get("fingerprint", net.fingerprint) != net.fingerprint:  # only our own files record it
        raise ValueError(f"{folder / WEIGHTS}: damaged: the weights do not match their recorded fingerprint")
    return net.eval().requires_grad_(False)


def find(source: str | Path) -> Path:
    return Path(source) if Path(source).is_dir() else _from_hub(str(source))


def save(net: KLAutoencoder, folder: Path, notes: Mapping[str, str] | None = None) -> None:
    """Write a folder that `load` and diffusers' `AutoencoderKL.from_pretrained` can read.

    config.json is absent during writing, so that no weights are read with the scale of others. `notes` are stored in
    the header of the weights; `read_notes` returns them.
    """
    levels = len(net.config.block_out_channels)
    values = {
        "_class_name": ONLY["_class_name"],
        **dataclasses.asdict(net.config),
        "act_fn": ONLY["act_fn"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in net.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    _replace(folder / WEIGHTS, to_bytes(tensors, {"format": "pt", "fingerprint": net.fingerprint, **(notes or {})}))
    _replace(folder / CONFIG, (json.dumps(values, indent=2) + "\n").encode())


def read_notes(folder: Path) -> dict[str, str]:
    """Return the notes in a folder's weights; empty if the folder is incomplete or the weights are damaged."""
    if not (folder / CONFIG).is_file():
        return {}
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def read_config(folder: Path) -> KLConfig:
    """Read the sizes from a folder's config.json; missing keys take diffusers' defaults."""
    path = folder / CONFIG
    try:
        values: dict[str, Any] = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise ValueError(f"{path}: {getattr(e, 'strerror', None) or 'not valid JSON'}") from None
    for key, only in ONLY.items():
        if values.pop(key, only) != only:
            raise ValueError(f"{path}: {key}: must be {json.dumps(only)}")
    widths = values.get("block_out_channels") or []
    if not isinstance(widths, list):
        raise ValueError(f"{path}: block_out_channels: must be a list of widths, got {json.dumps(widths)}")
    levels = len(widths)
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if values.get(key, [kind] * levels) != [kind] * levels:
            raise ValueError(f"{path}: {key}: must name {kind} for each of the {levels} levels")
    known = {f.name for f in dataclasses.fields(KLConfig)}
    unknown = sorted(values.keys() - known - IGNORED)
    if unknown:
        raise ValueError(f"{path}: {unknown[0]}: unknown key; allowed: {', '.join(sorted(known | IGNORED))}")
    # diffusers' defaults, a network of one level, differ from KLConfig's; missing keys mean these.
    chosen: dict[str, Any] = {"block_out_channels": [64], "layers_per_block": 1}
    chosen |= {key: value for key, value in values.items() if key in known and value is not None}
    try:
        return KLConfig(**chosen)
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path}: {e}") from None


def _current_name(key: str) -> str:
    return re.sub(r"(attentions\.0)\.(\w+)\.", lambda m: f"{m[1]}.{LEGACY.get(m[2], m[2])}.", key)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        why = f"; {pickles[0]} is a pickle, which is not opened: save it as safetensors" if pickles else ""
        raise ValueError(f"{path}: no such file{why}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path}: not valid safetensors: {e}") from None


def _from_hub(name: str) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or Path(name).parent.is_dir():
        raise ValueError(
            f"{name}: no such folder; give a folder with {CONFIG} and {WEIGHTS}, or a hub name such as"
            " stabilityai/sd-vae-ft-ema"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def fetch(local_files_only: bool) -> Path:
        paths = [hf_hub_download(name, file, local_files_only=local_files_only) for file in (CONFIG, WEIGHTS)]
        return Path(paths[0]).parent

    try:
        return fetch(local_files_only=True)
    except LocalEntryNotFoundError:
        pass
    command = f"hf download {name} {CONFIG} {WEIGHTS}"
    hint = f"run `{command}` with internet access, or give a folder with both files"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise ValueError(f"{name}: not cached, and HF_HUB_OFFLINE is set; {hint}")
    print(f"downloading {name} from the hub, once (as `{command}` would)")
    try:
        return fetch(local_files_only=False)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().split("\n")[0]
        raise ValueError(f"{name}: not cached, and the download failed ({reason}); {hint}") from None


def _replace(path: Path, data: bytes) -> None:
    staged = path.with_name(f".{path.name}.staged")
    staged.write_bytes(data)
    os.replace(staged, path)
