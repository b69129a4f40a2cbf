"""Sources of images: a folder, parquet files, or the Hugging Face hub; and which of the files count."""

import contextlib
import glob
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from diffbench.core.errors import check_at_least
from diffbench.data.sets import PlantedConfig
from diffbench.data.transforms import FORMATS, SUFFIXES, both_sides, is_grey

SIDE = 32
"""Side in pixels if the config gives none: the largest for a folder, the only one for tables and the hub."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass
class ImagesConfig(PlantedConfig):
    """Custom images: a folder (with class sub-folders or none), parquet files, or a Hugging Face hub name."""

    path: str | None = None
    """A folder of images or of parquet files, one .parquet file, a glob pattern of them, or a hub name."""
    image_size: int | list[int] | None = None
    """Side in pixels of the centre square to keep, or [height, width]; images are resized to it as in ADM. null chooses
    a size that suits a folder's images, at most 32, and 32 for tables and the hub."""
    channels: int | None = None
    """3 for colour, 1 for grey; null uses what a folder's images have, and 3 for tables and the hub."""
    labels: bool = True
    """Whether to use the data's classes, if it has any; false trains without classes."""
    flip: bool = False
    """Whether to mirror half of the training images, redrawn each epoch."""
    split: str | None = None
    """The split to train on; null for "train", or for the only one."""
    held_out: int | None = None
    """Images held out for validation: from the data's own test (or validation) split if it has one, else from the
    training split, about the same share of each class. null for all of the former, or a tenth of the latter, at most
    10,000."""
    image_column: str | None = None
    label_column: str | None = None
    """Columns of parquet files and hub data; null finds them by type or name."""
    subset: str | None = None
    """The configuration to load from a hub data set that has several."""
    skip_broken: bool = False
    """Whether to leave out broken images instead of stopping at the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels not in (1, 3, None):
            raise ValueError(f"data.channels: must be 1 (grey), 3 (colour) or null, got {self.channels}")
        check_at_least(self, "data", held_out=1)
        self.image_size = checked_sides(self.image_size)
        if self.path is not None and None in (self.image_size, self.channels):
            side, channels = suitable(os.path.expanduser(self.path))
            self.image_size, self.channels = self.image_size or side, self.channels or channels

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image, known before any is decoded."""
        return self.channels or 3, *both_sides(self.image_size or SIDE)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that determine the bytes of the decoded images."""
        free = {"path", "flip", "skip_broken", "num_workers", "planted"}
        return {f.name: getattr(self, f.name) for f in fields(ImagesConfig) if f.name not in free}


def checked_sides(size: int | list[int] | None) -> int | list[int] | None:
    """Return an image size, as one number if both sides are equal; raise ValueError if it is not positive."""
    sides = [] if size is None else [size] if isinstance(size, int) else size
    if size is not None and (not 1 <= len(sides) <= 2 or min(sides) < 1):
        raise ValueError(f"data.image_size: must be a positive number, or [height, width], got {size}")
    return sides[0] if sides and len(set(sides)) == 1 else size


def suitable(path: str) -> tuple[int, int]:
    """Return the side (8 to 32, a multiple of 8) and the channels that suit a folder's images, from 200 files' headers.

    The side follows from their median shorter side; one channel suits if all are grey. Tables and hub data are not read
    and get 32 and 3.
    """
    return _suitable(path, stamp(Path(path)))


@lru_cache(maxsize=16)
def _suitable(path: str, _stamp: str) -> tuple[int, int]:
    files: list[str] = []
    if os.path.isdir(path):
        with contextlib.suppress(ValueError):  # `locate` will report it
            files = list_files(Path(path)).images
    sides, grey = [], []
    for file in files[:: -(-len(files) // 200) or 1]:
        with contextlib.suppress(Exception), Image.open(os.path.join(path, file), formats=FORMATS) as image:
            sides.append(min(image.size))
            grey.append(is_grey(image))
    if not sides:
        return SIDE, 3
    middle = sorted(sides)[len(sides) // 2]
    return min(SIDE, 8 * math.ceil(middle / 8)), 1 if all(grey) else 3


def stamp(path: Path) -> str:
    """Return a stamp that changes when files are added to or removed from a folder or its direct sub-folders."""
    if not path.is_dir():
        return ""
    with os.scandir(path) as listing:
        folders = [str(path), *(entry.path for entry in listing if entry.is_dir())]
    return ",".join(str(os.stat(folder).st_mtime_ns) for folder in folders)


@dataclass(frozen=True)
class Listing:
    """The sorted paths of the files under a folder, relative to it.

    Attributes:
        skipped: reason -> names of the files that were skipped for it.
    """

    root: Path
    images: list[str]
    tables: list[str]
    skipped: dict[str, list[str]]

    def __str__(self) -> str:
        kinds = Counter(os.path.splitext(file)[1].lower().removeprefix(".") for file in self.images)
        found = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
        left = [f"{len(names):,} {reason} ({first_few(names)})" for reason, names in self.skipped.items() if names]
        tables = f"{len(self.tables):,} parquet file{'s' * (len(self.tables) > 1)}"
        what = tables if self.tables and not self.images else f"{len(self.images):,} images ({found})"
        return f"{self.root}: {what}" + ("; skipped " + ", ".join(left)) * bool(left)


def list_files(root: Path) -> Listing:
    """List the images and parquet files under a folder by their suffixes, skipping hidden files and folders.

    Links that leave the folder are refused: their targets could change unnoticed, and a folder from elsewhere could
    name any file on this machine. Links to folders inside are skipped.

    Raises:
        ValueError: one line, for such a link or for a name that is not UTF-8.
    """
    images: list[str] = []
    tables: list[str] = []
    skipped: dict[str, list[str]] = {"hidden": [], "links to folders": [], "other": []}
    real, folders, above = root.resolve(), [str(root)], len(os.path.join(root, ""))
    while folders:
        with os.scandir(folders.pop()) as listing:
            entries = list(listing)
        for entry in entries:
            path, suffix = entry.path[above:], os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                skipped["hidden"].append(path)
            elif entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(real):
                raise ValueError(f"{entry.path} is a link that leaves {root}; put the files themselves there")
            elif entry.is_dir():
                if entry.is_symlink():
                    skipped["links to folders"].append(path)
                else:
                    folders.append(entry.path)
            elif not entry.is_file() or (suffix != ".parquet" and suffix not in SUFFIXES):
                skipped["other"].append(path)
            elif re.search("[\ud800-\udfff]", entry.path):  # bytes that are not text
                raise ValueError(f"the name of {os.fsencode(entry.path)!r} is not UTF-8; rename it")
            else:
                (tables if suffix == ".parquet" else images).append(path)
    return Listing(root, sorted(images), sorted(tables), {why: sorted(names) for why, names in skipped.items()})


@dataclass(frozen=True)
class Place:
    """The images at a path: files in a folder, parquet files, or a hub data set.

    Attributes:
        files: paths relative to `root`; none for the hub.
        key: a hash of the files' names, sizes and modification times, wherever the folder is.
        listing: the files of the folder, if the path is one.
    """

    kind: Literal["folder", "parquet", "hub"]
    root: str
    name: str
    files: list[str] = field(default_factory=list, compare=False)
    key: str = ""
    listing: Listing | None = field(default=None, compare=False)

    @property
    def identity(self) -> dict[str, str]:
        """The values that identify this place's content."""
        return {"kind": self.kind, "hub": self.root} if self.kind == "hub" else {"kind": self.kind, "files": self.key}


def locate(path: str) -> Place:
    """Return the place that a path, a pattern of parquet files or a hub name stands for, without opening any file."""
    local = Path(os.path.expanduser(path))
    if local.is_dir():
        try:
            listing = list_files(local)
        except ValueError as e:
            raise ValueError(f"data.path: {e}") from None
        if listing.images and listing.tables:
            raise ValueError(
                f"data.path: {local} holds both images ({listing.images[0]}) and parquet files ({listing.tables[0]});"
                f" allowed: one of them, such as data.path={local / '*.parquet'}"
            )
        if not listing.images and not listing.tables:
            others = len(listing.skipped["other"])
            raise ValueError(
                f"data.path: no images in {local} ({others:,} other files); allowed: {' '.join(sorted(SUFFIXES))}"
            )
        kind: Literal["folder", "parquet"] = "folder" if listing.images else "parquet"
        return _place(kind, local, local.resolve().name or "images", listing.images or listing.tables, listing)
    if local.is_file():
        if local.suffix.lower() != ".parquet":
            raise ValueError(f"data.path: {path} is a file; allowed: a folder, .parquet files, or a hub name")
        generic = re.fullmatch(r"(train|training|test|validation|val|data)", local.stem.lower())
        return _place("parquet", local.parent, local.parent.resolve().name if generic else local.stem, [local.name])
    if glob.has_magic(path):
        found = sorted(p for p in glob.glob(str(local), recursive=True) if p.lower().endswith(".parquet"))
        if not found:
            raise ValueError(f"data.path: no .parquet file matches {path}")
        root = Path(os.path.commonpath([os.path.dirname(p) or "." for p in found]))
        return _place("parquet", root, root.resolve().name, [os.path.relpath(p, root) for p in found])
    if HUB_NAME.fullmatch(path):
        return Place("hub", path, path.rsplit("/", 1)[-1])
    raise ValueError(f"data.path: no file or folder {path}; allowed: a folder, .parquet files, or a hub name")


def _place(
    kind: Literal["folder", "parquet"], root: Path, name: str, files: list[str], listing: Listing | None = None
) -> Place:
    digest = hashlib.sha256()
    for file in files:
        about = os.stat(os.path.join(root, file))
        digest.update(f"{file}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
    return Place(kind, str(root), name, files, digest.hexdigest(), listing)


def first_few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)
