"""Samples on disk, drawn in shards: a killed command goes on where it stopped, and nothing is drawn twice."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from diffbench.core.errors import UserError
from diffbench.core.files import locked, sha256, sweep, write_bytes, write_text

SIZE = 1000
"""Samples of a shard."""


class Shards:
    """`count` samples in files of `SIZE`, listed with their hashes in manifest.json.

    Args:
        parent: folder in which they get a folder of their own, named by a hash of `what`.
        what: all that the samples depend on, plain values.
        count: samples in all.
        shape: (C, H, W) of a sample.
    """

    def __init__(self, parent: Path, what: dict[str, Any], count: int, shape: tuple[int, int, int]) -> None:
        text = json.dumps(what, sort_keys=True)
        self.folder = parent / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.what, self.count, self.shape = what, count, shape
        self.starts = list(range(0, count, SIZE))

    @property
    def manifest(self) -> Path:
        """Which shards there are."""
        return self.folder / "manifest.json"

    def listed(self) -> dict[int, str]:
        """First number -> hash of the shards that the manifest names and whose files are there."""
        try:
            shards = json.loads(self.manifest.read_text())["shards"]
            return {int(s): str(h) for s, h in shards.items() if self.path(int(s)).is_file()}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError):
            print(f"warning: {self.manifest} is damaged: its samples are drawn again")
            return {}

    def present(self) -> int:
        """Samples that lie there, unless their files are damaged."""
        return sum(self._size(start) for start in self.listed())

    def _whole(self) -> dict[int, str]:
        whole = {}
        for start, hashed in self.listed().items():
            if sha256(self.path(start)) == hashed:
                whole[start] = hashed
            else:
                print(f"warning: {self.path(start)} is damaged: its samples are drawn again")
        return whole

    def path(self, start: int) -> Path:
        """The file of the shard that begins with sample number `start`."""
        return self.folder / f"samples-{start:08d}.safetensors"

    def fill(
        self,
        draw: Callable[[int, int], Tensor],
        skipped: Callable[[int], None] = lambda count: None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Draws the shards that are missing.

        Args:
            draw: (first, count) -> (count, C, H, W) uint8 samples number `first` and on.
            skipped: told how many samples lie there already.
            rank: of this process; each draws shards of its own.
            world: processes at work.

        Raises:
            UserError: if the disk has no room for them.
        """
        with locked(self.folder, wait=True, name=".lock" if world == 1 else f".lock-{rank}"):
            if world == 1:
                sweep(self.folder)
            done = self._whole()
            skipped(sum(self._size(start) for start in done))
            missing = [start for start in self.starts[rank::world] if start not in done]
            self._check_room(sum(self._size(start) for start in missing))
            for start in missing:
                images = draw(start, self._size(start))
                assert images.dtype == torch.uint8 and images.shape == (self._size(start), *self.shape)
                write_bytes(self.path(start), save({"images": images.contiguous()}))
                done[start] = sha256(self.path(start))
                self._note(done, world)

    def _note(self, done: dict[int, str], world: int) -> None:
        """Lists shards in the manifest, beside those that other processes have listed meanwhile."""
        with locked(self.folder, wait=True, name=".lock-manifest") if world > 1 else nullcontext():
            done = (self.listed() if world > 1 else {}) | done
            told = {"what": self.what, "count": self.count, "shards": {str(s): done[s] for s in sorted(done)}}
            write_text(self.manifest, json.dumps(told, indent=1) + "\n")

    def _size(self, start: int) -> int:
        return min(SIZE, self.count - start)

    def _check_room(self, samples: int) -> None:
        channels, height, width = self.shape
        needed, free = samples * channels * height * width, shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.folder}: {samples:,} samples take {needed:,} bytes and {free:,} are free; make room"
            )

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples as (numbers (B,), images (B, C, H, W) uint8), in order."""
        for start in self.starts:
            images = self._load(start)
            for index in torch.arange(len(images)).split(size):
                yield start + index, images[index]

    def rows(self, order: Tensor) -> Iterator[Tensor]:
        """Single samples (C, H, W) in another order; their files are mapped, not read whole."""
        parts = [self._load(start) for start in self.starts]
        for number in order.tolist():
            yield parts[number // SIZE][number % SIZE]

    def _load(self, start: int) -> Tensor:
        try:
            return load_file(self.path(start))["images"]
        except (SafetensorError, OSError, KeyError) as e:
            raise UserError(f"{self.path(start)}: damaged ({e}); remove the folder {self.folder}") from None
