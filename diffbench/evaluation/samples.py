"""Samples on disk, drawn in chunks: a killed command resumes where it stopped, and no chunk is drawn twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffbench.core.errors import UserError
from diffbench.core.files import digest
from diffbench.core.store import DamagedError, Store

SIZE = 1000
"""Samples per chunk, the unit that is lost if a command is killed."""


class Samples:
    """`count` samples in a folder named by a hash of everything that they depend on.

    Args:
        what: everything that the samples depend on, as plain values.
    """

    def __init__(self, parent: Path, what: dict[str, Any], count: int, shape: tuple[int, int, int]) -> None:
        self.folder = parent / digest(what)[:16]
        self.what, self.count, self.shape = what, count, shape
        self.store = Store(self.folder)

    def present(self) -> int:
        """Return the number of samples on disk, without checking them."""
        try:
            return sum(chunk["rows"] for chunk in self.store.chunks().values())
        except DamagedError:
            return 0

    def fill(
        self,
        draw: Callable[[int, int], Tensor],
        skipped: Callable[[int], None] = lambda count: None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Draw the samples that are missing or damaged.

        Args:
            draw: (first, count) -> (count, C, H, W) uint8, the samples numbered from `first`.
            skipped: called with the number of samples that exist already.
            rank: rank of this process; each rank draws its own chunks.

        Raises:
            UserError: if the disk has not enough space.
        """
        if world == 1 and self.store.open_intact():
            skipped(self.count)
            return
        columns = {"images": ("|u1", self.shape)}
        with self.store.fill(self.what, columns, self.count, SIZE, rank, world) as filling:
            skipped(sum(chunk["rows"] for chunk in filling.present.values()))
            for chunk in filling.missing:
                images = draw(chunk.first, chunk.last - chunk.first)
                assert images.dtype == torch.uint8
                filling.add(chunk, {"images": images.numpy()})
            filling.finish()

    def images(self) -> Tensor:
        """Return all samples, (N, C, H, W) uint8, as a memory map; raise UserError if they are damaged."""
        try:
            return self.store.open().arrays["images"]
        except DamagedError as e:
            raise UserError(f"{e}; run the same command again to redraw them") from None
