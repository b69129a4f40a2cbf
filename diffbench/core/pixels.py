"""The one way between bytes and the [-1, 1] of the networks."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Tally:
    """What `to_uint8` met: values in all, beyond [-1, 1] by more than a rounding error of one level, not finite."""

    values: int = 0
    clipped: int = 0
    nonfinite: int = 0


_open: list[Tally] = []


@contextlib.contextmanager
def tally() -> Iterator[Tally]:
    """Counts what every `to_uint8` inside the block clips, and what it finds that is no number."""
    counts = Tally()
    _open.append(counts)
    try:
        yield counts
    finally:
        _open.remove(counts)


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to 0..255: rounded to the nearest (floor(127.5 x + 128), as DiT and EDM do), clamped; NaN becomes 0."""
    x = x.float()
    for counts in _open:
        counts.values += x.numel()
        counts.clipped += int((x.abs() > 1 + 1 / 255).sum())
        counts.nonfinite += int((~x.isfinite()).sum())
    return (x * 127.5 + 128).clamp(0, 255).nan_to_num(0).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """0..255 to [-1, 1], float32."""
    return images.float().div_(127.5).sub_(1)
