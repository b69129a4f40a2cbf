"""Latents of a data set, encoded once: mean and log-variance are stored, so that each epoch draws new latents."""

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
from diffbench.data.sets import ImageSet, InMemory, digest_of, take_rows

Dtype = Literal["float16", "float32"]


@dataclass(frozen=True)
class LatentSet(InMemory):
    """Gaussian posteriors of N images: mean and log-variance (N, c, h, w), fp16 or fp32, possibly memory maps.

    Attributes:
        num_classes: 0 for images without labels.
        scale: brings latents to about unit variance together with `shift`: (z - shift) * scale.
        flipped_mean: mean of the mirrored images, where they were encoded too.
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
        """Return the validation targets of the images `index` (B,): scaled posterior means (B, c, h, w), float32."""
        return self.scaled(take_rows(self.mean, index).float())

    def scaled(self, z: Tensor) -> Tensor:
        """Shift and scale latents to about unit variance, as denoisers see them."""
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
    """Return the latents of a data set: read from `folder` if they are there, else encoded into it.

    After a kill, the same command resumes, and with the same batch size it ends with the same bytes.

    Args:
        autoencoder: in eval mode, on `device`.
        flip: whether to encode the mirrored images too.
        scale: see `LatentSet`; not stored, so it may change between calls.
        rank: rank of this process, which encodes every `world`-th chunk.
        patience: seconds without a new chunk after which the other ranks are presumed dead.

    Raises:
        UserError: if the folder contains other latents, the disk is full, or another rank seems dead.
        ValueError: if a latent is not finite in `dtype`.
    """
    data = {"name": images.name, "fingerprint": images.fingerprint(), "images": len(images)}
    identity = {"data": data, "autoencoder": autoencoder.fingerprint, "dtype": dtype, "flip": flip}
    store = Store(folder)
    with contextlib.suppress(DamagedError):  # damaged latents are encoded again
        if store.identity() not in (None, identity):
            raise UserError(f"{folder}: contains other latents; choose another folder, or remove it")
    if (contents := store.open_intact()) is None:

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
        contents = store.open()
    about: dict[str, Any] = {"name": images.name, "num_classes": images.num_classes, "class_names": images.class_names}
    about |= {**contents.arrays, "scale": scale, "shift": shift, "digest": contents.facts["fingerprint"]}
    return LatentSet(**about)


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
                f"{filling.store.folder}: {total - now} of {total} chunks of other ranks are missing, and none came in"
                f" {patience:.0f} s; run the same command again"
            )
        time.sleep(0.2)
