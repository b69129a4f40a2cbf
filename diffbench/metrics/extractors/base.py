"""Feature extractors by name. They take uint8 images of any size and are deterministic.

An `Extractor` is not an nn.Module, so no training module can register its network: its weights stay out of checkpoints,
EMA and parameter counts, and it is never put into training mode. A new extractor gets a row in `EXTRACTORS`, or is
named in the config as `package.module:function`.
"""

import contextlib
import difflib
import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

VERSION = 1
"""Increase this when the features of any extractor change, so that cached statistics are recomputed."""


class Features(NamedTuple):
    """Output of a network for B images: features (B, D), optional logits (B, K) and optional spatial layer (B, S)."""

    pooled: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


@dataclass
class Request:
    """Facts about the images that are known when an extractor is built.

    Attributes:
        shape: (C, H, W) of the images.
        weights: file of weights, `evaluate.weights`; None if the config names none.
        training: reads training images (N, C, H, W) uint8, their labels (N,) and a fingerprint of both; None if
            there are none.
        classes: number of label classes; None if unknown.
        cached: (name, make) -> state dict, cached under that name; by default made on each call.
    """

    shape: tuple[int, int, int]
    weights: str | None = None
    training: Callable[[], tuple[Tensor, Tensor, str]] | None = None
    classes: int | None = None
    cached: Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]] = field(
        default=lambda name, make: make()
    )


@dataclass(eq=False)
class Extractor:
    """A feature network that is not a submodule of any other module.

    Attributes:
        name: part of every metric's name; it says how images are resized, if they are.
        network: the network, put into eval mode at each call.
        run: prepared images (B, channels, h, w) -> Features.
        dim: number of features.
        weights: sha256 of the weights.
        channels: 1 or 3; grey images are repeated for a network with 3 input channels.
        prepare: maps uint8 images to the input of `run`.
        classes: number of logits, None without logits.
        spatial: length of the spatial layer, None without one.
        predicts_labels: whether its classes are those of the data set.
        published: whether a distance between its features may be called FID.
    """

    name: str
    network: nn.Module
    run: Callable[[Tensor], Features]
    dim: int
    weights: str
    licence: str
    channels: int = 3
    prepare: Callable[[Tensor], Tensor] = Tensor.float
    classes: int | None = None
    spatial: int | None = None
    predicts_labels: bool = False
    published: bool = False
    device: torch.device = field(default=torch.device("cpu"), init=False)

    def to(self, device: torch.device | str) -> "Extractor":
        self.device = torch.device(device)
        self.network.to(self.device)
        return self

    def __call__(self, images: Tensor) -> Features:
        """Extract features of images (B, C, H, W) uint8, in float32 even under autocast.

        Raises:
            ValueError: if the images are not uint8, or have a wrong number of channels.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"{self.name} takes uint8 images (B, C, H, W), got {images.dtype} {tuple(images.shape)}")
        if images.shape[1] not in (1, self.channels):
            raise ValueError(f"{self.name} takes {self.channels} channels, got {images.shape[1]}")
        self.network.eval()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), full_precision():
            images = images.to(self.device).expand(-1, self.channels, -1, -1)
            return self.run(self.prepare(images))


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 matrix products and convolutions in full float32 precision, without TF32."""
    before = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(enabled=True, benchmark=False, deterministic=cudnn.deterministic, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Entry:
    """A registered extractor.

    Attributes:
        build: makes the extractor, or a plain nn.Module from uint8 images (B, C, H, W) to features (B, D).
        check: raises a one-line ValueError that says what to install or which file to put where; takes no time.
        installed: whether the packages that it needs are installed.
        reads_file: whether it uses `evaluate.weights`.
    """

    build: Callable[[Request], Extractor | nn.Module]
    check: Callable[[Request], None] = lambda request: None
    installed: Callable[[], bool] = lambda: True
    reads_file: bool = False


EXTRACTORS: dict[str, Entry] = {}
"""Name in `evaluate.extractor` -> entry."""


def plain(name: str, network: nn.Module, shape: tuple[int, int, int]) -> Extractor:
    """Wrap a network that maps uint8 images (B, C, H, W) to features (B, D); raise ValueError if it does not."""
    try:
        network.eval().requires_grad_(False)
        with torch.no_grad():
            features = network(torch.zeros(2, *shape, dtype=torch.uint8))
        if features.ndim != 2 or len(features) != 2:
            raise TypeError(f"two images give {tuple(features.shape)}")
    except Exception as e:
        wanted = f"must map uint8 images (B, {', '.join(map(str, shape))}) to features (B, D)"
        raise ValueError(f"{name}: {wanted} ({type(e).__name__}: {e})") from None
    return Extractor(
        name=name.replace(":", "."),
        network=network,
        run=lambda images: Features(network(images).float()),
        dim=features.shape[1],
        weights=_identity(network),
        licence="not stated",
        channels=shape[0],
        prepare=lambda images: images,
    )


def _identity(network: nn.Module) -> str:
    """Return a sha256 of a network's weights, its modules' numeric attributes, and the source files of its classes."""
    digest = hashlib.sha256(state_hash(network).encode())
    files: dict[str, None] = {}
    for module in network.modules():
        kind = type(module)
        numbers = {k: v for k, v in vars(module).items() if k[0] != "_" and _is_numbers(v)}
        digest.update(f"{kind.__qualname__} {sorted(numbers.items())}\n".encode())
        if not kind.__module__.startswith("torch."):
            with contextlib.suppress(OSError, TypeError):  # a class typed at a prompt has no file
                files[inspect.getfile(kind)] = None
    for file in files:  # each file once, even if it defines several layers
        with contextlib.suppress(OSError):  # a notebook cell has no file on disk
            digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def _is_numbers(value: object) -> bool:
    return all(isinstance(item, int | float) for item in (value if isinstance(value, tuple) else (value,)))


def check(name: str, request: Request) -> None:
    """Check that an extractor can be made here, without making it; any ValueError begins with the key."""
    try:
        entry = _entry(name)
        entry.check(request)
    except ValueError as e:
        raise ValueError(f"evaluate.extractor: {e}") from None
    if request.weights is not None and not entry.reads_file:
        raise ValueError(
            f"evaluate.weights: {name} reads no file; allowed: evaluate.weights=null, or evaluate.extractor=inception"
        )


def check_channels(name: str, request: Request) -> None:
    """Check that the images are grey or RGB."""
    if request.shape[0] not in (1, 3):
        raise ValueError(f"{name} reads grey or RGB images, got {request.shape[0]} channels")


def extractor(name: str, request: Request) -> Extractor:
    """Make the extractor with this name; any ValueError begins with the key."""
    check(name, request)
    try:
        made = _entry(name).build(request)
        return made if isinstance(made, Extractor) else plain(name, made, request.shape)
    except Exception as e:
        if name in EXTRACTORS:
            raise
        text = str(e) if str(e).startswith(f"{name}: ") else f"{name} cannot be made ({type(e).__name__}: {e})"
        raise ValueError(f"evaluate.extractor: {text}") from None


def _entry(name: str) -> Entry:
    if name in EXTRACTORS:
        return EXTRACTORS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, list(EXTRACTORS), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(EXTRACTORS)
        raise ValueError(f"unknown extractor {name!r}; choose from {known}, or write package.module:function{hint}")
    try:
        return Entry(getattr(importlib.import_module(module), attribute), reads_file=True)
    except Exception as e:  # importing user code may raise anything
        raise ValueError(f"{name} cannot be imported ({e})") from None


def state_hash(network: nn.Module) -> str:
    """Return a sha256 of a network's parameters and buffers, including their names."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
