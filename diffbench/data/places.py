"""Where images lie: a folder of them, parquet files, or a data set of the Hugging Face hub, with splits and classes.

Finding out costs a listing of files; nothing is read before `open_splits`.
"""

import glob
import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffbench.data.decode import SUFFIXES

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
}
"""Names of folders, and words in names of parquet files, that mean a split."""


@dataclass(frozen=True)
class Place:
    """What lies at a path: for each split its files, relative to `root` (none for the hub)."""

    kind: Literal["folder", "parquet", "hub"]
    root: str
    name: str
    files: dict[str, list[str]] = field(default_factory=dict)
    depth: int = 0
    """Folders between the root and the classes: 1 where the first are splits."""
    key: str = ""
    """A hash of the files' names, sizes and times of change; the path itself does not matter."""
    ignored: int = 0
    """Files that are no images."""

    @property
    def identity(self) -> dict[str, str]:
        """What tells this place's content from another's."""
        return {"kind": self.kind, "hub": self.root} if self.kind == "hub" else {"kind": self.kind, "files": self.key}


def locate(path: str) -> Place:
    """Lists what a path, a pattern of parquet files or a hub name stands for.

    Raises:
        ValueError: one line that begins with data.path.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return _folder(local)
    if local.is_file():
        if local.suffix != ".parquet":
            raise ValueError(f"data.path: {path} is a file; allowed: a folder, .parquet files, or a hub name")
        name = local.parent.resolve().name if _word(local.stem) else local.stem
        return _place("parquet", local.parent, name, [local.name])
    if glob.has_magic(path):
        found = sorted(p for p in glob.glob(str(local), recursive=True) if p.endswith(".parquet"))
        if not found:
            raise ValueError(f"data.path: no .parquet file matches {path}")
        root = Path(os.path.commonpath([os.path.dirname(p) or "." for p in found]))
        return _place("parquet", root, root.resolve().name, [os.path.relpath(p, root) for p in found])
    if HUB_NAME.fullmatch(path):
        return Place("hub", path, path.rsplit("/", 1)[-1])
    raise ValueError(f"data.path: no file or folder {path}; allowed: a folder, .parquet files, or a hub name")


def _folder(root: Path) -> Place:
    images, tables, ignored = _walk(root)
    name = root.resolve().name or "images"
    if tables and images:
        raise ValueError(
            f"data.path: {root} holds both images ({images[0]}) and parquet files ({tables[0]}); allowed: one of them,"
            f" as data.path={root / '*.parquet'}"
        )
    if tables:
        return _place("parquet", root, name, tables, ignored)
    if not images:
        raise ValueError(
            f"data.path: no image in {root} ({ignored:,} other files); allowed: {' '.join(sorted(SUFFIXES))}"
        )
    return _place("folder", root, name, images, ignored)


def _walk(root: Path) -> tuple[list[str], list[str], int]:
    """Images, parquet files (paths relative to the root, in order) and the number of other files.

    Hidden files and folders are passed over. Links that leave the root are refused: what they lead to can change
    unseen, and a folder from elsewhere could name any file of this machine. Links to folders inside are passed over.
    """
    images: list[str] = []
    tables: list[str] = []
    ignored = 0
    real, folders = root.resolve(), [root]
    while folders:
        with os.scandir(folders.pop()) as listing:
            entries = list(listing)
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(real):
                raise ValueError(
                    f"data.path: {entry.path} is a link that leaves {root}; put the files themselves there"
                )
            if entry.is_dir():
                folders += [] if entry.is_symlink() else [Path(entry.path)]
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            if not entry.is_file() or (suffix != ".parquet" and suffix not in SUFFIXES):
                ignored += 1
                continue
            if not _is_text(entry.path):
                raise ValueError(f"data.path: the name of {os.fsencode(entry.path)!r} is no UTF-8 text; rename it")
            (tables if suffix == ".parquet" else images).append(os.path.relpath(entry.path, root))
    return sorted(images), sorted(tables), ignored


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _place(kind: Literal["folder", "parquet"], root: Path, name: str, files: list[str], ignored: int = 0) -> Place:
    digest = hashlib.sha256()
    for file in files:
        about = os.stat(root / file)
        digest.update(f"{file}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
    split = _split_of_table if kind == "parquet" else _split_of_image
    folders = {file.split(os.sep)[0] for file in files if os.sep in file}
    whole = kind == "folder" and (not _all_splits(folders) or any(os.sep not in file for file in files))
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault("train" if whole else split(file), []).append(file)
    return Place(kind, str(root), name, splits, 0 if whole else 1, digest.hexdigest(), ignored)


def _all_splits(folders: set[str]) -> bool:
    """Whether folders are splits rather than classes: all named like one, a training one among them."""
    named = {_word(f) for f in folders}
    return None not in named and "train" in named


def _word(text: str) -> str | None:
    return next((split for split, words in WORDS.items() if text.lower() in words), None)


def _split_of_image(file: str) -> str:
    return _word(file.split(os.sep)[0]) or "train"


def _split_of_table(file: str) -> str:
    named = [_word(part) for part in re.split(r"[^A-Za-z]+", file.removesuffix(".parquet"))]
    return next((n for n in reversed(named) if n), "train")


def classes_of(files: list[str], depth: int) -> list[str]:
    """The class of each image file: its folder at a depth below the root; empty where there are no classes.

    There are none where an image lies above that depth, or all lie in one folder.
    """
    parts = [file.split(os.sep) for file in files]
    if any(len(p) <= depth + 1 for p in parts) or len({p[depth] for p in parts}) < 2:
        return []
    return [p[depth] for p in parts]
