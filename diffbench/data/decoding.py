"""A part of a data set to a store: read in order, decoded by threads, written a chunk at a time."""

import hashlib
import math
import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from diffbench.core.progress import progress
from diffbench.core.store import Chunk, Store
from diffbench.data.decode import BrokenError, decode, quiet
from diffbench.data.splits import Part

NAMED = 1000
"""So many broken images are named in the manifest; all are counted."""


@dataclass(frozen=True)
class Broken:
    """An image that gave no pixels: where it is, and why."""

    name: str
    why: str


Outcome = tuple[np.ndarray, str] | Broken
"""Pixels and the file's format, or neither."""


def decode_part(
    part: Part, store: Store, identity: Any, classes: list[str], *, size: int, channels: int, skip_broken: bool
) -> None:
    """Fill a store with the part's pixels ("images") and classes ("labels"), or go on filling it.

    Its facts are the fingerprint, the classes, how often each file format was met, the number of broken images and
    the names of the first.

    Raises:
        ValueError: naming the first broken image, unless they are skipped, or where none is left.
        UserError: where the disk is full.
    """
    columns = {"images": ("|u1", (channels, size, size)), "labels": ("<i8", ())}
    with store.fill(identity, columns, len(part.rows)) as filling, quiet():
        done = sum(line["rows"] + line["facts"]["count"] for line in filling.present.values())
        with progress(f"decoding {store.folder.name}", len(part.rows), done) as advance:
            for chunk, outcomes in _decoded(part, filling.missing, size, channels):
                facts = _facts(outcomes)
                if facts["count"] and not skip_broken:
                    raise ValueError(refusal(*facts["broken"][0]))
                good = [i for i, outcome in enumerate(outcomes) if not isinstance(outcome, Broken)]
                pixels = np.zeros((len(good), channels, size, size), np.uint8)
                for row, i in enumerate(good):
                    pixels[row] = outcomes[i][0]  # type: ignore[index]
                filling.add(chunk, {"images": pixels, "labels": part.labels[chunk.first : chunk.last][good]}, facts)
                advance(len(outcomes))
        if not any(line["rows"] for line in filling.written.values()):
            raise ValueError(f"data.path: every one of {len(part.rows):,} images is broken")

        def merged(arrays: dict[str, np.ndarray], facts: list[dict[str, Any]]) -> dict[str, Any]:
            formats: Counter[str] = sum((Counter(f["formats"]) for f in facts), Counter())
            return {
                "fingerprint": _fingerprint(arrays),
                "classes": classes,
                "formats": dict(sorted(formats.items())),
                "count": sum(f["count"] for f in facts),
                "broken": list(chain.from_iterable(f["broken"] for f in facts))[:NAMED],
            }

        filling.finish(merged)


def refusal(name: str, why: str) -> str:
    """What is said of a broken image that may not be skipped."""
    return f"data.path: {name}: broken image ({why}); mend or remove it, or set data.skip_broken=true"


def _decoded(part: Part, chunks: list[Chunk], size: int, channels: int) -> Iterator[tuple[Chunk, list[Outcome]]]:
    """What comes of each chunk, decoded while the next is read."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Pillow lets other threads run while it decodes and resamples: processes would gain little and cost a start each.
    pool = ThreadPoolExecutor(threads)

    def several(rows: np.ndarray, items: list[Any]) -> list[Outcome]:
        return [_outcome(part, int(row), item, size, channels) for row, item in zip(rows, items, strict=True)]

    waiting: deque[tuple[Chunk, list[Future[list[Outcome]]]]] = deque()
    try:
        for chunk, items in zip(chunks, part.read(chunks), strict=True):
            step, rows = max(1, math.ceil(len(items) / (4 * threads))), part.rows[chunk.first : chunk.last]
            parts = [slice(i, i + step) for i in range(0, len(items), step)]
            waiting.append((chunk, [pool.submit(several, rows[s], items[s]) for s in parts]))
            if len(waiting) > 1:
                yield _collected(*waiting.popleft())
        while waiting:
            yield _collected(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _collected(chunk: Chunk, futures: list[Future[list[Outcome]]]) -> tuple[Chunk, list[Outcome]]:
    return chunk, [outcome for future in futures for outcome in future.result()]


def _outcome(part: Part, row: int, item: Any, size: int, channels: int) -> Outcome:
    try:
        return decode(_encoded(part, item), size, channels)
    except BrokenError as e:
        path = item.get("path") if isinstance(item, dict) else None
        where = f"row {row} of split {part.split}"
        return Broken(str(path) if part.is_folder else f"{where} ({path})" if path else where, str(e))


def _encoded(part: Part, item: Any) -> bytes | str:
    """The bytes of a row, or the path of the file that it names, if it may."""
    if not isinstance(item, dict) or (item.get("bytes") is None and item.get("path") is None):
        raise BrokenError("the row holds no image")
    if item.get("bytes") is not None:
        return bytes(item["bytes"])
    path = str(item["path"])
    # A table from elsewhere could name any file of this machine.
    if part.base is None or not Path(path).resolve().is_relative_to(part.base.resolve()):
        raise BrokenError("the row names a file instead of holding its bytes")
    return path


def _facts(outcomes: list[Outcome]) -> dict[str, Any]:
    broken = [[o.name, o.why] for o in outcomes if isinstance(o, Broken)]
    formats = Counter(o[1] for o in outcomes if not isinstance(o, Broken))
    return {"formats": dict(sorted(formats.items())), "count": len(broken), "broken": broken[:NAMED]}


def _fingerprint(arrays: dict[str, np.ndarray]) -> str:
    """That of the images and labels written (`ImageSet.fingerprint`)."""
    digest = hashlib.sha256(arrays["images"].data.cast("B"))
    digest.update(arrays["labels"].data.cast("B"))
    return digest.hexdigest()[:16]
