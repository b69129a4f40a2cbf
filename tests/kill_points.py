"""Fill a cache, killed (SIGKILL) at one of its writes, then fill it again to the end; run as a separate process.

    python tests/kill_points.py latents|images MOST FOLDER [IMAGES]

Tries at most MOST kills, spread evenly over the writes. Prints JSON: the number of writes, flushes, renames and
removals in an uninterrupted run, the number of kills tried, the kills after which the same command did not give the
bytes of an uninterrupted run, and whether two commands at the same time fill the cache correctly.
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets  # noqa: F401  imported once here, not in each fork
import torch
from own_images import Encoder, squares

from diffbench.core import store
from diffbench.data.images import images
from diffbench.data.latents import encode
from diffbench.data.places import ImagesConfig

CALLS = ("pwrite", "fsync", "replace", "truncate", "unlink")


def killed_at(point: int) -> list[int]:
    """Count calls from here on and kill this process at call number `point`; return the running count."""
    count = [0]

    def hooked(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == point:
                if name == "pwrite":  # a torn write: only the first half reaches the file
                    file, data, offset = arguments
                    call(file, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return run

    for name in CALLS:
        setattr(os, name, hooked(name, getattr(os, name)))
    return count


def start(work: Callable[[], Any], point: int = 0) -> Callable[[], tuple[int, int]]:
    """Fork a child that does the work; return a function that waits for its status and the number of calls counted."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        count = killed_at(point)
        try:
            work()
            os.write(writer, str(count[0]).encode())
        finally:
            os._exit(0)
    os.close(writer)

    def wait() -> tuple[int, int]:
        status = os.waitpid(pid, 0)[1]
        with os.fdopen(reader) as file:
            return status, int(file.read() or 0)

    return wait


def content(folder: Path) -> dict[str, str]:
    """Return the names and hashes of all files except locks."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def main(what: str, most: int, folder: Path, source: str = "") -> dict[str, Any]:
    torch.set_num_threads(1)
    store.CHUNK_BYTES = 1000

    def work(place: Path) -> Callable[[], Any]:
        if what == "latents":
            return lambda: encode(squares(), Encoder(), place, batch_size=4)
        os.environ["DIFFBENCH_CACHE"] = str(place)
        config = ImagesConfig(path=source, image_size=8, held_out=5, skip_broken=True)
        return lambda: images(config)

    _, calls = start(work(folder / "whole"))()
    whole = content(folder / "whole")
    points = sorted({1 + (calls - 1) * i // (most - 1) for i in range(most)})
    wrong = []
    for point in points:
        place = folder / f"killed-{point}"
        status, _ = start(work(place), point)()
        again, _ = start(work(place))()
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL) or again or content(place) != whole:
            wrong.append(point)
    both = [start(work(folder / "both")) for _ in range(2)]
    alike = [wait()[0] for wait in both] == [0, 0] and content(folder / "both") == whole
    return {"two at once": alike, "files": len(whole), "calls": calls, "kills": len(points), "wrong": wrong}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])))
