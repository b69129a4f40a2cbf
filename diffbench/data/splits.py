"""Images of a place in splits and classes: which train, which are held out, and how to read them.

The `datasets` library reads tables and the hub, and says which words name a split. Folders are read here, as its
imagefolder drops a class "bus" beside a class "train", drops all classes for one stray image, and opens no path with
brackets (tests/data/test_layouts.py).
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path

import numpy as np

from diffbench.core import rng
from diffbench.core.errors import suggest
from diffbench.data.places import ImagesConfig, Place, some

HELD_OUT_SPLITS = ("test", "validation")
LARGEST_HELD_OUT = 10_000


@dataclass(frozen=True)
class Item:
    """An encoded image: its name for messages, and its bytes or its path; or why there is neither."""

    name: str
    encoded: bytes | str | None
    why: str = ""


@dataclass(frozen=True)
class Split:
    """Rows of a place that belong together.

    Attributes:
        count: of its rows.
        labels: class of each row, (count,) int64, -1 for none; None where the place has no classes.
        items: reads all rows, in order.
        origin: which rows of which split they are, in words.
    """

    name: str
    count: int
    labels: np.ndarray | None
    items: Callable[[], Iterable[Item]]
    origin: str = ""

    def part(self, rows: np.ndarray, origin: str) -> "Split":
        """Some of the rows, in ascending order."""
        chosen = np.zeros(self.count, bool)
        chosen[rows] = True
        labels = None if self.labels is None else self.labels[rows]
        return Split(self.name, len(rows), labels, lambda: compress(self.items(), chosen), origin)

    @property
    def classes(self) -> np.ndarray:
        """Class of each row; all 0 where there are none."""
        return np.zeros(self.count, np.int64) if self.labels is None else self.labels


def hold_out(labels: np.ndarray, count: int | None) -> np.ndarray:
    """Choose rows to hold out, ascending: of each class about the same share, and never all of its images.

    The same for every seed of a run, and fewer are among more.

    Args:
        labels: (N,) classes.
        count: how many; None for a tenth, `LARGEST_HELD_OUT` at most.

    Raises:
        ValueError: if so many would leave a class without an image to train on.
    """
    order = rng.permutation(rng.key("held-out"), len(labels)).numpy()
    classes, by_class = labels[order], np.argsort(labels[order], kind="stable")
    sizes = np.bincount(classes)
    place = np.empty(len(labels))
    place[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within the class
    room = len(labels) - int(np.count_nonzero(sizes))
    if count is None:
        count = max(1, min(len(labels) // 10, LARGEST_HELD_OUT, room))
    if count > room:
        why, mend = "none to train on", "add images"
        if len(sizes) > 1:
            why, mend = (
                "a class without an image to train on",
                f"{mend}, or set data.labels=false to train without classes",
            )
        allowed = f"allowed: 1 to {room:,}" if room else mend
        raise ValueError(f"data.held_out: {count:,} of {len(labels):,} images leave {why}; {allowed}")
    share = np.where(place == sizes[classes] - 1, np.inf, (place + 0.5) / sizes[classes])
    return np.sort(order[np.argsort(share, kind="stable")[:count]])


def training_split(there: list[str], wanted: str | None) -> str:
    """The split to train on, of those that are there; `wanted` may be another word for it, as valid for validation."""
    if wanted is not None and wanted not in there and (word := split_name(wanted)) in there:
        wanted = word
    if wanted is not None and wanted not in there:
        raise ValueError(f"data.split: no split {wanted!r}; choose from {', '.join(there)}{suggest(wanted, there)}")
    if wanted is None and "train" not in there and len(there) > 1:
        raise ValueError(f"data.split: which one trains? choose from {', '.join(there)}")
    return wanted or ("train" if "train" in there else there[0])


def split_word(name: str) -> str | None:
    """The split that a folder's or file's name stands for, in the library's words: train, training_set, val-2, ..."""
    from datasets.data_files import SPLIT_KEYWORDS

    return next((str(split) for split, keys in SPLIT_KEYWORDS.items() if set(keys) & _words(name)), None)


def split_name(name: str) -> str | None:
    """As `split_word`, for a name that is that word and nothing else."""
    return split_word(name) if name.isalpha() else None


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def by_number(names: Iterable[str]) -> list[str]:
    """Names sorted so that numbers in them count: 0, 1, 2, 10."""
    return sorted(names, key=lambda name: ([int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", name)], name))


def folder_splits(place: Place, config: ImagesConfig) -> tuple[dict[str, Split], list[str]]:
    """The splits of a folder of images, and the names of the classes; ambiguous layouts are refused."""
    root = Path(place.root)
    top: dict[str, list[str]] = {}
    for file in place.files:
        top.setdefault(file.split(os.sep)[0] if os.sep in file else "", []).append(file)
    words = {name: split_word(name) for name in top if name}
    named = [name for name, word in words.items() if word]
    files: dict[str, list[str]] = {}
    if "train" in words.values() and len(named) == len(top):
        if config.labels:
            _check_merged(root, named)
        for name, found in top.items():
            files.setdefault(words[name] or "train", []).extend(found)
    elif len({words[name] for name in named}) > 1:
        rest = [name or top[""][0] for name in top if name not in named]
        wanted = f"move {some(rest)} elsewhere" if rest else "name one of them train"
        raise ValueError(
            f"data.path: {root}: {some(named)} look like splits; {wanted}, or choose one folder, as"
            f" data.path={root / named[0]}"
        )
    else:
        files["train"] = place.files
    depth = int(len(named) == len(top) and "train" in words.values())
    train = training_split(list(files), config.split)
    given = {
        split: _classes(root, found, depth, least=1 + (split == train)) if config.labels else []
        for split, found in files.items()
    }
    names = by_number(set(given[train]))
    number = {name: i for i, name in enumerate(names)}
    splits = {}
    for split, found in files.items():
        labels = np.array([number.get(name, -1) for name in given[split]] or [-1] * len(found), np.int64)
        paths = [str(root / file) for file in found]
        splits[split] = Split(split, len(found), labels if names else None, partial(map, Item, paths, paths))
    return splits, names


def _check_merged(root: Path, folders: list[str]) -> None:
    """Refuse folders of one split that may be classes: they differ in other words, as freight-train and train."""
    for split in ("train", *HELD_OUT_SPLITS):
        alike = [name for name in folders if split_word(name) == split]
        others = {frozenset(word for word in _words(name) if split_word(word) is None) for name in alike}
        if len(others) > 1:
            raise ValueError(
                f"data.path: {root}: {some(alike)} all look like split {split}; make one folder of them, or, where they"
                f" are classes, rename them without that word"
            )


def _classes(root: Path, files: list[str], depth: int, least: int) -> list[str]:
    """The class of each file: its folder below the split's; none where there are fewer folders than `least`."""
    inner = [file.split(os.sep)[depth:] for file in files]
    folders = by_number({parts[0] for parts in inner if len(parts) > 1})
    loose = [file for file, parts in zip(files, inner, strict=True) if len(parts) == 1]
    here = root.joinpath(*files[0].split(os.sep)[:depth])
    if loose and folders:
        raise ValueError(
            f"data.path: {here} holds images ({some(loose)}) beside folders of images ({some(folders)}); move them into"
            " a class folder, or set data.labels=false to train without classes"
        )
    below = {parts[1] for parts in inner if len(parts) > 2}
    if len(folders) == 1 and len(below) > 1:
        raise ValueError(
            f"data.path: {here}: all images lie in {folders[0]}; for its folders ({some(by_number(below))}) as"
            f" classes choose data.path={here / folders[0]}, or set data.labels=false to train without classes"
        )
    return [parts[0] for parts in inner] if len(folders) >= least else []
