"""Splits and classes of the images in a place: which images to train on, which to hold out, and how to read them.

The `datasets` library reads tables and the hub, and knows which words name a split. Folders are read here, because its
imagefolder drops a class "bus" next to a class "train", drops all classes because of one stray image, and opens no
path with brackets (tests/data/test_layouts.py).
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
from diffbench.data.places import ImagesConfig, Place, first_few

HELD_OUT_SPLITS = ("test", "validation")
LARGEST_HELD_OUT = 10_000


@dataclass(frozen=True)
class Item:
    """An encoded image: its name for messages, and its bytes or its path, or the reason why it has neither."""

    name: str
    encoded: bytes | str | None
    why: str = ""


@dataclass(frozen=True)
class Split:
    """A split of the images in a place, or part of one.

    Attributes:
        count: number of rows.
        labels: class of each row, (count,) int64, -1 for none; None if the place has no classes.
        items: a function that reads all rows in order.
        origin: which rows of which split these are, in words.
    """

    name: str
    count: int
    labels: np.ndarray | None
    items: Callable[[], Iterable[Item]]
    origin: str = ""

    def part(self, rows: np.ndarray, origin: str) -> "Split":
        """Return the part with the given rows, which must be in ascending order."""
        chosen = np.zeros(self.count, bool)
        chosen[rows] = True
        labels = None if self.labels is None else self.labels[rows]
        return Split(self.name, len(rows), labels, lambda: compress(self.items(), chosen), origin)

    @property
    def classes(self) -> np.ndarray:
        """The class of each row; all 0 if there are none."""
        return np.zeros(self.count, np.int64) if self.labels is None else self.labels


def hold_out(labels: np.ndarray, count: int | None) -> np.ndarray:
    """Choose rows to hold out, ascending: about the same share of each class, but never all of its images.

    The choice does not depend on a run's seed, and a smaller choice is a subset of a larger one.

    Args:
        labels: (N,) classes.
        count: number of rows; None for a tenth, at most `LARGEST_HELD_OUT`.

    Raises:
        ValueError: if that would leave a class without an image to train on.
    """
    order = rng.permutation(rng.key("held-out"), len(labels)).numpy()
    classes, by_class = labels[order], np.argsort(labels[order], kind="stable")
    sizes = np.bincount(classes)
    rank = np.empty(len(labels))  # position within the class
    rank[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    most = len(labels) - int(np.count_nonzero(sizes))
    if count is None:
        count = max(1, min(len(labels) // 10, LARGEST_HELD_OUT, most))
    if count > most:
        problem, remedy = "none to train on", "add images"
        if len(sizes) > 1:
            problem = "a class without an image to train on"
            remedy = f"{remedy}, or set data.labels=false to train without classes"
        allowed = f"allowed: 1 to {most:,}" if most else remedy
        raise ValueError(f"data.held_out: {count:,} of {len(labels):,} images leave {problem}; {allowed}")
    share = np.where(rank == sizes[classes] - 1, np.inf, (rank + 0.5) / sizes[classes])
    return np.sort(order[np.argsort(share, kind="stable")[:count]])


def training_split(names: list[str], wanted: str | None) -> str:
    """Return the split to train on, one of `names`; `wanted` may be a synonym, such as valid for validation."""
    if wanted is not None and wanted not in names and (word := split_name(wanted)) in names:
        wanted = word
    if wanted is not None and wanted not in names:
        raise ValueError(f"data.split: no split {wanted!r}; choose from {', '.join(names)}{suggest(wanted, names)}")
    if wanted is None and "train" not in names and len(names) > 1:
        raise ValueError(f"data.split: no split is called train; choose from {', '.join(names)}")
    return wanted or ("train" if "train" in names else names[0])


def split_word(name: str) -> str | None:
    """Return the split that the library sees in a folder or file name (train, training_set, val-2, ...), or None."""
    from datasets.data_files import SPLIT_KEYWORDS

    return next((str(split) for split, keys in SPLIT_KEYWORDS.items() if set(keys) & _words(name)), None)


def split_name(name: str) -> str | None:
    """Return `split_word` of a name that consists of that word alone, else None."""
    return split_word(name) if name.isalpha() else None


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def natural_order(names: Iterable[str]) -> list[str]:
    """Sort names in natural order: 0, 1, 2, 10."""
    return sorted(names, key=lambda name: ([int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", name)], name))


def folder_splits(place: Place, config: ImagesConfig) -> tuple[dict[str, Split], list[str]]:
    """Return the splits of a folder of images and the class names; raise ValueError if the layout is ambiguous."""
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
        remedy = f"move {first_few(rest)} elsewhere" if rest else "name one of them train"
        raise ValueError(
            f"data.path: {root}: {first_few(named)} look like splits; {remedy}, or choose one folder, such as"
            f" data.path={root / named[0]}"
        )
    else:
        files["train"] = place.files
    depth = int(len(named) == len(top) and "train" in words.values())
    train = training_split(list(files), config.split)
    classes = {
        split: _classes(root, found, depth, least=1 + (split == train)) if config.labels else []
        for split, found in files.items()
    }
    names = natural_order(set(classes[train]))
    number = {name: i for i, name in enumerate(names)}
    splits = {}
    for split, found in files.items():
        labels = np.array([number.get(name, -1) for name in classes[split]] or [-1] * len(found), np.int64)
        paths = [str(root / file) for file in found]
        splits[split] = Split(split, len(found), labels if names else None, partial(map, Item, paths, paths))
    return splits, names


def _check_merged(root: Path, folders: list[str]) -> None:
    """Refuse folders of one split that may be classes because their other words differ: freight-train, steam-train."""
    for split in ("train", *HELD_OUT_SPLITS):
        alike = [name for name in folders if split_word(name) == split]
        others = {frozenset(word for word in _words(name) if split_word(word) is None) for name in alike}
        if len(others) > 1:
            raise ValueError(
                f"data.path: {root}: {first_few(alike)} all look like split {split}; merge them into one folder, or"
                f" rename them without that word if they are classes"
            )


def _classes(root: Path, files: list[str], depth: int, least: int) -> list[str]:
    """Return the class of each file, its folder below the split's; an empty list for fewer than `least` folders."""
    inner = [file.split(os.sep)[depth:] for file in files]
    folders = natural_order({parts[0] for parts in inner if len(parts) > 1})
    loose = [file for file, parts in zip(files, inner, strict=True) if len(parts) == 1]
    here = root.joinpath(*files[0].split(os.sep)[:depth])
    if loose and folders:
        raise ValueError(
            f"data.path: {here} has images ({first_few(loose)}) next to folders of images ({first_few(folders)}); move"
            " them into a class folder, or set data.labels=false to train without classes"
        )
    below = {parts[1] for parts in inner if len(parts) > 2}
    if len(folders) == 1 and len(below) > 1:
        raise ValueError(
            f"data.path: {here}: all images are in {folders[0]}; to use its folders ({first_few(natural_order(below))})"
            f" as classes, set data.path={here / folders[0]}, or set data.labels=false to train without classes"
        )
    return [parts[0] for parts in inner] if len(folders) >= least else []
