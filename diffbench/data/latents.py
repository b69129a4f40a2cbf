"""Latents of a data set: encoded once; mean and log-variance are stored, so that each epoch draws anew."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffbench.autoencoders import KLAutoencoder
from diffbench.core.errors import UserError
from diffbench.core.pixels import from_uint8
from diffbench.core.progress import progress
from diffbench.core.store import DamagedError, Filling, Store
from diffbench.data.sets import ImageSet, InMemory, digest_of, rows

Dtype = Literal["float16", "float32"]


@dataclass(frozen=True)
class LatentSet(InMemory):
    """Gaussian posteriors of N images: mean and log-variance (N, c, h, w), fp16 or fp32, possibly memory maps.

    Attributes:
        num_classes: 0 for images without labels.
        scale: with `shift` it brings latents to about unit variance: (z - shift) * scale.
        flipped_mean: of the mirrored images, where they were encoded too.
    """

    FIELDS = {n: n for n in ("mean", "log_variance", "flipped_mean", "flipped_log_variance")}  # noqa: RUF012

    mean: Tensor
    log_variance: Tensor
    labels: Tensor
    num_classes: int
    scale: float = 1.0
    shift: float = 0.0
    flipped_mean: Tensor | None = None
    flipped_log_variance: Tensor | None = None
    name: str = "images"
    class_names: tuple[str, ...] = ()
    digest: str | None = None

    def clean(self, index: Tensor) -> Tensor:
        """The latents that validation restores of the images `index` (B,): the scaled means (B, c, h, w) float32."""
        return self.scaled(rows(self.mean, index).float())

    def scaled(self, z: Tensor) -> Tensor:
        """Latents as denoisers see them."""
        return (z - self.shift) * self.scale


def encode(
    images: ImageSet,
    autoencoder: KLAutoencoder,
    folder: Path,
    *,
    dtype: Dtype = "float16",
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    flip: bool = False,
    scale: float = 1.0,
    shift: float = 0.0,
    rank: int = 0,
    world: int = 1,
    patience: float = 600.0,
) -> LatentSet:
    """The latents of a data set: read from a folder that holds them, else encoded into it.

    A killed command goes on where it stopped, to the same bytes for the same batch size.

    Args:
        autoencoder: in evaluation mode, on `device`.
        flip: whether the mirrored images are encoded too.
        scale: see `LatentSet`; not stored, so that it may change.
        rank: of this process; each encodes chunks of its own.
        patience: seconds without a new chunk of the other ranks after which they are taken for dead.

    Raises:
        UserError: if the folder holds other latents, the disk is full, or another rank is dead.
        ValueError: if a latent is not finite in `dtype`.
    """
    data = {"name": images.name, "fingerprint": images.fingerprint(), "images": len(images)}
    identity = {"data": data, "autoencoder": autoencoder.fingerprint, "dtype": dtype, "flip": flip}
    store = Store(folder)
    with contextlib.suppress(DamagedError):  # which is encoded anew
        if store.identity() not in (None, identity):
            raise UserError(f"{folder}: holds other latents; choose another folder, or remove it")
    if (found := store.open_intact()) is None:

        @torch.inference_mode()
        def moments(first: int, last: int) -> dict[str, np.ndarray]:
            parts: dict[str, list[np.ndarray]] = {}
            for start in range(first, last, batch_size):
                x = from_uint8(images.images[start : min(start + batch_size, last)].to(device))
                for prefix, batch in (("", x), ("flipped_", x.flip(-1))) if flip else (("", x),):
                    for name, array in zip(("mean", "log_variance"), autoencoder.encode(batch), strict=True):
                        stored = array.to(getattr(torch, dtype)).cpu().numpy()
                        if not np.isfinite(stored).all():
                            bad = start + int(np.flatnonzero(~np.isfinite(stored).all(axis=(1, 2, 3)))[0])
                            raise ValueError(f"autoencoder: the {name} of image {bad} is not finite in {dtype}")
                        parts.setdefault(prefix + name, []).append(stored)
            return {name: np.concatenate(arrays) for name, arrays in parts.items()}

        kind = np.dtype(dtype).newbyteorder("<").str
        columns: dict[str, Any] = {name: (kind, array.shape[1:]) for name, array in moments(0, 1).items()}
        with store.fill(identity, columns | {"labels": ("<i8", ())}, len(images), rank=rank, world=world) as filling:
            _fill(filling, moments, images.labels.numpy(), f"encoding (rank {rank})" if world > 1 else "encoding")
            _finish(filling, patience)
        found = store.open()
    known: dict[str, Any] = {"name": images.name, "num_classes": images.num_classes, "class_names": images.class_names}
    known |= {**found.arrays, "scale": scale, "shift": shift, "digest": found.facts["fingerprint"]}
    return LatentSet(**known)


def _fill(
    filling: Filling, moments: Callable[[int, int], dict[str, np.ndarray]], labels: np.ndarray, what: str
) -> None:
    done = sum(line["rows"] for line in filling.present.values())
    total = done + sum(chunk.last - chunk.first for chunk in filling.missing)
    if total:
        with progress(what, total, done) as advance:
            for chunk in filling.missing:
                filling.add(chunk, moments(chunk.first, chunk.last) | {"labels": labels[chunk.first : chunk.last]})
                advance(chunk.last - chunk.first)


def _finish(filling: Filling, patience: float) -> None:
    found, since = 0, time.monotonic()
    while not filling.finish(lambda arrays, chunks: {"fingerprint": digest_of(arrays.values())}):
        if (now := len(filling.store.chunks())) > found:
            found, since = now, time.monotonic()
        if time.monotonic() - since > patience:
            total = len(filling.chunks)
            raise UserError(
                f"{filling.store.folder}: {total - now} of {total} chunks of other ranks are missing, and none came for"
                f" {patience:.0f} s; start the same command again"
            )
        time.sleep(0.2)
