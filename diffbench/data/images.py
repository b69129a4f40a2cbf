"""Custom images, decoded once and in parallel into a store that later commands map into memory."""

import hashlib
import json
import math
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import chain, compress, islice
from pathlib import Path
from typing import Any

import numpy as np

from diffbench.core import rng
from diffbench.core.distributed import threads_each
from diffbench.core.files import cache_folder
from diffbench.core.progress import progress
from diffbench.core.store import Chunk, Contents, Store
from diffbench.data.places import ImagesConfig, Place, locate
from diffbench.data.sets import ImageSet, describe_parts, digest_of
from diffbench.data.splits import HELD_OUT_SPLITS, Item, Split, folder_splits, hold_out, training_split
from diffbench.data.transforms import BrokenError, decode, quiet

VERSION = 4
"""Version of the code that finds and decodes images; a new version invalidates the cache."""
CIFAR10_FOLDER, CIFAR10_HUB = "data/cifar10", "uoft-cs/cifar10"
KNOWN = {"bd98cdb37ac5797f": "cifar10-jpeg", "4a95dbec0105c740": "cifar10-jpeg"}
"""Fingerprint -> name of a known data set, whatever its folder is called."""
NAMED = 1000
"""Maximum number of broken images named in the manifest; all are counted."""


@dataclass
class CIFAR10Config(ImagesConfig):
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 colour images in ten classes; or any images used in its place.

    If `path` is null, they come from the folder data/cifar10, or from this machine's copy of the hub's uoft-cs/cifar10.
    """

    image_size: int | list[int] | None = 32
    """As for other images."""
    channels: int | None = 3


def images(config: ImagesConfig) -> tuple[ImageSet, ImageSet]:
    """Load the training and the held-out part, decoding them first if the cache does not have them.

    Raises:
        ValueError: one line that begins with the config key.
        UserError: if the disk is full.
    """
    if not config.path:
        raise ValueError("data.path: missing; allowed: a folder of images, .parquet files, or a hub name")
    values = {f.name: getattr(config, f.name) for f in fields(ImagesConfig)}
    return _images(json.dumps(values), str(cache_folder()), locate(config.path))


def cifar10(config: CIFAR10Config) -> tuple[ImageSet, ImageSet]:
    """Load CIFAR-10's training and held-out part; it is downloaded only if `path` names the hub."""
    if config.path is None:
        has_folder = Path(CIFAR10_FOLDER).is_dir()
        config = replace(config, path=CIFAR10_FOLDER if has_folder else CIFAR10_HUB)
        if not has_folder and not _is_downloaded(config):
            raise ValueError(
                f"data.path: CIFAR-10 is not on this machine; allowed: {CIFAR10_HUB}, which downloads 140 MB from the"
                f" Hugging Face hub, or a folder with train.parquet and test.parquet, such as {CIFAR10_FOLDER}"
            )
    return images(config)


def _is_downloaded(config: ImagesConfig) -> bool:
    if all(store.is_complete() for store in _stores(config, locate(CIFAR10_HUB))):
        return True
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    copies = (HF_DATASETS_CACHE, CIFAR10_HUB.replace("/", "___")), (HF_HUB_CACHE, "datasets--uoft-cs--cifar10")
    return any(Path(folder, sub).is_dir() for folder, sub in copies)


@lru_cache(maxsize=4)
def _images(values: str, cache: str, place: Place) -> tuple[ImageSet, ImageSet]:
    config = ImagesConfig(**json.loads(values))
    stores = _stores(config, place)
    found = [store.open_intact() for store in stores]
    if None in found:
        _fill(config, place, stores)
        found = [store.open() for store in stores]
    train, held_out = (_image_set(contents, place, config) for contents in found if contents is not None)
    return train, held_out


def read(place: Place, config: ImagesConfig) -> tuple[Split, Split, list[str]]:
    """Return the training part, the held-out part, and the class names (none for images without labels)."""
    from diffbench.data.tables import table_splits  # seconds to import

    splits, names = (folder_splits if place.kind == "folder" else table_splits)(place, config)
    train = splits[training_split(list(splits), config.split)]
    others = [splits[s] for s in HELD_OUT_SPLITS if s in splits and splits[s] is not train and splits[s].count]
    test = next((s for s in others if s.labels is None or s.labels.max() >= 0), None)
    for split in [train] if test is None else [train, test]:
        if split.labels is not None and (split.labels < 0).any():
            item = next(compress(split.items(), split.labels < 0))
            of_train = "" if split is train else f" that split {train.name} has"
            raise ValueError(f"data.label_column: {item.name} has no class{of_train}; fix or remove it")
    if test is None:
        chosen = hold_out(train.classes, config.held_out)
        rest, origin = np.setdiff1d(np.arange(train.count), chosen), f"of split {train.name}"
        held_out_origin = origin if train.labels is None else f"{origin}, by class"
        if others:
            held_out_origin += f", as no image of split {others[0].name} has a class"
        return train.part(rest, origin), train.part(chosen, held_out_origin), names
    count = test.count if config.held_out is None else config.held_out
    if count > test.count:
        raise ValueError(f"data.held_out: split {test.name} has {test.count:,} images, fewer than {count:,}")
    order = rng.permutation(rng.key("held-out"), test.count).numpy()
    origins = f"split {train.name}", f"of split {test.name}" if count < test.count else f"split {test.name}"
    return replace(train, origin=origins[0]), test.part(np.sort(order[:count]), origins[1]), names


def _stores(config: ImagesConfig, place: Place) -> tuple[Store, Store]:
    digest = hashlib.sha256(json.dumps(_identity(config, place)).encode()).hexdigest()
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", place.name)[:60]
    folder = cache_folder() / "images" / f"{name}-{digest[:16]}"
    return Store(folder / "train"), Store(folder / "held-out")


def _identity(config: ImagesConfig, place: Place) -> dict[str, Any]:
    return {"version": VERSION, "place": place.identity, **config.identity}


def _image_set(contents: Contents, place: Place, config: ImagesConfig) -> ImageSet:
    facts, arrays = contents.facts, contents.arrays
    if facts["count"] and not config.skip_broken:
        raise ValueError(_refusal(*facts["broken"][0]))
    names, digest = tuple(facts["classes"]), facts["fingerprint"]
    # A JPEG copy is not the original, whatever its folder is called.
    lossy = "-jpeg" if place.name == "cifar10" and "JPEG" in facts["formats"] else ""
    name = KNOWN.get(digest, place.name + lossy)
    about = {key: facts[key] for key in ("formats", "origin", "sizes")}
    return ImageSet(arrays["images"], arrays["labels"], len(names), name, names, digest, **about)


def _refusal(name: str, why: str) -> str:
    return f"data.path: {name}: broken image ({why}); fix or remove it, or set data.skip_broken=true"


def _fill(config: ImagesConfig, place: Place, stores: tuple[Store, Store]) -> None:
    if place.listing is not None:
        print(place.listing, flush=True)
    train, held_out, classes = read(place, config)
    counts = np.bincount(train.classes, minlength=len(classes)).tolist()
    parts = (train.count, train.origin), (held_out.count, held_out.origin)
    print(f"{place.name}: {describe_parts(*parts, counts, classes)}", flush=True)
    for store, part in zip(stores, (train, held_out), strict=True):
        _decode_part(part, store, classes, config, place)
    facts = [store.open().facts for store in stores]
    print(f"decoded images are cached in {stores[0].folder.parent}", flush=True)
    if count := sum(f["count"] for f in facts):
        names = [name for f in facts for name, _ in f["broken"]]
        images = "image" if count == 1 else "images"
        print(f"warning: {count:,} broken {images} left out: {', '.join(names[:5])}{', ...' * (count > 5)}", flush=True)


def _decode_part(part: Split, store: Store, classes: list[str], config: ImagesConfig, place: Place) -> None:
    """Decode a part's images into a store with the arrays "images" (pixels) and "labels" (classes).

    The store's facts are the fingerprint, the class names, the counts of file formats and sizes, the number of broken
    images, and the names of the first of them.

    Raises:
        ValueError: for the first broken image unless broken ones are skipped, or if no image is left.
        UserError: if the disk is full.
    """
    channels, height, width = config.shape
    columns = {"images": ("|u1", config.shape), "labels": ("<i8", ())}
    with store.fill(_identity(config, place), columns, part.count) as filling, quiet():
        done = sum(line["rows"] + line["facts"]["count"] for line in filling.present.values())
        with progress(f"decoding {store.folder.name}", part.count, done) as advance:
            for chunk, outcomes in _decoded(part, filling.missing, (height, width), channels):
                broken = [(name, why) for name, why, _ in outcomes if isinstance(name, str)]
                if broken and not config.skip_broken:
                    raise ValueError(_refusal(*broken[0]))
                good = [i for i, outcome in enumerate(outcomes) if not isinstance(outcome[0], str)]
                pixels = np.zeros((len(good), *config.shape), np.uint8)
                for row, i in enumerate(good):
                    pixels[row] = outcomes[i][0]
                facts = {
                    "formats": _counted(outcomes[i][1] for i in good),
                    "sizes": _counted("x".join(map(str, outcomes[i][2])) for i in good),
                    "count": len(broken),
                    "broken": broken[:NAMED],
                }
                filling.add(chunk, {"images": pixels, "labels": part.classes[chunk.first : chunk.last][good]}, facts)
                advance(len(outcomes))
        if not any(line["rows"] for line in filling.written.values()):
            raise ValueError(f"data.path: every one of {part.count:,} images is broken")

        def merged(arrays: dict[str, np.ndarray], facts: list[dict[str, Any]]) -> dict[str, Any]:
            kinds = {key: _counted(sum((Counter(f[key]) for f in facts), Counter())) for key in ("formats", "sizes")}
            return {
                "fingerprint": digest_of(arrays.values()),
                "classes": classes,
                "origin": part.origin,
                **kinds,
                "count": sum(f["count"] for f in facts),
                "broken": list(chain.from_iterable(f["broken"] for f in facts))[:NAMED],
            }

        filling.finish(merged)


Outcome = tuple[np.ndarray | str, str, tuple[int, int]]
"""Pixels, the file's format, and (height, width) in it; or a broken image's name, the reason, and (0, 0)."""


def _counted(names: Iterable[str] | Counter[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _decoded(
    part: Split, chunks: list[Chunk], size: tuple[int, int], channels: int
) -> Iterator[tuple[Chunk, list[Outcome]]]:
    """Yield each chunk with its decoded images, which threads decode while the next chunk is read."""
    threads = threads_each(1)
    # Pillow releases the GIL while it decodes and resamples: processes would gain little and take longer to start.
    pool = ThreadPoolExecutor(threads)

    def outcomes(items: list[Item]) -> list[Outcome]:
        return [_outcome(item, size, channels) for item in items]

    waiting: deque[tuple[Chunk, list[Future[list[Outcome]]]]] = deque()
    try:
        rows, position = iter(part.items()), 0
        for chunk in chunks:
            items = list(islice(rows, chunk.first - position, chunk.last - position))
            position = chunk.last
            step = max(1, math.ceil(len(items) / (4 * threads)))
            waiting.append((chunk, [pool.submit(outcomes, items[i : i + step]) for i in range(0, len(items), step)]))
            while len(waiting) > (chunk is not chunks[-1]):
                ready, futures = waiting.popleft()
                yield ready, [outcome for future in futures for outcome in future.result()]
    finally:
        pool.shutdown(cancel_futures=True)


def _outcome(item: Item, size: tuple[int, int], channels: int) -> Outcome:
    if item.encoded is None:
        return item.name, item.why, (0, 0)
    try:
        return decode(item.encoded, size, channels)
    except BrokenError as e:
        return item.name, str(e), (0, 0)
