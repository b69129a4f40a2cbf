"""Arrays on disk, filled chunk by chunk: after a kill, the same command resumes and ends with the same bytes.

A store is a folder with NAME.bin for each array (its raw rows) and manifest.json, which is written last. Until then,
plan.json describes what is being made, and a chunk-NUMBER.json marks each chunk that is on disk. manifest.json and
chunk-NUMBER.json each contain their own checksum.
"""

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffbench.core.errors import UserError
from diffbench.core.files import locked, room_for, write_text

FORMAT = 1
CHUNK_BYTES = 16 << 20
"""Approximate number of bytes written, and checked, at a time."""
CHECKED_ALWAYS = 4 << 30
"""Stores of at most this many bytes are checked in full whenever they are opened (about a second); see `_check`."""

Arrays = dict[str, np.ndarray]
Columns = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (NumPy dtype with its byte order, shape of one row)."""


class DamagedError(ValueError):
    """A store whose files differ from what was written; the message names the file."""


@dataclass(frozen=True)
class Contents:
    """An opened store: its facts, and its arrays as read-only memory maps."""

    facts: dict[str, Any]
    arrays: dict[str, Tensor]


@dataclass(frozen=True)
class Chunk:
    """Rows `first` to `last` - 1 of the data that a store is made from."""

    number: int
    first: int
    last: int


class Store:
    """A folder of arrays."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest, self.plan = folder / "manifest.json", folder / "plan.json"

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def is_complete(self) -> bool:
        return self.manifest.is_file()

    def identity(self) -> Any:
        """Return the description of what the store is made from, complete or not; None if it was never started."""
        if self.is_complete():
            return _read(self.manifest)["identity"]
        try:
            return json.loads(self.plan.read_text())["identity"] if self.plan.is_file() else None
        except (ValueError, KeyError, TypeError):
            raise DamagedError(f"{self.plan}: damaged: not the JSON that was written") from None

    def chunks(self) -> dict[int, dict[str, Any]]:
        """Return each chunk on disk by number: first row, number of rows, checksums and facts; nothing is verified."""
        if self.is_complete():
            return dict(enumerate(_read(self.manifest)["chunks"]))
        try:
            found = {}
            for path in sorted(self.folder.glob("chunk-*.json")):
                with suppress(DamagedError):  # its chunk is made again
                    found[int(path.stem[6:])] = _read(path)["chunk"]
            return found
        except FileNotFoundError:  # another rank has just completed the store and removed these files
            return self.chunks()

    def open(self) -> Contents:
        """Open a complete store after verifying its checksums; raise DamagedError with the name of a damaged file."""
        manifest = _read(self.manifest)
        arrays = self.arrays(manifest["columns"], manifest["rows"])
        _check(self, manifest["columns"], manifest["chunks"])
        with suppress(OSError):  # a kill may have left some of these files behind
            self.clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return Contents(manifest["facts"], {name: torch.from_numpy(array) for name, array in arrays.items()})

    def open_intact(self) -> Contents | None:
        """Open the store; return None if it is incomplete, or if it is damaged, after printing a warning."""
        try:
            return self.open() if self.is_complete() else None
        except DamagedError as e:
            print(f"warning: {e}; rebuilding it", flush=True)
            return None

    @contextmanager
    def fill(
        self, identity: Any, columns: Columns, rows: int, chunk_rows: int | None = None, rank: int = 0, world: int = 1
    ) -> "Iterator[Filling]":
        """Yield a `Filling` for what is missing or damaged; a second process of the same rank waits here for the first.

        Args:
            identity: what the store is made from, as plain JSON values.
            rows: total number of rows, an upper bound if chunks turn out shorter.
            chunk_rows: rows per chunk; by default as many as fit in CHUNK_BYTES, at most 8192.
            rank: rank of this process, which fills every `world`-th chunk.

        Raises:
            UserError: if the disk has no room for the rows, or the folder is being filled with something else.
        """
        size = chunk_rows or max(1, min(8192, CHUNK_BYTES // sum(map(_row_bytes, columns.values()))))
        with locked(self.folder, wait=True):
            try:
                if self.is_complete():
                    self.open()
            except DamagedError:
                self._reopen()
        with locked(self.folder, wait=True, name=f".lock-{rank}"):
            yield Filling(self, identity, columns, rows, size, rank, world)

    def _reopen(self) -> None:
        """Turn a damaged store into an unfinished one that keeps the intact chunks listed in its manifest."""
        with suppress(DamagedError):
            manifest = _read(self.manifest)
            for number, chunk in enumerate(manifest["chunks"]):
                write_text(self.chunk_path(number), _checksummed({"chunk": chunk}))
            write_text(self.plan, _dumps({key: manifest[key] for key in ("format", "identity", "columns")}))
        self.manifest.unlink()

    def damaged(self, columns: Columns, chunk: Mapping[str, Any]) -> str | None:
        """Return the name of the first array whose rows of a chunk (one of `chunks`) are damaged, or None."""
        for name, column in columns.items():
            size = _row_bytes(column)
            with suppress(FileNotFoundError), self.path(name).open("rb") as file:
                file.seek(chunk["start"] * size)
                checksum, remaining = 0, chunk["rows"] * size
                while remaining and (data := file.read(min(remaining, CHUNK_BYTES))):
                    checksum, remaining = zlib.crc32(data, checksum), remaining - len(data)
                if not remaining and checksum == chunk["crc32"][name]:
                    continue
            return name
        return None

    def chunk_path(self, number: int) -> Path:
        """Return the path of the file that marks a chunk as being on disk."""
        return self.folder / f"chunk-{number:06d}.json"

    def arrays(self, columns: Columns, rows: int) -> Arrays:
        """Memory-map the arrays, each of `rows` rows; raise DamagedError if a file has a different size."""
        arrays: Arrays = {}
        for name, (kind, shape) in columns.items():
            path, expected = self.path(name), rows * _row_bytes((kind, shape))
            size = path.stat().st_size if path.is_file() else 0
            if size != expected:
                raise DamagedError(f"{path}: damaged: {size:,} bytes where {expected:,} were written")
            arrays[name] = np.memmap(path, np.dtype(kind), "r", shape=(rows, *shape))
        return arrays

    def clear(self) -> None:
        """Remove the files that only an unfinished store has, and the temporary files of killed commands."""
        for path in (*self.folder.glob("chunk-*.json"), self.plan, *self.folder.glob(".*.tmp")):
            path.unlink(missing_ok=True)


class Filling:
    """This rank's chunks: the `missing` ones in order, each to be passed to `add`, and the `present` ones by number."""

    def __init__(
        self, store: Store, identity: Any, columns: Columns, rows: int, size: int, rank: int, world: int
    ) -> None:
        self.store, self.columns, self.size = store, columns, size
        self.chunks = [Chunk(i, i * size, min(i * size + size, rows)) for i in range(-(-rows // size))]
        kinds = {name: [kind, list(shape)] for name, (kind, shape) in columns.items()}
        self.plan = {"format": FORMAT, "identity": identity, "columns": kinds}
        if not store.is_complete():
            if not store.plan.exists():
                write_text(store.plan, _dumps(self.plan))
            elif store.plan.read_text() != _dumps(self.plan):
                raise UserError(f"{store.plan}: another store is being filled here; remove {store.folder}")
        self.written = store.chunks() if store.is_complete() else self._intact()
        mine = self.chunks[rank::world]
        self.missing = [chunk for chunk in mine if chunk.number not in self.written]
        self.present = {chunk.number: self.written[chunk.number] for chunk in mine if chunk.number in self.written}
        needed = sum(c.last - c.first for c in self.missing) * sum(map(_row_bytes, columns.values()))
        free = shutil.disk_usage(store.folder).free
        if needed > free:
            raise UserError(f"{store.folder}: needs {needed:,} bytes, but only {free:,} are free; make room")

    def add(self, chunk: Chunk, arrays: Mapping[str, np.ndarray], facts: Any = None) -> None:
        """Write a chunk's rows and sync them to disk; there may be fewer than the chunk spans, if some are left out."""
        before = (self.written.get(i, {"rows": self.size})["rows"] for i in range(chunk.number))
        start, sums, rows = sum(before), {}, 0
        for name, column in self.columns.items():
            array = np.ascontiguousarray(arrays[name], np.dtype(column[0]))
            data, rows = array.reshape(-1).view(np.uint8).data, len(array)
            _write(self.store.path(name), data, start * _row_bytes(column))
            sums[name] = zlib.crc32(data)
        self.written[chunk.number] = {"start": start, "rows": rows, "crc32": sums, "facts": facts}
        write_text(self.store.chunk_path(chunk.number), _checksummed({"chunk": self.written[chunk.number]}))

    def finish(self, facts: Callable[[Arrays, list[Any]], dict[str, Any]] = lambda arrays, chunks: {}) -> bool:
        """Complete the store if the chunks of all ranks are on disk; return whether they are.

        Args:
            facts: (all arrays, the facts of each chunk) -> the facts of the store.

        Raises:
            DamagedError: if a chunk is damaged.
        """
        with locked(self.store.folder, wait=True):
            if self.store.is_complete():
                return True
            if len(self.store.chunks()) < len(self.chunks):
                return False
            records = [record for _, record in sorted(self._intact().items())]
            *starts, rows = accumulate((record["rows"] for record in records), initial=0)
            if len(records) < len(self.chunks) or starts != [record["start"] for record in records]:
                raise DamagedError(f"{self.store.folder}: damaged: its chunks are not contiguous; remove it")
            for name, column in self.columns.items():
                os.truncate(self.store.path(name), rows * _row_bytes(column))
            found = facts(self.store.arrays(self.columns, rows), [record["facts"] for record in records])
            write_text(self.store.manifest, _checksummed(self.plan | {"rows": rows, "facts": found, "chunks": records}))
            self.store.clear()
            return True

    def _intact(self) -> dict[int, dict[str, Any]]:
        chunks = self.store.chunks()
        return {n: record for n, record in chunks.items() if self.store.damaged(self.columns, record) is None}


def _row_bytes(column: tuple[str, Any]) -> int:
    kind, shape = column
    return int(np.dtype(kind).itemsize * np.prod(shape, dtype=np.int64))


def _dumps(values: Any) -> str:
    return json.dumps(values, separators=(",", ":")) + "\n"


def _checksummed(values: dict[str, Any]) -> str:
    """Serialize values to JSON together with their checksum, which `_read` verifies."""
    return _dumps(values | {"crc32": zlib.crc32(_dumps(values).encode())})


def _write(path: Path, data: memoryview, offset: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with room_for(path, len(data)):
            while data:
                done = os.pwrite(file, data, offset)
                data, offset = data[done:], offset + done
            os.fsync(file)
    finally:
        os.close(file)


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        checksum = values.pop("crc32")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DamagedError(f"{path}: damaged: not the JSON that was written") from None
    if zlib.crc32(_dumps(values).encode()) != checksum or values.get("format", FORMAT) != FORMAT:
        raise DamagedError(f"{path}: damaged: its checksum does not match")
    return values


def _check(store: Store, columns: Columns, chunks: list[dict[str, Any]]) -> None:
    """Verify checksums: all, or only a sample if the store is large and unchanged since its last full check."""
    stamp = [[s.st_size, s.st_mtime_ns, s.st_ino] for s in (store.path(name).stat() for name in columns)]
    checked, chosen = store.folder / "checked.json", chunks
    total = sum(size for size, *_ in stamp)
    if total > CHECKED_ALWAYS and checked.is_file() and checked.read_text() == _dumps(stamp):
        chosen = chunks[:: -(-total // CHECKED_ALWAYS)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # crc32 releases the GIL
        for record, name in zip(chosen, pool.map(partial(store.damaged, columns), chosen), strict=True):
            if name is not None:
                where = f"rows {record['start']:,} to {record['start'] + record['rows'] - 1:,}"
                raise DamagedError(f"{store.path(name)}: damaged: the checksum of {where} does not match")
    if total > CHECKED_ALWAYS and chosen is chunks and os.access(store.folder, os.W_OK):
        write_text(checked, _dumps(stamp))
