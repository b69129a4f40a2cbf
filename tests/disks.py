"""A disk that is full for some files, and files that a disk has damaged."""

import builtins
import contextlib
import errno
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Refusing:
    """A file of which only the first ten bytes reach the disk."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: Any) -> int:
        self.file.write(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "Refusing":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@contextlib.contextmanager
def full_for(pattern: str) -> Iterator[None]:
    """While it lasts, files whose names match the pattern find no room."""
    really = io.open

    def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        found = really(file, mode, *arguments, **options)
        name = os.path.basename(os.readlink(f"/proc/self/fd/{found.fileno()}"))
        return Refusing(found) if set(mode) & set("wax+") and re.search(pattern, name) else found

    builtins.open = io.open = opened  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.open = io.open = really  # type: ignore[assignment]


def flip(path: Path, share: float = 0.5) -> None:
    """Turns a bit over, so far into the file."""
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Loses the file's second half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
