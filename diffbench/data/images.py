"""Own images: decoded once, in parallel, into memory-mapped bytes that every later command reads."""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffbench.core.files import cache_folder
from diffbench.core.store import Contents, Store
from diffbench.data.places import Place, locate
from diffbench.data.sets import ImageSet

VERSION = 1
"""Of what makes pixels from files: another number decodes anew."""
CIFAR10_FOLDER, CIFAR10_HUB = "data/cifar10", "uoft-cs/cifar10"
KNOWN = {"bd98cdb37ac5797f": "cifar10-jpeg", "4a95dbec0105c740": "cifar10-jpeg"}
"""Fingerprint -> the name of a data set that its folder may be wrong about."""


@dataclass
class ImagesConfig:
    """Images of one's own: a folder (class sub-folders or none), parquet files, or a Hugging Face hub name."""

    path: str | None = None
    """A folder of images or of parquet files, one .parquet file, a pattern of them, or a hub name."""
    image_size: int = 32
    """Side of the square at the centre that is kept, in pixels; other sizes are brought to it as in ADM."""
    channels: int = 3
    """3 for colour, 1 for grey."""
    labels: bool = True
    """Whether classes are used where the data has them; false trains without."""
    flip: bool = False
    """Mirrors half of the training images, drawn anew each epoch."""
    split: str | None = None
    """The split to train on; null for "train", or the only one."""
    held_out: int | None = None
    """Images kept from training for validation: of the data's own test (or validation) split where it has one, else of
    the training split; null for all of the former, or a tenth of the latter, 10,000 at most."""
    image_column: str | None = None
    label_column: str | None = None
    """Columns of parquet files and hub data; null where they can be told by their type or name."""
    subset: str | None = None
    """The configuration of a hub name that has several."""
    skip_broken: bool = False
    """Leaves broken images out instead of stopping at the first."""
    num_workers: int = 0
    """Loader processes; 0 loads in the training process, the fastest for data in memory."""

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"data.channels: must be 1 (grey) or 3 (colour), got {self.channels}")
        for name, least in (("image_size", 1), ("num_workers", 0), ("held_out", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data.{name}: must be at least {least}, got {value}")


@dataclass
class CIFAR10Config(ImagesConfig):
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 colour images in ten classes; or any images put in its place.

    A `path` of null means the folder data/cifar10, or what the hub's uoft-cs/cifar10 left on this machine.
    """


def images(config: ImagesConfig) -> tuple[ImageSet, ImageSet]:
    """The training and the held-out part, decoded where they are not yet.

    Raises:
        ValueError: one line that begins with the key.
        UserError: where the disk is full.
    """
    if not config.path:
        raise ValueError("data.path: missing; allowed: a folder of images, .parquet files, or a hub name")
    values = json.dumps(dataclasses.asdict(_plain(config)))
    return _images(values, str(cache_folder()), os.getcwd(), _stamp(Path(config.path).expanduser()))


def cifar10(config: CIFAR10Config) -> tuple[ImageSet, ImageSet]:
    """CIFAR-10's training and held-out part; never fetched unless `path` names the hub."""
    if config.path is None:
        here = Path(CIFAR10_FOLDER).is_dir()
        config = dataclasses.replace(config, path=CIFAR10_FOLDER if here else CIFAR10_HUB)
        if not here and not _is_fetched(config):
            raise ValueError(
                f"data.path: CIFAR-10 is not on this machine; allowed: {CIFAR10_HUB}, which fetches 140 MB from the"
                f" Hugging Face hub, or a folder that holds train.parquet and test.parquet, as {CIFAR10_FOLDER}"
            )
    return images(config)


def _is_fetched(config: ImagesConfig) -> bool:
    """Whether a hub name was decoded or downloaded before."""
    assert config.path is not None
    if all(store.is_complete() for store in _stores(_plain(config), locate(config.path))):
        return True
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    owner, name = config.path.split("/")
    left = (HF_DATASETS_CACHE, f"{owner}___{name}"), (HF_HUB_CACHE, f"datasets--{owner}--{name}")
    return any(Path(folder, sub).is_dir() for folder, sub in left)


def _plain(config: ImagesConfig) -> ImagesConfig:
    """The same without what a subclass adds."""
    return ImagesConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(ImagesConfig)})


def _stamp(path: Path) -> str:
    """What changes when files come to a folder or go, so that one process need not list it twice."""
    if not path.is_dir():
        return ""
    with os.scandir(path) as listing:
        folders = [str(path), *(entry.path for entry in listing if entry.is_dir())]
    return ",".join(str(os.stat(folder).st_mtime_ns) for folder in folders)


@lru_cache(maxsize=4)
def _images(values: str, cache: str, folder: str, stamp: str) -> tuple[ImageSet, ImageSet]:
    config = ImagesConfig(**json.loads(values))
    assert config.path is not None
    place = locate(config.path)
    stores = _stores(config, place)
    found = [store.open_intact() for store in stores]
    if None in found:
        _fill(config, place, stores)
        found = [store.open() for store in stores]
    train, held_out = (_image_set(contents, place, config) for contents in found if contents is not None)
    return train, held_out


def _identity(config: ImagesConfig, place: Place) -> dict[str, Any]:
    """What decides every byte of the decoded images."""
    free = {"path", "flip", "skip_broken", "num_workers"}
    what = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    return {"version": VERSION, "place": place.identity, **what}


def _stores(config: ImagesConfig, place: Place) -> tuple[Store, Store]:
    """Where the training and the held-out part lie."""
    digest = hashlib.sha256(json.dumps(_identity(config, place)).encode()).hexdigest()
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", place.name)[:60]
    folder = cache_folder() / "images" / f"{name}-{digest[:16]}"
    return Store(folder / "train"), Store(folder / "held-out")


def _fill(config: ImagesConfig, place: Place, stores: tuple[Store, Store]) -> None:
    """Decode what is missing or damaged of both parts."""
    from diffbench.data.decoding import decode_part
    from diffbench.data.splits import read

    options = ("split", "held_out", "image_column", "label_column", "subset", "labels")
    train, held_out, classes = read(place, **{name: getattr(config, name) for name in options})
    for store, part in zip(stores, (train, held_out), strict=True):
        decode_part(
            part,
            store,
            _identity(config, place),
            classes,
            size=config.image_size,
            channels=config.channels,
            skip_broken=config.skip_broken,
        )
    facts = [store.open().facts for store in stores]
    ignored = f"; {place.ignored:,} files there are no images" if place.ignored else ""
    print(f"decoded images are kept in {stores[0].folder.parent}{ignored}", flush=True)
    if count := sum(f["count"] for f in facts):
        names = [name for f in facts for name, _ in f["broken"]]
        print(f"warning: {count:,} broken images left out: {', '.join(names[:5])}{', ...' * (count > 5)}", flush=True)


def _image_set(contents: Contents, place: Place, config: ImagesConfig) -> ImageSet:
    facts, arrays = contents.facts, contents.arrays
    if facts["count"] and not config.skip_broken:
        from diffbench.data.decoding import refusal

        raise ValueError(refusal(*facts["broken"][0]))
    classes = tuple(facts["classes"])
    return ImageSet(
        arrays["images"], arrays["labels"], len(classes), _name(place, facts), classes, facts["fingerprint"]
    )


def _name(place: Place, facts: dict[str, Any]) -> str:
    """The folder's name, unless the images are known to be something else: a JPEG copy is not the original."""
    lossy = place.name == "cifar10" and "JPEG" in facts["formats"]
    return KNOWN.get(facts["fingerprint"], f"{place.name}-jpeg" if lossy else place.name)
