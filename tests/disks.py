"""Simulated disk faults: a disk that is full for some files, and files with a flipped bit or a missing half."""

import builtins
import contextlib
import errno
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class FullFile:
    """A file whose writes put ten bytes on disk and then fail with ENOSPC."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: Any) -> int:
        self.file.write(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "FullFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@contextlib.contextmanager
def full_for(pattern: str) -> Iterator[None]:
    """Make writes to files whose names match the pattern fail for lack of space, within the context."""
    real_open = io.open

    def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        found = real_open(file, mode, *arguments, **options)
        name = os.path.basename(os.readlink(f"/proc/self/fd/{found.fileno()}"))
        return FullFile(found) if set(mode) & set("wax+") and re.search(pattern, name) else found

    builtins.open = io.open = opened  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.open = io.open = real_open  # type: ignore[assignment]


def flip(path: Path, share: float = 0.5) -> None:
    """Flip one bit at the given share of the file's length."""
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Cut off the second half of the file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
