"""The rows of a place through the Hugging Face `datasets` library: which train, which are held out, of what class."""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffbench.core import rng
from diffbench.core.errors import suggest
from diffbench.core.store import Chunk
from diffbench.data.places import Place, classes_of

LABEL_NAMES = ("label", "labels", "class", "target", "fine_label")
IMAGE_NAMES = ("image", "img")
HELD_OUT_SPLITS = ("test", "validation")
LARGEST_HELD_OUT = 10_000
READ_AHEAD = 256
"""Rows of a table that are in memory at once, encoded."""


@dataclass(frozen=True)
class Part:
    """Rows of one split, in its order.

    Attributes:
        data: the split, a `datasets.Dataset` or `IterableDataset` whose images stay encoded.
        split: its name.
        column: the one with the images.
        total: rows of the split.
        rows: numbers (N,) of the rows that belong to this part, ascending.
        labels: their classes (N,), int64.
        base: folder that files named in the rows must lie in; None where rows must hold the images themselves.
        is_folder: whether each row is a file of the user's.
    """

    data: Any
    split: str
    column: str
    total: int
    rows: np.ndarray
    labels: np.ndarray
    base: Path | None
    is_folder: bool

    def read(self, chunks: Sequence[Chunk]) -> Iterator[list[Any]]:
        """The encoded images of this part's rows in each chunk, in order.

        Raises:
            ValueError: where the files are damaged.
        """
        data = self.data.select_columns([self.column])
        batches, position = data.iter(batch_size=READ_AHEAD), 0
        batch: list[Any] = []  # rows from `position` on
        for chunk in chunks:
            rows = self.rows[chunk.first : chunk.last]
            try:
                if hasattr(data, "select"):
                    yield data[rows.tolist()][self.column]
                    continue
                found = []
                for row in rows:
                    while row >= position + len(batch):
                        position, batch = position + len(batch), next(batches)[self.column]
                    found.append(batch[row - position])
            except (ValueError, OSError, IndexError, StopIteration) as e:
                where = f"rows {rows[0]:,} and on of split {self.split}"
                raise ValueError(f"data.path: cannot read {where} ({' '.join(str(e).split())[:200]})") from None
            yield found


def read(
    place: Place,
    *,
    split: str | None = None,
    held_out: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    subset: str | None = None,
    labels: bool = True,
) -> tuple[Part, Part, list[str]]:
    """The training part, the held-out part, and the names of the classes (none for images without labels).

    The arguments are keys of `ImagesConfig`.

    Raises:
        ValueError: one line that begins with the key.
    """
    data, totals = _open(place, subset)
    name = _training_split(list(data), split)
    features = _features(data[name])
    image = _column("image_column", features, image_column, _image_columns(features), IMAGE_NAMES)
    if image is None:
        raise ValueError(f"data.path: no column of {place.root} holds images; its columns: {', '.join(features)}")
    given = _column("label_column", features, label_column, _label_columns(features), LABEL_NAMES) if labels else None
    names, values = _labels(data, name, given)
    test = next((s for s in HELD_OUT_SPLITS if s in data and s != name and _usable(values.get(s), names)), None)

    def part(split_name: str, rows: np.ndarray) -> Part:
        classes = values[split_name][rows] if names else np.zeros(len(rows), np.int64)
        if names and len(classes) and classes.min() < 0:
            row = rows[int(classes.argmin())]
            raise ValueError(f"data.label_column: row {row} of split {split_name} has no class of {given!r}")
        encoded = _encoded(data[split_name], image)
        base = {"folder": Path(place.root), "hub": _hub_cache(), "parquet": None}[place.kind]
        return Part(encoded, split_name, image, totals[split_name], rows, classes, base, place.kind == "folder")

    total = totals[name]
    if test is None:
        count = min(max(1, total // 10), LARGEST_HELD_OUT) if held_out is None else held_out
        if count >= total:
            raise ValueError(f"data.held_out: {count:,} of {total:,} images leave none to train on")
        order = rng.permutation(rng.key("held-out"), total).numpy()  # the same for every seed of a run
        return part(name, np.sort(order[count:])), part(name, np.sort(order[:count])), names
    count = totals[test] if held_out is None else held_out
    if count > totals[test]:
        raise ValueError(f"data.held_out: split {test} has {totals[test]:,} images, fewer than {count:,}")
    order = rng.permutation(rng.key("held-out"), totals[test]).numpy()
    return part(name, np.arange(total)), part(test, np.sort(order[:count])), names


def _open(place: Place, subset: str | None) -> tuple[dict[str, Any], dict[str, int]]:
    """Each split as the library opens it, and its number of rows."""
    import datasets

    if place.kind == "folder":
        return _open_folder(place)
    if place.kind == "parquet":
        paths = {split: [os.path.join(place.root, f) for f in files] for split, files in place.files.items()}
        totals = {split: sum(map(_parquet_rows, files)) for split, files in paths.items()}
        names = {split: [glob.escape(path) for path in files] for split, files in paths.items()}  # it reads patterns
        return dict(datasets.load_dataset("parquet", data_files=names, streaming=True)), totals
    try:
        data = dict(datasets.load_dataset(place.root, name=subset))
    except Exception as e:  # offline, no such name, a bad answer: the library raises many kinds
        why = " ".join(str(e).split())[:200]
        raise ValueError(
            f"data.path: {place.root} is no file or folder here, nor a hub name that can be loaded ({why}); to fetch it"
            f" where the network is: hf download {place.root} --repo-type dataset"
        ) from None
    return data, {split: len(rows) for split, rows in data.items()}


def _open_folder(place: Place) -> tuple[dict[str, Any], dict[str, int]]:
    import datasets

    given = {split: classes_of(files, place.depth) for split, files in place.files.items()}
    features = datasets.Features(image=datasets.Image(decode=False))
    names = sorted(set(given["train"])) if "train" in given else []
    if names:
        features["label"] = datasets.ClassLabel(names=names)
    data = {}
    for split, files in place.files.items():
        columns: dict[str, list[Any]] = {"image": [os.path.join(place.root, f) for f in files]}
        if names:
            number = {name: i for i, name in enumerate(names)}
            columns["label"] = [number.get(c, -1) for c in given[split]] or [-1] * len(files)
        data[split] = datasets.Dataset.from_dict(columns, features=features)
    return data, {split: len(files) for split, files in place.files.items()}


def _parquet_rows(path: str) -> int:
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (ValueError, OSError) as e:
        raise ValueError(f"data.path: {path}: no readable parquet file ({' '.join(str(e).split())[:200]})") from None


def _hub_cache() -> Path:
    import datasets

    return Path(datasets.config.HF_CACHE_HOME)


def _training_split(there: list[str], wanted: str | None) -> str:
    if wanted is not None and wanted not in there:
        raise ValueError(f"data.split: no split {wanted!r}; choose from {', '.join(there)}{suggest(wanted, there)}")
    if wanted is None and "train" not in there and len(there) > 1:
        raise ValueError(f"data.split: which one trains? choose from {', '.join(there)}")
    return wanted or ("train" if "train" in there else there[0])


def _features(data: Any) -> dict[str, Any]:
    return dict(data.features if data.features is not None else data._resolve_features().features)


def _column(
    key: str, features: dict[str, Any], wanted: str | None, found: list[str], usual: Sequence[str]
) -> str | None:
    """The column that a key names, or the one that fits."""
    if wanted is not None:
        if wanted not in features:
            choices = ", ".join(features)
            raise ValueError(f"data.{key}: no column {wanted!r}; choose from {choices}{suggest(wanted, features)}")
        return wanted
    preferred = [name for name in found if name in usual]
    if len(found) > 1 and len(preferred) != 1:
        raise ValueError(f"data.{key}: several columns fit; choose from {', '.join(found)}")
    return next(iter(preferred or found), None)


def _image_columns(features: dict[str, Any]) -> list[str]:
    import datasets

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    return images or [name for name, kind in features.items() if _holds_bytes(kind)]


def _holds_bytes(kind: Any) -> bool:
    """Whether a column without the library's metadata holds encoded files."""
    inner = kind.get("bytes") if isinstance(kind, dict) else kind
    return getattr(inner, "dtype", None) in ("binary", "large_binary")


def _label_columns(features: dict[str, Any]) -> list[str]:
    import datasets

    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    return classes or [name for name in features if name in LABEL_NAMES]


def _encoded(data: Any, column: str) -> Any:
    import datasets

    return data.cast_column(column, datasets.Image(decode=False))


def _labels(data: dict[str, Any], name: str, column: str | None) -> tuple[list[str], dict[str, np.ndarray]]:
    """Names of the classes, and the class of each row of each split that may be used; -1 for none."""
    import datasets

    if column is None:
        return [], {}
    splits = [s for s in dict.fromkeys((name, *HELD_OUT_SPLITS)) if s in data and column in _features(data[s])]
    raw = {}
    for split in splits:
        batches = data[split].select_columns([column]).iter(batch_size=8192)
        raw[split] = [value for batch in batches for value in batch[column]]
    kind = _features(data[name])[column]
    if isinstance(kind, datasets.ClassLabel):
        names = list(kind.names)
        known: dict[Any, int] = {i: i for i in range(len(names))}
    else:
        given = [v for v in raw[name] if v is not None]
        if not all(isinstance(v, int | str) for v in given) or len({type(v) for v in given}) > 1:
            raise ValueError(f"data.label_column: {column!r} holds neither whole numbers nor names, so no classes")
        known = {value: i for i, value in enumerate(sorted(set(given)))}
        names = [str(value) for value in known]
    return names, {s: np.array([known.get(v, -1) for v in values], np.int64) for s, values in raw.items()}


def _usable(labels: np.ndarray | None, names: list[str]) -> bool:
    """Whether a split can be held out: without classes always, with them where its rows have some."""
    return not names or (labels is not None and len(labels) > 0 and labels.max() >= 0)
