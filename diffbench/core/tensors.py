"""Tensor files: safetensors with a content hash, which exposes any damage; and dictionaries saved by torch.save."""

import hashlib
import json
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from diffbench.core.errors import UserError
from diffbench.core.files import write_bytes

HASH = "content_sha256"
"""Metadata key of the hash."""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors, metadata and a hash of both, atomically."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in on_cpu.items():  # safetensors rejects tensors that share memory, such as tied weights
        memory = tensor.untyped_storage().data_ptr()
        on_cpu[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    plain = dict(metadata or {})
    write_bytes(path, save(on_cpu, plain | {HASH: _hash(on_cpu, plain)}))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and metadata that `write` wrote; raise UserError if the file has changed since."""
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path}: damaged ({e}); remove it") from None
    if metadata.pop(HASH, None) != _hash(tensors, metadata):
        raise UserError(f"{path}: damaged (its hash differs); remove it")
    return tensors, metadata


def read_state(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a dictionary saved by torch.save without running any code in it; raise UserError for any other file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns about pickles that it then refuses
            state: Any = torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError):
        raise UserError(f"{path}: damaged, or holds pickled code, which is never run; remove it") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a training state; remove it")
    return state


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Put a network in eval mode inside the block, then restore its mode."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def by_name(network: nn.Module, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """Map parameter names to `weights`, in the order of network.parameters(); tied weights appear under all names."""
    values = dict(zip(network.parameters(), weights, strict=True))
    return {name: values[p] for name, p in network.named_parameters(remove_duplicate=False)}


def _hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
