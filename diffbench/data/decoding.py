"""A part of a data set to a store: read in order, decoded by threads, written a chunk at a time."""

import hashlib
import math
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from diffbench.core import store
from diffbench.core.errors import UserError
from diffbench.core.progress import progress
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
    part: Part, folder: Path, identity: Any, classes: list[str], *, size: int, channels: int, skip_broken: bool
) -> None:
    """Fills the store in `folder` with the part's pixels ("images") and classes ("labels"), or goes on filling it.

    Its facts are the fingerprint, the classes, how often each file format was met, the number of broken images and
    the names of the first.

    Raises:
        ValueError: naming the first broken image, unless they are skipped, or where none is left.
        UserError: where the disk is full.
    """
    columns = {"images": ("|u1", (channels, size, size)), "labels": ("<i8", ())}
    with store.Writer(folder, identity, columns) as writer, quiet():
        lines = _in_order(writer.done)
        found = sum(line["rows"] for line in lines)
        _check_room(folder, (len(part.rows) - found) * (channels * size * size + 8))
        facts = [line["facts"] for line in lines]
        looked_at = found + sum(f["count"] for f in facts)
        with progress(f"decoding {folder.name}", len(part.rows), looked_at) as advance:
            windows = _decoded(part, store.chunk_rows(columns), len(lines), size, channels)
            for number, (chosen, outcomes) in enumerate(windows, start=len(lines)):
                good = [i for i, outcome in enumerate(outcomes) if not isinstance(outcome, Broken)]
                facts.append(_facts(outcomes))
                if facts[-1]["count"] and not skip_broken:
                    raise ValueError(refusal(*facts[-1]["broken"][0]))
                pixels = np.zeros((len(good), channels, size, size), np.uint8)
                for row, i in enumerate(good):
                    pixels[row] = outcomes[i][0]  # type: ignore[index]
                writer.add(number, found, {"images": pixels, "labels": part.labels[chosen[good]]}, facts[-1])
                found += len(good)
                advance(len(chosen))
        if not found:
            raise ValueError(f"data.path: every one of {len(part.rows):,} images is broken")
        formats: Counter[str] = sum((Counter(f["formats"]) for f in facts), Counter())
        writer.finish(
            found,
            {
                "fingerprint": _fingerprint(writer, columns, found),
                "classes": classes,
                "formats": dict(sorted(formats.items())),
                "count": sum(f["count"] for f in facts),
                "broken": list(chain.from_iterable(f["broken"] for f in facts))[:NAMED],
            },
        )


def refusal(name: str, why: str) -> str:
    """What is said of a broken image that may not be skipped."""
    return f"data.path: {name}: broken image ({why}); mend or remove it, or set data.skip_broken=true"


def _decoded(
    part: Part, window: int, first: int, size: int, channels: int
) -> Iterator[tuple[np.ndarray, list[Outcome]]]:
    """Windows from number `first` on, decoded while the next is read: positions in `part.rows`, and what came out."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Pillow lets other threads run while it decodes and resamples: processes would gain little and cost a start each.
    pool = ThreadPoolExecutor(threads)

    def several(rows: np.ndarray, items: list[Any]) -> list[Outcome]:
        return [_outcome(part, int(row), item, size, channels) for row, item in zip(rows, items, strict=True)]

    waiting: deque[tuple[np.ndarray, list[Future[list[Outcome]]]]] = deque()
    try:
        for number, (chosen, items) in enumerate(part.windows(window)):
            if number < first:
                continue
            step = max(1, math.ceil(len(items) / (4 * threads)))
            parts = [slice(i, i + step) for i in range(0, len(items), step)]
            futures = [pool.submit(several, part.rows[chosen[s]], items[s]) for s in parts]
            waiting.append((chosen, futures))
            if len(waiting) > 1:
                yield _collected(*waiting.popleft())
        while waiting:
            yield _collected(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _collected(chosen: np.ndarray, futures: list[Future[list[Outcome]]]) -> tuple[np.ndarray, list[Outcome]]:
    return chosen, [outcome for future in futures for outcome in future.result()]


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


def _in_order(done: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """The chunks from the first on without a gap: each one's place follows from those before."""
    lines: list[dict[str, Any]] = []
    while (line := done.get(len(lines))) and line["start"] == sum(before["rows"] for before in lines):
        lines.append(line)
    return lines


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: needs {needed:,} bytes where {free:,} are free; make room, or set DIFFBENCH_CACHE elsewhere"
        )


def _fingerprint(writer: store.Writer, columns: store.Columns, rows: int) -> str:
    """That of the images and labels written (`ImageSet.fingerprint`)."""
    digest = hashlib.sha256()
    for name in ("images", "labels"):
        kind, shape = columns[name]
        digest.update(np.memmap(writer.path(name), np.dtype(kind), "r", shape=(rows, *shape)).data.cast("B"))
    return digest.hexdigest()[:16]
