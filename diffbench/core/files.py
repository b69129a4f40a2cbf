"""Files that are never half written, where caches lie, and locks of folders."""

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from diffbench.core.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a quota, a limit on the size of files."""


@contextlib.contextmanager
def atomic(path: Path, needed: int | None = None, called: Path | None = None) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` complete or not at all: written beside it, synced, renamed.

    Args:
        path: its name in the end.
        needed: its size, where that is known.
        called: its name in an error, where another is better known.

    Raises:
        UserError: if the disk is full, naming the file and the bytes needed, or those that there was room for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as e:
        size = os.path.getsize(name)
        Path(name).unlink(missing_ok=True)
        full = _full(e)
        if full is None:
            raise
        told = f"more than {size:,} bytes" if needed is None else f"{needed:,} more bytes"
        raise _no_room(called or path, told, full) from None
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sweep(folder: Path) -> None:
    """Removes what killed commands left below a folder of files that were not renamed yet. Its lock must be held."""
    for pattern in (".*.tmp", ".*.staged"):
        for path in folder.rglob(pattern):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a text file atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces a file atomically."""
    with atomic(path, len(data)) as file:
        file.write(data)


def sha256(path: Path) -> str:
    """The hash of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where what can be made again is kept (decoded images, latents, small networks).

    It is $DIFFBENCH_CACHE, or diffbench in $XDG_CACHE_HOME or ~/.cache.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DIFFBENCH_CACHE") or Path(home) / "diffbench")


@contextlib.contextmanager
def room_for(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns a full disk, a quota or a limit on file sizes into one line.

    Raises:
        UserError: naming the path and the bytes still needed.
    """
    try:
        yield
    except Exception as e:
        full = _full(e)
        if full is None:
            raise
        raise _no_room(path, "more bytes" if needed is None else f"{needed:,} more bytes", full) from None


def _full(error: BaseException | None) -> OSError | None:
    """The full disk behind an error: who closes a file after one often fails once more, in other words."""
    while error is not None and not isinstance(error, UserError):
        if isinstance(error, OSError) and error.errno in FULL:
            return error
        error = error.__context__
    return None


def _no_room(path: Path, told: str, error: OSError) -> UserError:
    return UserError(f"{path}: no room for {told} ({error.strerror}); make room, then the same command goes on")


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False, name: str = ".lock") -> Iterator[int]:
    """Holds a folder against a second command; the lock goes with the process, however it ends.

    It gives the open file's descriptor: a process that inherits it holds the lock too.

    Args:
        folder: what to hold; made if missing.
        wait: wait for the other command to end, and say so, instead of refusing.
        name: of the lock's file.

    Raises:
        UserError: if another process holds it and `wait` is false, naming its pid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = False
    try:
        handle = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as e:
        raise UserError(f"{folder / name}: no lock can be held here ({e.strerror}); remove it") from None
    with os.fdopen(handle, "a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                pid = file.read().strip() or "unknown"
                if not wait:
                    raise UserError(f"{folder}: another command (pid {pid}) is working on this run") from None
            if not told:
                print(f"{folder}: waiting for another command (pid {pid}) to finish it", flush=True)
                told = True
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file.fileno()


def cached(path: Path, make: Callable[[], None]) -> Path:
    """Have `make` write a file if it is missing, and return its path; other processes wait for the one that makes it.

    Args:
        path: the file. If it is there, nothing is locked or made.
        make: called without arguments; writes the file atomically.

    Raises:
        UserError: if the folder cannot be locked.
    """
    if not path.exists():
        with locked(path.parent, wait=True, name=f".{path.name}.lock"):
            if not path.exists():
                make()
    return path
