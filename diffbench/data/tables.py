"""Images in tables: rows of parquet files and of Hugging Face hub data sets, opened by the `datasets` library."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
from huggingface_hub import HfApi
from huggingface_hub import constants as hub
from huggingface_hub.errors import HfHubHTTPError

from diffbench.core.errors import suggest
from diffbench.data.batches import IMAGE_NAMES, LABEL_NAMES
from diffbench.data.places import ImagesConfig, Place
from diffbench.data.splits import HELD_OUT_SPLITS, Item, Split, natural_order, split_name, split_word, training_split

READ_AHEAD = 256
"""Number of rows in memory at once, still encoded."""
UNREADABLE = (ValueError, OSError, NotImplementedError)
"""Errors raised by damaged pages, and by columns of an unexpected type."""


def table_splits(place: Place, config: ImagesConfig) -> tuple[dict[str, Split], list[str]]:
    """Return the splits of parquet files or of a hub data set, and the class names."""
    data, totals = _open_tables(place, config.subset)
    train = training_split(list(data), config.split)
    features = _features(data[train])
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if not images:  # a file without the library's metadata
        inner = {name: kind.get("bytes") if isinstance(kind, dict) else kind for name, kind in features.items()}
        images = [name for name, kind in inner.items() if getattr(kind, "dtype", None) in ("binary", "large_binary")]
    image = _column("image_column", features, config.image_column, images, IMAGE_NAMES[:2])
    if image is None:
        raise ValueError(f"data.path: no column of {place.root} contains images; its columns: {', '.join(features)}")
    found = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    found = found or [name for name in features if name in LABEL_NAMES]
    column = _column("label_column", features, config.label_column, found, LABEL_NAMES) if config.labels else None
    base = Path(datasets.config.HF_CACHE_HOME) if place.kind == "hub" else None
    values: dict[str, list[Any]] = {}
    for split in dict.fromkeys((train, *HELD_OUT_SPLITS)):
        if split in data and column in _features(data[split]):
            batches = data[split].select_columns([column]).iter(batch_size=8192)
            try:
                values[split] = [value for batch in batches for value in batch[column]]
            except UNREADABLE as e:
                where = f"column {column!r} of split {split} of {place.root}"
                raise ValueError(f"data.path: cannot read {where} ({_one_line(e)})") from None
    known = {} if column is None else _class_numbers(column, features[column], values[train])
    splits = {}
    for split, rows in data.items():
        if image not in (columns := _features(rows)):
            raise ValueError(f"data.image_column: split {split} has no column {image!r}, only {', '.join(columns)}")
        labels = None
        if known:
            labels = np.array([known.get(v, -1) for v in values.get(split, [None] * totals[split])], np.int64)
        encoded = rows.cast_column(image, datasets.Image(decode=False)).select_columns([image])
        splits[split] = Split(split, totals[split], labels, partial(_read_table, encoded, image, split, base))
    names = features[column].names if column and isinstance(features[column], datasets.ClassLabel) else known
    return splits, [str(name) for name in names]


def _go_offline_if_unreachable(name: str) -> None:
    """Switch the library to offline mode if the hub does not answer, to avoid half a minute of retries."""
    try:
        HfApi().dataset_info(name, timeout=10)
    except HfHubHTTPError:  # an answer, whose error the library explains
        pass
    except Exception:
        hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _open_tables(place: Place, subset: str | None) -> tuple[dict[str, Any], dict[str, int]]:
    """Return each split as the library opens it, and its number of rows."""
    if place.kind == "hub":
        print(f"data.path: no {place.root} in {os.getcwd()}; trying the Hugging Face hub")
        _go_offline_if_unreachable(place.root)
        try:
            found = dict(datasets.load_dataset(place.root, name=subset))
        except Exception as e:  # offline, no such name, a bad answer: the library raises many kinds
            raise ValueError(
                f"data.path: {place.root} is not a file or folder in {os.getcwd()}, nor a hub name that can be"
                f" loaded ({_one_line(e)}); with network access, run: hf download {place.root} --repo-type dataset"
            ) from None
        data: dict[str, Any] = {}
        for name, rows in found.items():  # valid, val and dev become validation, unless there is one
            word = split_name(name)
            data[name if word is None or word in found or word in data else word] = rows
        return data, {split: len(rows) for split, rows in data.items()}
    paths: dict[str, list[str]] = {}
    totals: Counter[str] = Counter()
    for file in place.files:
        named = [word for part in reversed(Path(file).with_suffix("").parts) if (word := split_word(part))]
        split, path = named[0] if named else "train", os.path.join(place.root, file)
        try:
            rows = int(pq.read_metadata(path).num_rows)
        except (ValueError, OSError) as e:
            raise ValueError(f"data.path: {path}: not a readable parquet file ({_one_line(e)})") from None
        if rows:  # the library cannot read a file without rows
            totals[split] += rows
            paths.setdefault(split, []).append(glob.escape(path))  # the library expands patterns
    if not paths:
        raise ValueError(f"data.path: no rows in {place.root}")
    opened = {  # one at a time: the library would give all splits the columns of the first
        split: datasets.load_dataset("parquet", data_files={split: files}, streaming=True)[split]
        for split, files in paths.items()
    }
    return opened, dict(totals)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _features(data: Any) -> dict[str, Any]:
    return dict(data.features if data.features is not None else data._resolve_features().features)


def _column(
    key: str, features: dict[str, Any], wanted: str | None, found: list[str], usual: Sequence[str]
) -> str | None:
    if wanted is not None:
        if wanted not in features:
            choices = ", ".join(features)
            raise ValueError(f"data.{key}: no column {wanted!r}; choose from {choices}{suggest(wanted, features)}")
        return wanted
    preferred = [name for name in found if name in usual]
    if len(found) > 1 and len(preferred) != 1:
        raise ValueError(f"data.{key}: several columns fit; choose from {', '.join(found)}")
    return next(iter(preferred or found), None)


def _class_numbers(column: str, kind: Any, values: list[Any]) -> dict[Any, int]:
    if isinstance(kind, datasets.ClassLabel):
        return {i: i for i in range(len(kind.names))}
    present = [v for v in values if v is not None]
    if not all(isinstance(v, int | str) for v in present) or len({type(v) for v in present}) > 1:
        raise ValueError(f"data.label_column: {column!r} contains neither whole numbers nor names")
    ordered = natural_order(set(present)) if present and isinstance(present[0], str) else sorted(set(present))
    return {value: i for i, value in enumerate(ordered)}


def _read_table(data: Any, column: str, split: str, base: Path | None) -> Iterator[Item]:
    row = 0
    try:
        for batch in data.iter(batch_size=READ_AHEAD):
            for value in batch[column]:
                yield _item(value, f"row {row} of split {split}", base)
                row += 1
    except UNREADABLE as e:
        raise ValueError(f"data.path: cannot read split {split} from row {row:,} on ({_one_line(e)})") from None


def _item(value: Any, name: str, base: Path | None) -> Item:
    """Return a row's image: its bytes, or its path in `base`, since a table could name any file on this machine."""
    encoded, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, None)
    named = f"{name} ({path})" if path else name
    if encoded is not None:
        return Item(named, bytes(encoded))
    if path is None:
        return Item(name, None, "the row has no image")
    if base is None or not Path(path).resolve().is_relative_to(base.resolve()):
        return Item(named, None, "the row names a file instead of holding its bytes")
    return Item(named, str(path))
