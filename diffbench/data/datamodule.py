"""The position-indexed loader: which image comes when is a function of (seed, position), so any run can start
anywhere and two backbones with one seed see the same images in the same order."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from diffbench.core import rng
from diffbench.core.pixels import from_uint8
from diffbench.data.facts import other_data
from diffbench.data.latents import LatentSet
from diffbench.data.sets import ImageSet


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


class PositionDataset(Dataset[dict[str, Any]]):
    """Fetches batches by position; the order of epoch e is a permutation keyed by (seed, "order", e).

    Args:
        data: what batches are made of.
        seed: of the order.
        flip: whether batches say which images are to be mirrored, half of them, drawn anew each epoch.
        only_index: whether batches hold image numbers alone, for a set that is on the device already.
    """

    def __init__(self, data: ImageSet | LatentSet, seed: int, flip: bool = False, only_index: bool = False) -> None:
        self.data, self.seed, self.flip, self.only_index = data, seed, flip, only_index

    def index(self, first: int, count: int) -> Tensor:
        """Image numbers (count,) from the position `first` on; positions count all samples seen since the start."""
        size, end = len(self.data), first + count
        epochs = range(first // size, (end - 1) // size + 1)
        orders = [_order(self.seed, epoch, size) for epoch in epochs]
        start = first - epochs[0] * size
        return (orders[0] if len(orders) == 1 else torch.cat(orders))[start : start + count]

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        """A batch of consecutive positions: `first`, position (B,), and what the set gives of its images.

        That is image (B, C, H, W) uint8 and label (B,), or mean, log-variance and label; or index (B,) alone.

        Raises:
            ValueError: if the positions are not consecutive.
        """
        first, count = positions[0], len(positions)
        if positions != list(range(first, first + count)):
            raise ValueError(f"positions of a batch must be consecutive, not {positions}")
        position, index = torch.arange(first, first + count), self.index(first, count)
        batch = {"first": first, "position": position}
        batch |= {"index": index} if self.only_index else self.data.gather(index)
        if self.flip:
            batch["flipped"] = rng.uniform(rng.key(self.seed, "flip"), position) < 0.5
        return batch

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.__getitems__([position])


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int) -> Tensor:
    """The order of an epoch's images: the number of the image at each of `count` positions."""
    return rng.permutation(rng.key(seed, "order", epoch), count)


class PositionDataModule(L.LightningDataModule):
    """Training batches by position, and the held-out part: the base of image and latent data.

    A training batch holds x0 (B, C, H, W) float32, label (B,) and position (B,) on its device, and `first`, the first
    position as a number, as reading it from a GPU would wait for the GPU.
    The state in a checkpoint is the number of samples seen, where a resumed run goes on, and the data's fingerprint.

    Args:
        train: the part to train on.
        held_out: the other.
        seed: of the run; with a sample's position it fixes which image it is and how it is drawn.
        batch_size: images of an optimizer step.
        accumulate: micro-batches in a step.
        num_workers: loader processes.
        only_first_batch: train on the first `batch_size` images only (debug=overfit).
        flip: mirror half of the training images, drawn anew each epoch.
        data_on_device: keep the training part on the device; None: on a GPU with four times the room.
    """

    def __init__(
        self,
        train: ImageSet | LatentSet,
        held_out: ImageSet | LatentSet,
        seed: int,
        batch_size: int,
        accumulate: int = 1,
        num_workers: int = 0,
        only_first_batch: bool = False,
        flip: bool = False,
        data_on_device: bool | None = None,
    ) -> None:
        super().__init__()
        self.train = train.first(batch_size) if only_first_batch else train
        self.held_out, self.seed, self.flip = held_out, seed, flip
        self.batch_size, self.accumulate, self.num_workers = batch_size, accumulate, num_workers
        self.data_on_device = data_on_device
        self.samples_seen = 0
        self._on_device: Any = None
        for name, part in (("training", self.train), ("held-out", held_out)):
            low, high, classes = int(part.labels.min()), int(part.labels.max()), max(1, part.num_classes)
            if low < 0 or high >= classes:
                raise ValueError(f"{name} labels lie in {low}..{high}, allowed are 0..{classes - 1}")

    def x0(self, batch: dict[str, Any]) -> Tensor:
        """What a batch on the device trains on, (B, C, H, W) float32; its `flipped` (B,) says which to mirror."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = PositionSampler(self.batch_size, self.accumulate, self.samples_seen, rank, world)
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        on_device = _fits(self.train, device) if self.data_on_device is None else self.data_on_device
        self._on_device = self.train.to(device) if on_device else None
        return DataLoader(
            PositionDataset(self.train, self.seed, self.flip, only_index=on_device),
            batch_sampler=sampler,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Bytes travel to the device, or lie there, and become numbers there."""
        if "index" in batch:
            batch = batch | self._on_device.gather(batch["index"])
        kept: dict[str, Any] = {name: batch[name] for name in ("label", "position", "first") if name in batch}
        return {"x0": self.x0(batch), **kept}

    def state_dict(self) -> dict[str, Any]:
        seen = self.trainer.global_step * self.batch_size if self.trainer else self.samples_seen
        return {"samples_seen": seen, "data": self.train.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before, now = state_dict["data"], self.train.fingerprint()
        if before != now:
            raise other_data(f"{before}, now {now}")
        self.samples_seen = state_dict["samples_seen"]


class ImageDataModule(PositionDataModule):
    """Images: x0 holds pixels in [-1, 1]."""

    def x0(self, batch: dict[str, Any]) -> Tensor:
        images = batch["image"]
        if self.flip:
            # All bits or none: four times as fast as where.
            chosen = -batch["flipped"].to(torch.uint8)[:, None, None, None]
            images = images ^ ((images ^ images.flip(-1)) & chosen)
        return from_uint8(images)


class LatentDataModule(PositionDataModule):
    """Latents of images: x0 is drawn from each one's posterior, anew each epoch, and scaled to about unit variance."""

    train: LatentSet

    def x0(self, batch: dict[str, Any]) -> Tensor:
        mean, log_variance = batch["mean"], batch["log_variance"]
        if self.flip:
            mirror = batch["flipped"][:, None, None, None]
            mean = torch.where(mirror, batch["flipped_mean"], mean)
            log_variance = torch.where(mirror, batch["flipped_log_variance"], log_variance)
        noise = rng.normal(rng.key(self.seed, "posterior"), batch["position"], tuple(mean.shape[1:]))
        return self.train.scaled(mean.float() + (0.5 * log_variance.float()).exp() * noise)


def _fits(data: ImageSet | LatentSet, device: torch.device) -> bool:
    """Whether a set may stay on a GPU: it must leave three quarters of what is free."""
    return device.type == "cuda" and 4 * data.nbytes <= torch.cuda.mem_get_info(device)[0]


def _as_is(batch: Any) -> Any:
    return batch
