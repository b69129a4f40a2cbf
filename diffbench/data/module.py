"""The position-indexed loader: which image comes when is a function of (seed, position), so any run can start
anywhere and two backbones with one seed see the same images in the same order."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from diffbench.core import keyed
from diffbench.core.pixels import from_uint8
from diffbench.data.sources import ImageSet


class PositionSampler(Sampler[list[int]]):
    """Endless micro-batches of positions, starting anywhere.

    Optimizer step s of any process layout covers the positions [s * batch_size, (s + 1) * batch_size).

    Args:
        batch_size: images of an optimizer step, over all ranks and micro-batches.
        accumulate: micro-batches in a step, on each rank.
        start: first position, a multiple of batch_size.
        rank: this process.
        world: number of processes.
    """

    def __init__(self, batch_size: int, accumulate: int = 1, start: int = 0, rank: int = 0, world: int = 1) -> None:
        if batch_size % (accumulate * world):
            raise ValueError(f"batch_size {batch_size} must be a multiple of accumulate {accumulate} x world {world}")
        if start % batch_size:
            raise ValueError(f"start {start} must be a multiple of batch_size {batch_size}")
        self.micro = batch_size // (accumulate * world)
        self.start, self.rank, self.world = start, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.micro
        while True:
            yield list(range(first, first + self.micro))
            first += self.micro * self.world


class PositionDataset(Dataset[dict[str, Tensor]]):
    """Fetches whole batches by position; the order of epoch e is a permutation keyed by (seed, "order", e)."""

    def __init__(self, data: ImageSet, seed: int) -> None:
        self.data, self.seed = data, seed
        self._orders: dict[int, Tensor] = {}

    def index(self, positions: Tensor) -> Tensor:
        """Image numbers (B,) at positions (B,), which count all samples seen since the start."""
        epochs = positions // len(self.data)
        first, last = int(epochs.min()), int(epochs.max())
        self._orders = {e: self._orders[e] if e in self._orders else self._order(e) for e in range(first, last + 1)}
        orders = torch.stack([self._orders[e] for e in range(first, last + 1)])
        return orders[epochs - first, positions % len(self.data)]

    def _order(self, epoch: int) -> Tensor:
        return keyed.permutation(keyed.key(self.seed, "order", epoch), len(self.data))

    def __getitems__(self, positions: list[int]) -> dict[str, Tensor]:
        """A batch: image (B, C, H, W) uint8, label (B,), position (B,)."""
        position = torch.tensor(positions)
        index = self.index(position)
        return {"image": self.data.images[index], "label": self.data.labels[index], "position": position}

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return self.__getitems__([position])


@dataclass
class ImageDataModule(L.LightningDataModule):
    """Training batches by position, and the held-out part.

    What training gets of a batch: x0 (B, C, H, W) float32 in [-1, 1], label (B,), position (B,), on its device.
    Its state in a checkpoint is the number of samples seen, which is where a resumed run goes on.
    """

    train: ImageSet
    held_out: ImageSet
    seed: int
    batch_size: int
    accumulate: int = 1
    num_workers: int = 0
    only_first_batch: bool = False
    """Train on the first `batch_size` images only (debug=overfit)."""

    def __post_init__(self) -> None:
        super().__init__()
        self.samples_seen = 0
        if self.only_first_batch:
            first = self.train
            self.train = replace(first, images=first.images[: self.batch_size], labels=first.labels[: self.batch_size])
        for name, part in (("training", self.train), ("held-out", self.held_out)):
            low, high = int(part.labels.min()), int(part.labels.max())
            if low < 0 or high >= part.num_classes:
                raise ValueError(f"{name} labels lie in {low}..{high}, allowed are 0..{part.num_classes - 1}")

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = PositionSampler(self.batch_size, self.accumulate, self.samples_seen, rank, world)
        return DataLoader(
            PositionDataset(self.train, self.seed),
            batch_sampler=sampler,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Bytes travel to the device and become numbers there."""
        return {"x0": from_uint8(batch["image"]), "label": batch["label"], "position": batch["position"]}

    def state_dict(self) -> dict[str, Any]:
        return {"samples_seen": self.trainer.global_step * self.batch_size if self.trainer else self.samples_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples_seen = state_dict["samples_seen"]


def _as_is(batch: Any) -> Any:
    return batch
