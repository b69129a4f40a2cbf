"""Reading images and statistics from folders and npz files of any origin; writing files for the ADM evaluator."""

import hashlib
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffbench.core.errors import UserError
from diffbench.core.files import atomic, sha256
from diffbench.data.places import list_files
from diffbench.data.transforms import FORMATS, SUFFIXES, BrokenError, decode, quiet
from diffbench.metrics import Extractor
from diffbench.metrics.base import Gaussian, ReferenceStatistics

LOSSLESS = {"PNG", "BMP", "GIF", "TIFF", "PPM"}
"""Formats that store pixels exactly; JPEG does not, and WebP may not."""


class ImageFolder:
    """The images under a folder, sorted by path, found and decoded by the same rules as in training."""

    def __init__(self, path: Path) -> None:
        try:
            listing = list_files(path)
        except ValueError as e:
            raise UserError(str(e)) from None
        if not listing.images:
            raise UserError(f"{path}: contains no images; allowed: {', '.join(sorted(SUFFIXES))}")
        print(listing, flush=True)
        self.files = [path / name for name in listing.images]
        self.labels: Tensor | None = None
        channels, height, width = _read(self.files[0]).shape
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield all images in batches (B, C, H, W) uint8; grey images are repeated to RGB if the first image is RGB."""
        for start in range(0, len(self), size):
            with quiet():
                yield torch.stack([self._like_the_first(path) for path in self.files[start : start + size]])

    def _like_the_first(self, path: Path) -> Tensor:
        image = _read(path)
        if image.shape[1:] != self.shape[1:] or image.shape[0] not in (1, self.shape[0]):
            raise UserError(f"{path}: is {_size(image.shape)}, but {self.files[0].name} is {_size(self.shape)}")
        return image.expand(self.shape)

    def formats(self) -> dict[str, int]:
        """Count the files of each format, detected from their content."""
        found: Counter[str] = Counter()
        for path in self.files:
            with quiet(), Image.open(path, formats=FORMATS) as image:
                found[str(image.format)] += 1
        return dict(sorted(found.items()))

    def identity(self) -> str:
        """Return a hash of the bytes of all files, in order."""
        hashed = hashlib.sha256()
        for path in self.files:
            hashed.update(bytes.fromhex(sha256(path)))
        return hashed.hexdigest()


def _read(path: Path) -> Tensor:
    try:
        pixels, *_ = decode(str(path))
    except BrokenError as e:
        raise UserError(f"{path}: broken image ({e})") from None
    return torch.from_numpy(pixels.copy())


def _size(shape: Any) -> str:
    return f"{shape[2]}x{shape[1]} with {shape[0]} channels"


def compression_note(samples: Mapping[str, int], real: Mapping[str, int]) -> str | None:
    """Return a note if one side had lossy compression and the other did not, which alone changes distances."""
    if not samples or not real or (set(samples) <= LOSSLESS) == (set(real) <= LOSSLESS):
        return None
    return f"{_kinds(samples)} images against {_kinds(real)} ones: the compression alone moves every distance"


def _kinds(formats: Mapping[str, int]) -> str:
    return f"{' and '.join(formats)} ({'lossless' if set(formats) <= LOSSLESS else 'lossy'})"


class ImageNpz:
    """The array `arr_0` (N, H, W, C) uint8 of an npz file, the ADM evaluator's format; `arr_1` may contain labels."""

    def __init__(self, path: Path) -> None:
        self.path, arrays = path, _arrays(path, ("arr_0", "arr_1"))
        if (pixels := arrays.get("arr_0")) is None:
            raise UserError(f"{path}: contains no array arr_0")
        if pixels.ndim != 4 or pixels.dtype != np.uint8 or pixels.shape[3] not in (1, 3) or pixels.size == 0:
            raise UserError(f"{path}: arr_0 must be uint8 (N, H, W, 1 or 3), got {pixels.dtype} {pixels.shape}")
        self.images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        channels, height, width = self.images.shape[1:]
        self.shape = (channels, height, width)
        self.labels = _labels(path, arrays["arr_1"], len(pixels)) if "arr_1" in arrays else None

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int) -> Iterator[Tensor]:
        yield from self.images.split(size)

    def formats(self) -> dict[str, int]:
        """Return an empty count, since the origin of the pixels is unknown."""
        return {}

    def identity(self) -> str:
        return sha256(self.path)


def _labels(path: Path, array: np.ndarray, count: int) -> Tensor:
    """Return labels (count,) int64 from an array (N,), (N, 1) or one-hot (N, K)."""
    labels = array
    if labels.ndim == 2 and labels.shape[1] > 1 and labels.dtype.kind in "biuf":
        one_hot = np.isin(labels, (0, 1)).all() and (labels.sum(1) == 1).all()
        labels = labels.argmax(1) if one_hot else labels
    elif labels.ndim == 2:
        labels = labels[:, 0] if labels.shape[1] else labels
    whole = labels.dtype.kind in "iu" or (labels.dtype.kind == "f" and (labels == np.floor(labels)).all())
    if labels.shape != (count,) or not whole or labels.min() < 0:
        raise UserError(
            f"{path}: arr_1 is {array.dtype} {array.shape}; allowed: the labels of {count:,} images as whole numbers"
            f" ({count},) or ({count}, 1), or one-hot ({count}, classes)"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Load those of the named arrays that an npz file contains; refuse pickled objects, which could run code."""
    found: dict[str, np.ndarray] = {}
    name = "file"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in (n for n in names if n in arrays):
                found[name] = np.asarray(arrays[name])
    except (ValueError, OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{path}: {name} is damaged, or holds objects instead of numbers ({reason})") from None
    return found


ImageSource = ImageFolder | ImageNpz
"""Images of one size, as read by `evaluate` and `reference`."""


def open_images(path: Path) -> ImageSource:
    """Open the images of a folder or an npz file."""
    if path.is_dir():
        return ImageFolder(path)
    if path.suffix == ".npz" and zipfile.is_zipfile(path):
        return ImageNpz(path)
    refuse_missing(path)
    raise UserError(f"{path}: no images here; allowed: a run folder, a folder of images, or an npz with arr_0")


def has_images(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return "arr_0.npy" in archive.namelist()


def refuse_missing(path: Path) -> None:
    """Raise UserError if a file or folder named by the user does not exist."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")


def refuse_to_overwrite(path: Path) -> None:
    """Raise UserError if an output file named by the user already exists."""
    if path.exists():
        raise UserError(f"{path}: already exists; choose another name")


def read_statistics(path: Path) -> tuple[Gaussian, Gaussian | None] | None:
    """Read the fits `mu`, `sigma` and optionally `mu_s`, `sigma_s` of an npz file; return None for any other file."""
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return None
    arrays = _arrays(path, ("mu", "sigma", "mu_s", "sigma_s"))
    if "mu" not in arrays:
        return None
    for name, array in arrays.items():
        if array.dtype.kind not in "iuf" or array.ndim != (1 if name.startswith("mu") else 2):
            raise UserError(f"{path}: {name} must be numbers (D) or (D, D), got {array.dtype} {array.shape}")
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} contains numbers that are not finite")
    for mean, cov in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if (mean in arrays) != (cov in arrays):
            raise UserError(f"{path}: contains {mean if mean in arrays else cov} without its counterpart")
        if mean in arrays and arrays[cov].shape != (d := len(arrays[mean]), d):
            raise UserError(f"{path}: {cov} is {arrays[cov].shape}, but {mean} has {d} numbers")
    numbers = {name: torch.from_numpy(array.astype(np.float64)) for name, array in arrays.items()}
    spatial = Gaussian(0, numbers["mu_s"], numbers["sigma_s"]) if "mu_s" in numbers else None
    return Gaussian(0, numbers["mu"], numbers["sigma"]), spatial


def write_adm_reference(
    path: Path, extractor: Extractor, reference: ReferenceStatistics, images: Sequence[Tensor]
) -> None:
    """Write a reference file that the ADM evaluator reads (Dhariwal & Nichol 2021): arr_0, mu, sigma, mu_s, sigma_s.

    Args:
        path: an npz file that does not exist yet.
        extractor: must be the published one, with its spatial layer.
        reference: statistics of the whole set.
        images: (C, H, W) uint8, for precision and recall; at most 10,000 is customary.

    Raises:
        UserError: for any other extractor, since the evaluator would silently compare two feature spaces.
    """
    refuse_to_overwrite(path)
    if not extractor.published or reference.spatial is None:
        raise UserError(
            f"{path}: the ADM evaluator reads Inception statistics with a spatial layer, not those of {extractor.name};"
            " allowed: evaluate.extractor=inception with a state dict as evaluate.weights"
        )
    fits = {"mu": reference.fit.mean, "sigma": reference.fit.cov}
    fits |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.cov}
    pixels = torch.stack(list(images)).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    with atomic(path) as file:
        np.savez(file, allow_pickle=False, arr_0=pixels.numpy(), **{n: t.cpu().numpy() for n, t in fits.items()})
