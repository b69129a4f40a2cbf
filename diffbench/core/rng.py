"""Keyed random numbers: each one is a function of (key, position), never of what was drawn before.

Philox4x32-10 (Salmon et al. 2011) in integer operations of torch: one call serves a whole batch, the bits are the same
on any device, for any batch size and number of processes, and no global generator is touched.
"""

import hashlib
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_CACHED = 1 << 14  # counters processed at a time on a CPU, so that they fit in its caches


def key(*parts: int | str) -> int:
    """Return a 64-bit key for a purpose, as in key(seed, "noise"); parts are hashed with their types, never packed."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def philox(counter: tuple[Any, Any, Any, Any], key: int | tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Return four 32-bit words per 128-bit counter; both are four broadcastable arrays of values below 2^32.

    The arrays are int64 tensors on any device, or NumPy's uint64, which takes a quarter of the time on a CPU. Several
    keys are passed as two arrays that broadcast with the counters: their lower and their upper halves.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = (key & _MASK, key >> 32) if isinstance(key, int) else key
    for _ in range(10):
        c0, c2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = c0 >> 32, c2 >> 32
        high0 &= _MASK  # shifting int64 right copies its sign bit
        high1 &= _MASK
        c0 &= _MASK
        c2 &= _MASK
        high1, high0 = high1 ^ c1, high0 ^ c3
        high1 ^= k0
        high0 ^= k1
        c0, c1, c2, c3 = high1, c2, high0, c0
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


def words(key: int, positions: Tensor, count: int) -> Tensor:
    """Return (B, count) 32-bit words as int64; row i depends only on key and positions[i]."""
    blocks = torch.arange(-(-count // 4), device=positions.device)[None]
    if not positions.is_cpu:
        low, high = (positions & _MASK)[:, None], (positions >> 32 & _MASK)[:, None]
        drawn = torch.stack(torch.broadcast_tensors(*philox((blocks, blocks * 0, low, high), key)), dim=-1)
        return drawn.flatten(1)[:, :count]
    drawn = torch.empty(len(positions), blocks.shape[1], 4, dtype=torch.int64)
    block, position, out = _unsigned(blocks), _unsigned(positions)[:, None], drawn.numpy()
    rows = max(1, _CACHED // blocks.shape[1])
    for start in range(0, len(positions), rows):
        part = position[start : start + rows]
        for i, word in enumerate(philox((block, block * 0, part & _MASK, part >> 32), key)):
            out[start : start + rows, :, i] = word
    return drawn.flatten(1)[:, :count]


def uniform(key: int, positions: Tensor) -> Tensor:
    """Draw (B,) float64 uniformly from the open interval (0, 1)."""
    return uniforms((key,), positions)[0]


def uniforms(keys: tuple[int, ...], positions: Tensor) -> Tensor:
    """Draw (K, B) float64, each row like `uniform` with one of the keys, in about the time of a single row."""
    low, high = positions & _MASK, positions >> 32 & _MASK
    halves = _halves(keys, positions.device)
    if positions.is_cpu:
        low, high, halves = _unsigned(low), _unsigned(high), tuple(map(_unsigned, halves))
    block = low * 0 + halves[0] * 0
    first, second = philox((block, block, low, high), halves)[:2]
    drawn = first >> 6 << 26 | second >> 6
    return ((torch.from_numpy(drawn.view("int64")) if positions.is_cpu else drawn).double() + 0.5) * 2.0**-52


@lru_cache(maxsize=64)
def _halves(keys: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    lower, upper = ([[half] for half in part] for part in ((k & _MASK for k in keys), (k >> 32 for k in keys)))
    return torch.tensor(lower, device=device), torch.tensor(upper, device=device)


def _unsigned(values: Tensor) -> Any:
    return values.numpy().view("uint64")


def normal(key: int, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draw (B, *shape) float32 from the standard normal distribution (Box and Muller 1958), contiguous."""
    count = math.prod(shape)
    w = words(key, positions, count + count % 2)
    first, second = w[:, 0::2].float(), w[:, 1::2].float()
    radius = (((first + 1) * 2.0**-32).log() * -2).sqrt()
    angle = second * (2 * math.pi * 2.0**-32)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return pairs.flatten(1)[:, :count].reshape(len(positions), *shape).contiguous()


def permutation(key: int, n: int) -> Tensor:
    """Return a permutation of 0..n-1 (int64, CPU), which the key determines."""
    # Small parts and NumPy's sort avoid torch's threads, which wait for each other on a busy machine.
    w = torch.cat([words(key, part, 2) for part in torch.arange(n).split(1 << 14)])
    return torch.from_numpy((w[:, 0] << 31 | w[:, 1] >> 1).numpy().argsort(kind="stable"))
