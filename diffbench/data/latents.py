"""Latents of a data set: encoded once, the posterior's mean and log-variance kept, so that each epoch draws anew."""

import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from diffbench.core.errors import UserError
from diffbench.core.pixels import from_uint8
from diffbench.core.progress import progress
from diffbench.core.store import Contents, DamagedError, Store
from diffbench.data.sets import ImageSet, rows

Dtype = Literal["float16", "float32"]


class Autoencoder(Protocol):
    """What `encode` needs of an autoencoder."""

    @property
    def fingerprint(self) -> str:
        """A hash of its weights."""
        ...

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, C, H, W) in [-1, 1] to mean and log-variance (B, c, h, w) of their latents."""
        ...


@dataclass(frozen=True)
class LatentSet:
    """Gaussian posteriors of N pictures: mean and log-variance (N, c, h, w), fp16 or fp32, possibly memory maps.

    Attributes:
        labels: (N,) int64 classes.
        num_classes: 0 for pictures without labels.
        scale: with `shift` it brings latents to about unit variance: (z - shift) * scale.
        flipped: the posteriors of the mirrored pictures, where they were encoded too.
        name: of the data set.
        class_names: by label, or none.
        digest: the fingerprint where it is known already.
        spread: mean and standard deviation over all latents drawn, unscaled.
    """

    mean: Tensor
    log_variance: Tensor
    labels: Tensor
    num_classes: int
    scale: float = 1.0
    shift: float = 0.0
    flipped: "LatentSet | None" = None
    name: str = "images"
    class_names: tuple[str, ...] = ()
    digest: str | None = None
    spread: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self.mean)

    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of a hash of all means, log-variances and labels."""
        if self.digest is not None:
            return self.digest
        flipped = [self.flipped.mean, self.flipped.log_variance] if self.flipped else []
        return _digest([a.numpy() for a in (self.mean, self.log_variance, *flipped, self.labels)])

    def to(self, device: torch.device | str) -> "LatentSet":
        """The whole set on a device."""
        flipped = self.flipped.to(device) if self.flipped else None
        mean, log_variance, labels = (a.to(device) for a in (self.mean, self.log_variance, self.labels))
        return replace(self, mean=mean, log_variance=log_variance, labels=labels, flipped=flipped)

    @property
    def nbytes(self) -> int:
        """Of the whole set."""
        own = self.mean.nbytes + self.log_variance.nbytes + self.labels.nbytes
        return own + (self.flipped.nbytes if self.flipped else 0)

    def first(self, count: int) -> "LatentSet":
        """Those of the first `count` pictures, or fewer where there are fewer."""
        mean, log_variance, labels = (a[:count] for a in (self.mean, self.log_variance, self.labels))
        flipped = self.flipped.first(count) if self.flipped else None
        return replace(self, mean=mean, log_variance=log_variance, labels=labels, flipped=flipped, digest=None)

    def gather(self, index: Tensor) -> dict[str, Tensor]:
        """What a batch of the pictures `index` (B,) holds."""
        batch = {"mean": rows(self.mean, index), "log_variance": rows(self.log_variance, index)}
        if self.flipped:
            batch["flipped_mean"] = rows(self.flipped.mean, index)
            batch["flipped_log_variance"] = rows(self.flipped.log_variance, index)
        return batch | {"label": rows(self.labels, index)}

    def clean(self, index: Tensor) -> Tensor:
        """What validation restores of the pictures `index` (B,): the scaled means (B, c, h, w) float32."""
        return self.scaled(rows(self.mean, index).float())

    def scaled(self, z: Tensor) -> Tensor:
        """Latents as denoisers see them."""
        return (z - self.shift) * self.scale


def encode(
    images: ImageSet,
    autoencoder: Autoencoder,
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
    """The latents of a data set: from the folder where they lie there, else encoded into it.

    A command killed at any moment goes on where it stopped, with the same result to the byte for the same batch size.
    A chunk found damaged is encoded anew.

    Args:
        images: what to encode.
        autoencoder: in evaluation mode, on `device`.
        folder: of this cache.
        dtype: of what is kept.
        batch_size: pictures encoded at a time.
        device: where to encode.
        flip: whether the mirrored pictures are encoded too.
        scale: see `LatentSet`; not kept, so that it may change.
        shift: see `LatentSet`.
        rank: of this process; each encodes chunks of its own.
        world: processes at work.
        patience: seconds without a new chunk of the other ranks after which they are taken for dead.

    Raises:
        UserError: if the folder holds other latents (naming both) or other files, the disk is full, or another rank
            is dead.
        ValueError: if a latent is not finite in `dtype`.
    """
    identity = _identity(images, autoencoder, dtype, flip)
    store = Store(folder)
    _check_folder(store, identity)
    if (found := store.open_intact()) is None:
        job = _Job(images, autoencoder, torch.device(device), batch_size, flip)
        _fill(job, store, identity, dtype, rank, world, patience)
        found = store.open()
    return _latents(found, images, scale, shift)


@dataclass(frozen=True)
class _Job:
    images: ImageSet
    autoencoder: Autoencoder
    device: torch.device
    batch_size: int
    flip: bool

    @torch.inference_mode()
    def moments(self, first: int, last: int, dtype: Dtype) -> dict[str, np.ndarray]:
        """The arrays of pictures first to last - 1, but for the labels."""
        parts: dict[str, list[np.ndarray]] = {}
        for start in range(first, last, self.batch_size):
            x = from_uint8(self.images.images[start : min(start + self.batch_size, last)].to(self.device))
            for prefix, pictures in (("", x), ("flipped_", x.flip(-1))) if self.flip else (("", x),):
                for name, array in zip(("mean", "log_variance"), self.autoencoder.encode(pictures), strict=True):
                    kept = array.to(getattr(torch, dtype)).cpu().numpy()
                    if not np.isfinite(kept).all():
                        bad = start + int(np.flatnonzero(~np.isfinite(kept).all(axis=(1, 2, 3)))[0])
                        raise ValueError(f"autoencoder: the {name} of picture {bad} is not finite in {dtype}")
                    parts.setdefault(prefix + name, []).append(kept)
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _fill(job: _Job, store: Store, identity: Any, dtype: Dtype, rank: int, world: int, patience: float) -> None:
    kind, total = np.dtype(dtype).newbyteorder("<"), len(job.images)
    columns: dict[str, tuple[str, tuple[int, ...]]] = {
        name: (kind.str, array.shape[1:]) for name, array in job.moments(0, 1, dtype).items()
    }
    columns["labels"] = ("<i8", ())
    with store.fill(identity, columns, total, rank=rank, world=world) as filling:
        done = sum(line["rows"] for line in filling.present.values())
        share = done + sum(chunk.last - chunk.first for chunk in filling.missing)
        if share:
            with progress("encoding" if world == 1 else f"encoding (rank {rank})", share, done) as advance:
                for chunk in filling.missing:
                    labels = job.images.labels[chunk.first : chunk.last].numpy()
                    filling.add(chunk, job.moments(chunk.first, chunk.last, dtype) | {"labels": labels})
                    advance(chunk.last - chunk.first)
        found, since = 0, time.monotonic()
        while not filling.finish(_facts):  # other ranks are at work
            if (now := len(store.chunks())) > found:
                found, since = now, time.monotonic()
            if time.monotonic() - since > patience:
                raise UserError(
                    f"{store.folder}: {len(filling.chunks) - now} of {len(filling.chunks)} chunks of other ranks are"
                    f" missing, and none came for {patience:.0f} s; start the same command again"
                )
            time.sleep(0.2)


def _identity(images: ImageSet, autoencoder: Autoencoder, dtype: Dtype, flip: bool) -> dict[str, Any]:
    data = {"name": images.name, "fingerprint": images.fingerprint(), "images": len(images)}
    return {"data": data, "autoencoder": autoencoder.fingerprint, "dtype": dtype, "flip": flip}


def _check_folder(store: Store, identity: dict[str, Any]) -> None:
    """Refuse a folder of other latents, or of something else."""
    folder = store.folder
    others = [p.name for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []
    try:
        found = store.identity()
    except DamagedError as e:
        raise UserError(f"{e}; remove {folder} to encode anew") from None
    if found is None and others:
        raise UserError(f"{folder}: holds {min(others)} but no latents; choose another folder")
    if found is not None and found != identity:
        raise UserError(f"{folder}: holds {_said(found)}, not {_said(identity)}; choose another folder, or remove it")


def _said(identity: Any) -> str:
    try:
        data, mirrored = identity["data"], " with mirrored ones" if identity["flip"] else ""
        return (
            f"{identity['dtype']} latents of data set {data['name']} ({data['fingerprint']}, {data['images']:,} images"
            f"{mirrored}) by autoencoder {identity['autoencoder'][:16]}"
        )
    except (KeyError, TypeError):
        return "something else"


def _latents(found: Contents, images: ImageSet, scale: float, shift: float) -> LatentSet:
    arrays = found.arrays
    common: dict[str, Any] = {
        "labels": arrays["labels"],
        "num_classes": images.num_classes,
        "scale": scale,
        "shift": shift,
        "name": images.name,
        "class_names": images.class_names,
    }
    flipped = None
    if "flipped_mean" in arrays:
        flipped = LatentSet(arrays["flipped_mean"], arrays["flipped_log_variance"], **common)
    return LatentSet(
        arrays["mean"],
        arrays["log_variance"],
        **common,
        flipped=flipped,
        digest=found.facts["fingerprint"],
        spread=(found.facts["mean"], found.facts["std"]),
    )


def _facts(arrays: dict[str, np.ndarray], chunks: list[Any]) -> dict[str, Any]:
    """Fingerprint, and mean and standard deviation of z = mean + exp(log_variance / 2) noise over all elements."""
    rows = len(arrays["labels"])
    first, second = [], []
    for start in range(0, rows, 1024):
        mean, log_variance = (arrays[n][start : start + 1024].astype(np.float64) for n in ("mean", "log_variance"))
        first.append(mean.sum())
        second.append((mean**2 + np.exp(log_variance)).sum())
    size = arrays["mean"].size
    centre = float(sum(first)) / size
    std = (float(sum(second)) / size - centre**2) ** 0.5
    return {"fingerprint": _digest(list(arrays.values())), "mean": centre, "std": std}


def _digest(arrays: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data.cast("B"))
    return digest.hexdigest()[:16]
