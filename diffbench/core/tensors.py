"""Safetensors files that carry a hash of what they hold: written whole or not at all, and never read damaged."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from diffbench.core.errors import UserError
from diffbench.core.files import write_bytes

SEAL = "content_sha256"


def write(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, str] | None = None) -> None:
    """Writes tensors, and `told` with a hash of both into the metadata.

    Raises:
        UserError: if the disk is full.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, {**(told or {}), SEAL: _hash(plain, told or {})}))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file; one from before there were hashes is taken as it is.

    Raises:
        UserError: naming the file, if it is not what was written.
    """
    try:
        with safe_open(path, "pt") as file:
            told = dict(file.metadata() or {})
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path}: damaged ({e}); remove it") from None
    stated = told.pop(SEAL, None)
    if stated is not None and stated != _hash(tensors, told):
        raise UserError(f"{path}: damaged (its hash differs); remove it")
    return tensors, told


def _hash(tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> str:
    hashed = hashlib.sha256(json.dumps(dict(told), sort_keys=True).encode())
    for name in sorted(tensors):
        hashed.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        hashed.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
