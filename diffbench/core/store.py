"""Arrays on disk that are filled a chunk at a time, read as memory maps, and never used damaged.

A store is a folder with NAME.bin for each array (its rows one after the other) and manifest.json, which appears last.
While it is filled, plan.json says what it will be and chunks-PART.jsonl which chunks lie on the disk, so that a
command killed between any two writes goes on where it stopped and ends with the same bytes.
"""

import contextlib
import json
import os
import warnings
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffbench.core.files import room_for, write_text

FORMAT = 1
CHUNK_BYTES = 16 << 20
"""About what is written, and checked, at a time."""
CHECKED_ALWAYS = 4 << 30
"""A store up to so many bytes is checked in full whenever it is opened (a second); see `_check`."""

Columns = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> numpy dtype with its byte order, and the shape of one row."""


class DamagedError(ValueError):
    """A store whose files are not what was written; the text names the file."""


@dataclass(frozen=True)
class Store:
    """An opened store: what it is, and its arrays, read-only memory maps of `rows` rows."""

    identity: Any
    rows: int
    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]


def chunk_rows(columns: Columns) -> int:
    """Rows that make up a chunk."""
    return max(1, min(8192, CHUNK_BYTES // sum(map(_row_bytes, columns.values()))))


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a finished store."""
    return (folder / "manifest.json").is_file()


def identity(folder: Path) -> Any:
    """What the store in a folder, finished or not, is made of; None where there is none.

    Raises:
        DamagedError: if the file that says so cannot be read.
    """
    if is_complete(folder):
        return _read_manifest(folder / "manifest.json")["identity"]
    begun = folder / "plan.json"
    try:
        return json.loads(begun.read_text())["identity"] if begun.is_file() else None
    except (ValueError, KeyError, TypeError):
        raise DamagedError(f"{begun}: damaged: not the JSON that was written") from None


def open_store(folder: Path) -> Store:
    """A finished store, its checksums compared.

    Raises:
        DamagedError: naming the file that is not what was written.
    """
    manifest = _read_manifest(folder / "manifest.json")
    rows: int = manifest["rows"]
    arrays: dict[str, np.ndarray] = {}
    for name, (kind, shape) in manifest["columns"].items():
        path, due = folder / f"{name}.bin", rows * _row_bytes((kind, shape))
        size = path.stat().st_size if path.is_file() else 0
        if size != due:
            raise DamagedError(f"{path}: damaged: {size:,} bytes where {due:,} were written")
        arrays[name] = np.memmap(path, np.dtype(kind), "r", shape=(rows, *shape))
    _check(folder, arrays, manifest["chunks"])
    with contextlib.suppress(OSError):  # a kill may have left them behind
        _clear(folder)
    return Store(manifest["identity"], rows, manifest["facts"], arrays)


def tensor(array: np.ndarray) -> Tensor:
    """A memory map as a tensor that may be read only; it is the map's memory, not a copy."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def reopen(folder: Path) -> None:
    """Makes a damaged store an unfinished one, whose intact chunks need not be made again.

    Raises:
        DamagedError: if the manifest, which says what is intact, is itself damaged.
    """
    manifest = _read_manifest(folder / "manifest.json")
    plan = {key: manifest[key] for key in ("format", "identity", "columns")}
    lines = ({"chunk": number, **line} for number, line in enumerate(manifest["chunks"]))
    write_text(folder / "chunks-0.jsonl", "".join(_dumps(line) for line in lines))
    write_text(folder / "plan.json", _dumps(plan))
    for name in ("manifest.json", "checked.json"):
        (folder / name).unlink(missing_ok=True)


class Writer:
    """Fills a store; several may fill one at the same time, each its own chunks.

    Args:
        folder: made if missing.
        identity: what the store is made of, as plain JSON values.
        columns: its arrays.
        part: name of this writer among those at work (the rank).

    Attributes:
        done: chunks on the disk when the writer was made, by number, whichever writer wrote them.

    Raises:
        ValueError: if the folder is being filled with something else.
    """

    def __init__(self, folder: Path, identity: Any, columns: Columns, part: int = 0) -> None:
        self.folder, self.columns, self.part = folder, columns, part
        folder.mkdir(parents=True, exist_ok=True)
        self.plan = {
            "format": FORMAT,
            "identity": identity,
            "columns": {name: [kind, list(shape)] for name, (kind, shape) in columns.items()},
        }
        begun = folder / "plan.json"
        if not begun.exists():
            write_text(begun, _dumps(self.plan))
        elif begun.read_text() != _dumps(self.plan):
            raise ValueError(f"{begun}: another store is being filled here; choose another folder")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._files = {name: os.open(self.path(name), flags, 0o644) for name in columns}
        self.done = self._written(check=True)
        # A kill may have torn the last line of this part's log.
        log = self._log_path(part)
        lines = [line for line in _lines(log) if self.done.get(line["chunk"]) == line]
        write_text(log, "".join(_dumps(line) for line in lines))
        self._log = os.open(log, os.O_WRONLY | os.O_CLOEXEC)

    def path(self, name: str) -> Path:
        """The file of an array."""
        return self.folder / f"{name}.bin"

    def add(self, chunk: int, start: int, arrays: Mapping[str, np.ndarray], facts: Any = None) -> None:
        """Writes a chunk's rows from row `start` on; once it returns they survive a power cut.

        Raises:
            UserError: if the disk is full.
        """
        sums, rows = {}, 0
        for name, file in self._files.items():
            array = np.ascontiguousarray(arrays[name], np.dtype(self.columns[name][0]))
            data, rows = _bytes(array), len(array)
            _write(self.path(name), file, data, start * _row_bytes(self.columns[name]))
            sums[name] = zlib.crc32(data)
        line = {"chunk": chunk, "start": start, "rows": rows, "crc32": sums, "facts": facts}
        text = memoryview(_dumps(line).encode())
        _write(self._log_path(self.part), self._log, text, os.fstat(self._log).st_size)

    def written(self) -> dict[int, dict[str, Any]]:
        """The chunks that lie on the disk now, by number, with start, rows and facts; not checked again."""
        return self._written(check=False)

    def finish(self, rows: int, facts: dict[str, Any]) -> None:
        """Makes the store complete; all chunks must be there.

        Raises:
            DamagedError: if they are not, or one is not what was written.
        """
        chunks = [line for _, line in sorted(self._written(check=True).items())]
        found = 0
        for line in chunks:
            if line["start"] == found:
                found += line["rows"]
        if found != rows:
            raise DamagedError(f"{self.folder}: damaged: {found:,} rows in order where {rows:,} were written")
        for name, file in self._files.items():
            os.ftruncate(file, rows * _row_bytes(self.columns[name]))
            os.fsync(file)
        manifest = self.plan | {"rows": rows, "facts": facts}
        manifest["chunks"] = [{k: line[k] for k in ("start", "rows", "crc32", "facts")} for line in chunks]
        sealed = manifest | {"crc32": zlib.crc32(_dumps(manifest).encode())}
        write_text(self.folder / "manifest.json", _dumps(sealed))
        _clear(self.folder)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (*self._files.values(), self._log):
            os.close(file)

    def _log_path(self, part: int) -> Path:
        return self.folder / f"chunks-{part}.jsonl"

    def _written(self, check: bool) -> dict[int, dict[str, Any]]:
        lines = [line for log in sorted(self.folder.glob("chunks-*.jsonl")) for line in _lines(log)]
        return {line["chunk"]: line for line in lines if not check or self._intact(line)}

    def _intact(self, line: dict[str, Any]) -> bool:
        for name, file in self._files.items():
            size = _row_bytes(self.columns[name])
            if zlib.crc32(os.pread(file, line["rows"] * size, line["start"] * size)) != line["crc32"][name]:
                return False
        return True


def _clear(folder: Path) -> None:
    """Removes what only an unfinished store has, and what killed commands left of files not yet renamed."""
    for path in (*folder.glob("chunks-*.jsonl"), folder / "plan.json", *folder.glob(".*.tmp")):
        path.unlink(missing_ok=True)


def _row_bytes(column: tuple[str, Any]) -> int:
    kind, shape = column
    return int(np.dtype(kind).itemsize * np.prod(shape, dtype=np.int64))


def _dumps(values: Any) -> str:
    return json.dumps(values, separators=(",", ":")) + "\n"


def _lines(log: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; the last may be torn."""
    found = []
    for text in log.read_bytes().splitlines(keepends=True) if log.exists() else []:
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def _write(path: Path, file: int, data: memoryview, offset: int) -> None:
    with room_for(path, len(data)):
        while data:
            done = os.pwrite(file, data, offset)
            data, offset = data[done:], offset + done
        os.fsync(file)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
        stated = manifest.pop("crc32")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DamagedError(f"{path}: damaged: not the JSON that was written") from None
    if zlib.crc32(_dumps(manifest).encode()) != stated or manifest["format"] != FORMAT:
        raise DamagedError(f"{path}: damaged: its checksum does not match")
    assert isinstance(manifest, dict)
    return manifest


def _check(folder: Path, arrays: dict[str, np.ndarray], chunks: list[dict[str, Any]]) -> None:
    """Compares checksums: all of them, or, of a large store checked in full since its files last changed, a sample."""
    stamp = [[s.st_size, s.st_mtime_ns, s.st_ino] for s in ((folder / f"{name}.bin").stat() for name in arrays)]
    checked, chosen = folder / "checked.json", chunks
    total = sum(array.nbytes for array in arrays.values())
    if total > CHECKED_ALWAYS and checked.is_file() and checked.read_text() == _dumps(stamp):
        chosen = chunks[:: -(-total // CHECKED_ALWAYS)]

    def damaged(line: dict[str, Any]) -> str | None:
        rows = slice(line["start"], line["start"] + line["rows"])
        return next((n for n, a in arrays.items() if zlib.crc32(_bytes(a[rows])) != line["crc32"][n]), None)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # crc32 lets other threads run
        for line, name in zip(chosen, pool.map(damaged, chosen), strict=True):
            if name is not None:
                where = f"rows {line['start']:,} to {line['start'] + line['rows'] - 1:,}"
                raise DamagedError(f"{folder / name}.bin: damaged: the checksum of {where} does not match")
    if total > CHECKED_ALWAYS and chosen is chunks and os.access(folder, os.W_OK):
        write_text(checked, _dumps(stamp))


def _bytes(rows: np.ndarray) -> memoryview:
    return rows.data.cast("B") if rows.size else memoryview(b"")
