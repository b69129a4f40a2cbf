"""Atomic writes, the cache folder, and locks between processes."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from diffbench.core.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, an exceeded quota, and an exceeded limit on file sizes."""


@contextlib.contextmanager
def atomic(path: Path, needed: int | None = None, called: Path | None = None) -> Iterator[BinaryIO]:
    """Open a binary file that appears at `path` complete or not at all: written to a temporary file, synced, renamed.

    Args:
        path: the final path.
        needed: the size of the file in bytes, if known.
        called: the path to name in an error; by default `path`.

    Raises:
        UserError: if the disk is full; it names the file and the bytes needed, or the bytes written if unknown.
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
        full = _disk_full(e)
        if full is None:
            raise
        wanted = f"more than {size:,} bytes" if needed is None else f"{needed:,} more bytes"
        raise _no_room(called or path, wanted, full) from None
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sweep(folder: Path) -> None:
    """Remove the unfinished files that killed commands left under a folder; the caller must hold its lock."""
    for pattern in (".*.tmp", ".*.staged"):
        for path in folder.rglob(pattern):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file atomically."""
    with atomic(path, len(data)) as file:
        file.write(data)


def finite(value: Any) -> Any:
    """Return a value with NaN and infinity, which JSON cannot represent, replaced by None, also when nested."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value in hexadecimal; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Return $DIFFBENCH_CACHE, else diffbench in $XDG_CACHE_HOME or ~/.cache: all files there can be recreated.

    Raises:
        UserError: if neither is set and the user has no home folder.
    """
    try:
        if named := os.environ.get("DIFFBENCH_CACHE"):
            return Path(named).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffbench"
    except RuntimeError:  # e.g. a user in a container or under cron, with neither $HOME nor an entry in passwd
        raise UserError("no home folder for the cache; set DIFFBENCH_CACHE=FOLDER") from None


@contextlib.contextmanager
def room_for(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn a full disk, quota or file-size limit into a UserError that names the path and the bytes still needed."""
    try:
        yield
    except Exception as e:
        full = _disk_full(e)
        if full is None:
            raise
        raise _no_room(path, "more bytes" if needed is None else f"{needed:,} more bytes", full) from None


def _disk_full(error: BaseException | None) -> OSError | None:
    """Return the disk-full error in an exception's context, or None: closing a file after one often raises again."""
    while error is not None and not isinstance(error, UserError):
        if isinstance(error, OSError) and error.errno in FULL:
            return error
        error = error.__context__
    return None


def _no_room(path: Path, wanted: str, error: OSError) -> UserError:
    return UserError(f"{path}: no room for {wanted} ({error.strerror}); make room, then run the same command again")


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False, name: str = ".lock") -> Iterator[int]:
    """Lock a folder against other commands; the lock is released when the process ends, even if it is killed.

    Args:
        folder: the folder; created if missing.
        wait: print a message and wait for the other command to finish, instead of raising.
        name: file name of the lock.

    Yields:
        The descriptor of the lock file; a process that inherits it also holds the lock.

    Raises:
        UserError: if another process holds the lock (the message has its pid) and `wait` is false, or if nothing can
            be written there.
    """
    announced = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as e:
        remedy = "remove it" if e.errno in (errno.ELOOP, errno.EISDIR) else "choose a writable folder"
        raise UserError(f"{folder / name}: cannot lock this folder ({e.strerror}); {remedy}") from None
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
            except OSError as e:  # a file system without locks
                raise UserError(
                    f"{folder / name}: cannot lock this folder ({e.strerror}); choose another one"
                ) from None
            if not announced:
                print(f"{folder}: waiting for another command (pid {pid}) to finish", flush=True)
                announced = True
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file.fileno()


def cached(path: Path, make: Callable[[], None]) -> Path:
    """Return `path`, calling `make` to write the file if it is missing; other processes wait for the one that makes it.

    If the file exists, nothing is locked. `make` must write it atomically.
    """
    if not path.exists():
        with locked(path.parent, wait=True, name=f".{path.name}.lock"):
            if not path.exists():
                make()
    return path
