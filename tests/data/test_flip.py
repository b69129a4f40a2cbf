"""Mirrored images, and data sets stored on the device."""

import dataclasses
from itertools import islice

import torch
from own_images import squares

from diffbench.core import rng
from diffbench.core.pixels import from_uint8
from diffbench.data.datamodule import ImageDataModule
from diffbench.data.sets import ImageSet, take_rows


def batches(seed: int = 0, count: int = 13, **options: bool) -> dict[str, torch.Tensor]:
    module = ImageDataModule(squares(), squares(), 8, seed, endless=True, **options)  # type: ignore[arg-type]
    found = [module.on_after_batch_transfer(b, 0) for b in islice(module.train_dataloader(), count)]
    return {key: torch.cat([b[key] for b in found]) for key in found[0] if key != "first"}


def test_half_of_the_images_are_mirrored_depending_on_seed_and_position() -> None:
    plain, mixed = batches(), batches(flip=True)
    flipped = rng.uniform(rng.key(0, "flip"), torch.arange(104)) < 0.5
    assert 30 < int(flipped.sum()) < 74
    assert torch.equal(mixed["x0"], torch.where(flipped[:, None, None, None], plain["x0"].flip(-1), plain["x0"]))
    assert torch.equal(mixed["label"], plain["label"])
    assert torch.equal(mixed["x0"], batches(flip=True)["x0"])
    assert not torch.equal(mixed["x0"], batches(seed=1, flip=True)["x0"])


def test_mirroring_is_drawn_again_each_epoch() -> None:
    module = ImageDataModule(squares(), batch_size=50, flip=True, endless=True)
    epochs = [module.on_after_batch_transfer(b, 0)["x0"] for b in islice(module.train_dataloader(), 8)]
    dataset = module.train_dataloader().dataset
    first = from_uint8(squares().images[0])
    mirrored = []
    for epoch, x0 in enumerate(epochs):
        where = int((dataset.index(50 * epoch, 50) == 0).nonzero())  # type: ignore[attr-defined]
        mirrored.append(bool(torch.equal(x0[where], first.flip(-1))))
        assert mirrored[-1] or torch.equal(x0[where], first)
    assert set(mirrored) == {False, True}


def test_a_data_set_on_the_device_gives_the_same_batches() -> None:
    for flip in (False, True):
        one, two = batches(flip=flip), batches(flip=flip, data_on_device=True)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    module = ImageDataModule(squares(), batch_size=8, data_on_device=True)
    assert set(next(iter(module.train_dataloader()))) == {"first", "position", "index"}


def test_images_without_classes_are_labelled_zero() -> None:
    data = dataclasses.replace(squares(), labels=torch.zeros(50, dtype=torch.int64), num_classes=0)
    module = ImageDataModule(data, batch_size=8)
    assert next(iter(module.train_dataloader()))["label"].tolist() == [0] * 8


def test_take_rows_returns_copies() -> None:
    index = torch.tensor([3, 1, 3])
    for array in (squares().images, squares().labels, torch.randn(5, 2).half()):
        got = take_rows(array, index)
        assert torch.equal(got, array[index]) and got.dtype == array.dtype
        got.zero_()
        assert torch.equal(take_rows(array, index), array[index]) and array[index].any()


def test_a_balanced_subset_has_equally_many_images_of_each_class() -> None:
    data = squares(50, classes=5)
    part = data.balanced_subset(20)
    assert part.labels.bincount().tolist() == [4] * 5
    assert isinstance(part, ImageSet) and part.digest is None and part.name == "squares"
    assert data.balanced_subset(50) is data
