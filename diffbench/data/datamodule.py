"""The position-indexed loader: which image comes when is a function of (seed, position), so that a run can start at any
position, and two backbones with the same seed see the same images in the same order."""

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from diffbench.core import distributed, rng
from diffbench.core.pixels import from_uint8
from diffbench.data.batches import AnyDataset, image_set, latent_set
from diffbench.data.facts import other_data
from diffbench.data.latents import LatentSet
from diffbench.data.sets import ImageSet


class PositionSampler(Sampler[list[int]]):
    """Sampler of micro-batches of positions, starting at any position.

    In any process layout, optimizer step s covers the positions [s * batch_size, (s + 1) * batch_size).

    Args:
        batch_size: images per optimizer step, over all ranks and micro-batches.
        accumulate: micro-batches per step on each rank.
        start: first position of the next iteration.
        steps: optimizer steps per iteration; None for no end.
    """

    def __init__(
        self,
        batch_size: int,
        accumulate: int = 1,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        steps: int | None = None,
    ) -> None:
        if batch_size % (accumulate * world):
            raise ValueError(f"batch_size {batch_size} must be a multiple of accumulate {accumulate} x world {world}")
        self.micro = batch_size // (accumulate * world)
        self.start, self.rank, self.world = start, rank, world
        self.batches = None if steps is None else steps * accumulate

    def __len__(self) -> int:
        if self.batches is None:
            raise TypeError("positions have no end")
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.micro
        for _ in itertools.count() if self.batches is None else range(self.batches):
            yield list(range(first, first + self.micro))
            first += self.micro * self.world


class PositionLoader:
    """Wrapper of a DataLoader that hides it from Lightning, which would replace our sampler with its own."""

    def __init__(self, loader: DataLoader[dict[str, Any]]) -> None:
        self.loader, self.dataset = loader, loader.dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: the data module stores the position, but Lightning asks a resumable loader for one."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


class PositionDataset(Dataset[dict[str, Any]]):
    """Data set with batches by position; the order of epoch e is a permutation keyed by (seed, "order", e).

    Args:
        flip: whether batches say which images to mirror: half of them, redrawn each epoch.
        only_index: whether batches contain only image indices, for a set that is already on the device.
    """

    def __init__(self, data: ImageSet | LatentSet, seed: int, flip: bool = False, only_index: bool = False) -> None:
        self.data, self.seed, self.flip, self.only_index = data, seed, flip, only_index

    def index(self, first: int, count: int) -> Tensor:
        """Return image indices (count,) for the positions from `first` on, which count all samples since the start."""
        size, end = len(self.data), first + count
        epochs = range(first // size, (end - 1) // size + 1)
        orders = [_order(self.seed, epoch, size) for epoch in epochs]
        start = first - epochs[0] * size
        return (orders[0] if len(orders) == 1 else torch.cat(orders))[start : start + count]

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        """Return the batch at consecutive positions: `first`, position (B,), and the data set's entries for its images.

        Those are image (B, C, H, W) uint8 and label (B,), or mean, log_variance and label; or only index (B,).

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


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int) -> Tensor:
    """Return the order of an epoch: the index of the image at each of `count` positions."""
    return rng.permutation(rng.key(seed, "order", epoch), count)


class PositionDataModule(L.LightningDataModule):
    """Base class of the data modules for images and latents: training batches by position, and a held-out part.

    A training batch has x0 (B, C, H, W) float32, label (B,) and position (B,) on its device, and `first`, the first
    position as an int, because reading it from a GPU would wait for the GPU. A held-out batch has x0, label and index,
    the indices of its images. `DiffusionModule` reads both, and so can any other LightningModule.

    Positions count the images seen since training began, over all epochs and fits, so no two batches are alike, and a
    checkpoint resumes with the very next image, in any layout of devices and micro-batches. An epoch is as many whole
    optimizer steps as it takes to see each image once. With `overfit_batches`, the first batches repeat, at ever new
    positions. The state in a checkpoint is the number of samples seen and the data's fingerprint.

    Args:
        train: the training part.
        held_out: the held-out part, for `validate`, `test` and `predict`; None for none.
        batch_size: images per optimizer step, over all devices and micro-batches.
        seed: seed of the run; with a position, it determines which image comes and how its flip and latent are drawn.
        num_workers: DataLoader processes.
        flip: mirror half of the training images, redrawn each epoch.
        data_on_device: keep the training part on the device; None does so on a GPU with four times the memory needed.
        endless: never end an epoch, for trainers that only count steps.
    """

    def __init__(
        self,
        train: ImageSet | LatentSet | AnyDataset,
        held_out: ImageSet | LatentSet | AnyDataset | None = None,
        batch_size: int = 128,
        seed: int = 0,
        num_workers: int = 0,
        flip: bool = False,
        data_on_device: bool | None = None,
        endless: bool = False,
    ) -> None:
        super().__init__()
        self.train = self.read(train)
        self.held_out = None if held_out is None else self.read(held_out)
        self.seed, self.flip = seed, flip
        self.batch_size, self.num_workers = batch_size, num_workers
        self.data_on_device, self.endless = data_on_device, endless
        self.samples_seen = 0
        self._sampler: PositionSampler | None = None
        self._on_device: Any = None
        if flip and getattr(self.train, "flipped_mean", self.train) is None:
            raise ValueError("flip: these latents have no mirrored ones; encode with flip=True, or leave it out")
        if held_out is None:  # Lightning must see these loaders as not defined
            for loader in ("val_dataloader", "test_dataloader", "predict_dataloader"):
                setattr(self, loader, getattr(super(), loader))
        _check_labels("training", self.train)
        if self.held_out is not None:
            _check_labels("held-out", self.held_out)

    __str__ = object.__repr__  # Lightning's version treats our loaders as collections

    def read(self, data: Any) -> Any:
        """Read a data set into memory."""
        raise NotImplementedError

    def x0(self, batch: dict[str, Any]) -> Tensor:
        """Return a batch's images or latents (B, C, H, W) float32 on its device, those in `flipped` (B,) mirrored."""
        raise NotImplementedError

    def train_dataloader(self) -> PositionLoader:
        trainer, part = self.trainer, self.train
        rank, world, accumulate, device = 0, 1, 1, torch.device("cpu")
        if trainer is not None:
            rank, world, device = trainer.global_rank, trainer.world_size, trainer.strategy.root_device
            accumulate = int(trainer.accumulate_grad_batches)
            if repeated := trainer.overfit_batches:  # type: ignore[attr-defined]
                micro = self.batch_size // accumulate
                part = part.first(repeated * micro if isinstance(repeated, int) else round(repeated * len(part)))
        steps = None if self.endless else -(-len(self.train) // self.batch_size)
        self._sampler = PositionSampler(self.batch_size, accumulate, self.samples_seen, rank, world, steps)
        on_device = _fits(part, device) if self.data_on_device is None else self.data_on_device
        self._on_device = part.to(device) if on_device else None
        return PositionLoader(
            DataLoader(
                PositionDataset(part, self.seed, self.flip, only_index=on_device),
                batch_sampler=self._sampler,
                collate_fn=dict,
                num_workers=self.num_workers,
                pin_memory=torch.cuda.is_available(),
            )
        )

    def val_dataloader(self) -> Any:
        """Return the held-out part in batches, in order; with several ranks, each reads a slice."""
        assert self.held_out is not None
        return HeldOut(self.held_out, self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Convert a batch to x0 on the device, so that only bytes or indices have to be transferred."""
        if "x0" in batch:
            return batch
        if "index" in batch:
            batch = batch | self._on_device.gather(batch["index"])
        if (s := self._sampler) is not None and "first" in batch:
            self.samples_seen = s.start = batch["first"] + s.micro * (s.world - s.rank)
        kept: dict[str, Any] = {name: batch[name] for name in ("label", "position", "first") if name in batch}
        return {"x0": self.x0(batch), **kept}

    def state_dict(self) -> dict[str, Any]:
        return {"samples_seen": self.samples_seen, "data": self.train.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before, now = state_dict["data"], self.train.fingerprint()
        if before != now:
            raise other_data(f"{before}, now {now}")
        self.samples_seen = state_dict["samples_seen"]


class ImageDataModule(PositionDataModule):
    """Data module for images: x0 contains pixels in [-1, 1].

    `train` and `held_out` may be any torch Dataset, whose images are read into memory, see `image_set`. For a set that
    does not fit, pass your own DataLoader to `DiffusionModule`. Arguments as for `PositionDataModule`.
    """

    read = staticmethod(image_set)

    def x0(self, batch: dict[str, Any]) -> Tensor:
        images = batch["image"]
        if self.flip:
            # The mask has all bits set or none, which is four times as fast as torch.where.
            chosen = -batch["flipped"].to(torch.uint8)[:, None, None, None]
            images = images ^ ((images ^ images.flip(-1)) & chosen)
        return from_uint8(images)


class LatentDataModule(PositionDataModule):
    """Data module for latents: x0 is drawn from each image's posterior in each epoch and scaled to about unit variance.

    `train` and `held_out` may be any torch Dataset of latents, which are read into memory, see `latent_set`.
    """

    train: LatentSet

    read = staticmethod(latent_set)

    def x0(self, batch: dict[str, Any]) -> Tensor:
        mean, log_variance = batch["mean"], batch["log_variance"]
        if self.flip:
            mirror = batch["flipped"][:, None, None, None]
            mean = torch.where(mirror, batch["flipped_mean"], mean)
            log_variance = torch.where(mirror, batch["flipped_log_variance"], log_variance)
        noise = rng.normal(rng.key(self.seed, "posterior"), batch["position"], tuple(mean.shape[1:]))
        return self.train.scaled(mean.float() + (0.5 * log_variance.float()).exp() * noise)


class HeldOut:
    """Held-out batches of x0 (the validation targets), label and index; with several ranks, each gets a slice."""

    def __init__(self, data: ImageSet | LatentSet, batch_size: int) -> None:
        self.data, self.slices = data, distributed.rank_slice(len(data)).split(batch_size)

    def __len__(self) -> int:
        return len(self.slices)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index in self.slices:
            yield {"x0": self.data.clean(index), "label": self.data.labels[index], "index": index}


def _check_labels(name: str, part: ImageSet | LatentSet) -> None:
    low, high, classes = int(part.labels.min()), int(part.labels.max()), max(1, part.num_classes)
    if low < 0 or high >= classes:
        raise ValueError(f"{name} labels lie in {low}..{high}, allowed are 0..{classes - 1}")


def _fits(data: ImageSet | LatentSet, device: torch.device) -> bool:
    return device.type == "cuda" and 4 * data.nbytes <= torch.cuda.mem_get_info(device)[0]
