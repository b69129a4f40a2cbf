"""The order of training images, the digits and their split, and the conversion between uint8 pixels and floats."""

from itertools import islice

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from diffbench.core import rng
from diffbench.core.errors import UserError
from diffbench.core.pixels import from_uint8, to_uint8
from diffbench.data.datamodule import ImageDataModule, PositionDataset, PositionSampler
from diffbench.data.digits import DigitsConfig, digits
from diffbench.data.sets import ImageSet, balanced

LAYOUTS = pytest.mark.parametrize(("world", "accumulate"), [(w, a) for w in (1, 2, 4) for a in (1, 2)])


def numbered(count: int = 10, classes: int = 5) -> ImageSet:
    """Return images whose only pixel is their index."""
    images = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return ImageSet(images, torch.arange(count) % classes, classes)


def take_batches(module: ImageDataModule, batches: int) -> list[dict[str, Tensor]]:
    return list(islice(iter(module.train_dataloader()), batches))


def module(data: ImageSet, batch_size: int = 4, seed: int = 0, **options: int) -> ImageDataModule:
    return ImageDataModule(data, data, batch_size, seed, endless=True, **options)  # type: ignore[arg-type]


@LAYOUTS
def test_a_step_covers_the_same_positions_in_any_layout(world: int, accumulate: int) -> None:
    ranks = [iter(PositionSampler(16, accumulate, rank=rank, world=world)) for rank in range(world)]
    for step in range(3):
        micro = [next(rank) for rank in ranks for _ in range(accumulate)]
        assert {len(positions) for positions in micro} == {16 // (world * accumulate)}
        assert sorted(p for positions in micro for p in positions) == list(range(16 * step, 16 * step + 16))


@LAYOUTS
def test_a_later_start_yields_the_tail_of_the_full_sequence(world: int, accumulate: int) -> None:
    for rank in range(world):
        whole = PositionSampler(8, accumulate, 0, rank, world)
        tail = PositionSampler(8, accumulate, 24, rank, world)
        assert list(islice(whole, 3 * accumulate, 7 * accumulate)) == list(islice(tail, 4 * accumulate))


def test_iterating_a_sampler_again_starts_over() -> None:
    sampler = PositionSampler(4, start=8)
    assert list(islice(sampler, 2)) == list(islice(sampler, 2)) == [[8, 9, 10, 11], [12, 13, 14, 15]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((10, 4), "batch_size 10 must be a multiple of accumulate 4 x world 1"),
        ((8, 2, 0, 0, 3), "batch_size 8 must be a multiple of accumulate 2 x world 3"),
    ],
)
def test_a_batch_size_that_does_not_fit_the_layout_is_refused(arguments: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PositionSampler(*arguments)


def test_every_image_is_seen_once_per_epoch() -> None:
    index = PositionDataset(numbered(), seed=0).index(0, 50).reshape(5, 10)
    assert torch.equal(index.sort(dim=1).values, torch.arange(10).expand(5, 10))
    assert len({tuple(epoch) for epoch in index.tolist()}) == 5
    for epoch in range(5):
        assert torch.equal(index[epoch], rng.permutation(rng.key(0, "order", epoch), 10))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 25])
def test_the_order_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    whole = PositionDataset(numbered(), seed=3).index(0, 100)
    dataset = PositionDataset(numbered(), seed=3)  # 7 straddles epochs, 25 spans several
    parts = [dataset.index(positions[0], batch_size) for positions in islice(PositionSampler(batch_size), 4)]
    assert torch.equal(torch.cat(parts), whole[: 4 * batch_size])


def test_positions_can_be_read_in_any_order() -> None:
    dataset = PositionDataset(numbered(), seed=0)
    whole = dataset.index(0, 60)
    for first, count in ((59, 1), (0, 3), (31, 1), (9, 2), (10**9, 4), (38, 22), (0, 60)):
        fresh = PositionDataset(numbered(), seed=0).index(first, count)
        assert torch.equal(dataset.index(first, count), fresh)
        if first < 60:
            assert torch.equal(fresh, whole[first : first + count])


@pytest.mark.parametrize("positions", [[3, 2], [0, 2], [0, 2, 1, 3], [5, 5]])
def test_a_batch_of_non_consecutive_positions_is_refused(positions: list[int]) -> None:
    with pytest.raises(ValueError, match=r"positions of a batch must be consecutive, not \["):
        PositionDataset(numbered(), seed=0).__getitems__(positions)


def test_each_seed_gives_a_different_order() -> None:
    orders = [PositionDataset(numbered(), seed).index(0, 10).tolist() for seed in (0, 1, 2**32)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_batch_contains_images_labels_and_positions() -> None:
    data = numbered()
    batch = take_batches(module(data), 3)[2]  # positions 8 to 11, across the end of the first epoch
    index = PositionDataset(data, 0).index(8, 4)
    assert batch["position"].tolist() == [8, 9, 10, 11]
    assert torch.equal(batch["image"], data.images[index])
    assert torch.equal(batch["label"], data.labels[index])
    assert batch["image"].dtype == torch.uint8
    single = PositionDataset(data, 0).__getitems__([9])
    assert torch.equal(single["image"], batch["image"][1:2])


def test_a_module_resumes_at_the_position_in_its_state() -> None:
    whole = take_batches(module(numbered()), 6)
    again = module(numbered())
    state = {"samples_seen": 12, "data": numbered().fingerprint()}
    again.load_state_dict(state)
    for a, b in zip(whole[3:], take_batches(again, 3), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("image", "label", "position"))
    assert again.state_dict() == state


def test_a_module_refuses_the_state_of_other_data() -> None:
    state = module(numbered(11)).state_dict()
    with pytest.raises(
        UserError, match=r"^data: the run was started with other training data \(\w{16}, now \w{16}\); restore"
    ):
        module(numbered()).load_state_dict(state)


def test_overfitting_sees_only_the_first_batch() -> None:
    small = module(numbered().first(4))
    seen = torch.stack([batch["image"].flatten() for batch in take_batches(small, 5)])
    assert torch.equal(seen.sort(dim=1).values.long(), torch.arange(4).expand(5, 4))


@pytest.mark.parametrize(("bad", "text"), [(5, "0..5, allowed are 0..4"), (-1, "-1..4, allowed are 0..4")])
@pytest.mark.parametrize("part", ["training", "held-out"])
def test_labels_outside_the_classes_are_refused(part: str, bad: int, text: str) -> None:
    good = numbered()
    labels = good.labels.clone()
    labels[0 if bad < 0 else 4] = bad
    wrong = ImageSet(good.images, labels, 5)
    train, held_out = (wrong, good) if part == "training" else (good, wrong)
    with pytest.raises(ValueError, match=f"{part} labels lie in {text}"):
        ImageDataModule(train, held_out, 4)


def test_bytes_survive_the_round_trip_through_floats() -> None:
    every = torch.arange(256).to(torch.uint8)
    x = from_uint8(every)
    assert x.dtype == torch.float32
    assert (x[0].item(), x[255].item()) == (-1.0, 1.0)
    assert x.tolist() == pytest.approx([v / 127.5 - 1 for v in range(256)], abs=1e-7)
    assert torch.equal(to_uint8(x), every)


def test_floats_out_of_range_are_clamped_and_others_rounded() -> None:
    x = torch.tensor([-1e9, -1.5, -1.0, 1.0, 1.01, 2.0, 1e9])
    assert to_uint8(x).tolist() == [0, 0, 0, 255, 255, 255, 255]
    levels = torch.arange(256, dtype=torch.float64)
    for offset in (-0.49, 0.49):
        assert torch.equal(to_uint8((levels + offset) / 127.5 - 1).long(), torch.arange(256))
    assert to_uint8(torch.zeros(1, dtype=torch.bfloat16)).item() == 128  # 127.5 rounds up


def test_balanced_takes_the_first_of_each_class() -> None:
    labels = torch.tensor([2, 0, 1, 0, 2, 1, 0, 1, 2])
    assert balanced(labels, 3).tolist() == [1, 2, 0]
    assert balanced(labels, 5).tolist() == [1, 3, 2, 5, 0]  # the lowest class numbers get the remainder
    assert balanced(labels, 9).tolist() == [1, 3, 6, 2, 5, 7, 0, 4, 8]
    assert labels[balanced(labels, 6)].bincount().tolist() == [2, 2, 2]


def test_balanced_returns_fewer_images_if_a_class_runs_out() -> None:
    assert balanced(torch.tensor([0, 0, 0, 0, 1]), 4).tolist() == [0, 1, 4]


@pytest.mark.parametrize("held_out", [10, 360, 1000])
def test_digits_split_into_stratified_parts_that_make_up_the_whole(held_out: int) -> None:
    train, test = digits(DigitsConfig(held_out))
    assert (len(train), len(test)) == (1797 - held_out, held_out)
    assert train.images.shape[1:] == (1, 8, 8)
    assert train.images.dtype == torch.uint8
    bunch = load_digits()

    def rows(images: Tensor, labels: Tensor) -> list[tuple[int, ...]]:
        return sorted(map(tuple, torch.cat([images.flatten(1).long(), labels[:, None]], dim=1).tolist()))

    grey = torch.tensor([round(level * 255 / 16) for level in range(17)])
    original = grey[torch.from_numpy(bunch.images).long()]
    both = torch.cat([train.images, test.images]), torch.cat([train.labels, test.labels])
    assert rows(*both) == rows(original, torch.from_numpy(bunch.target))
    share = torch.from_numpy(bunch.target).bincount() * held_out / 1797
    assert (test.labels.bincount(minlength=10) - share).abs().max() < 1


def test_no_held_out_digit_is_in_the_training_part() -> None:
    train, test = digits(DigitsConfig())
    distance = torch.cdist(test.images.flatten(1).double(), train.images.flatten(1).double())
    assert distance.min() > 1


def test_digits_never_change() -> None:
    train, test = digits(DigitsConfig())
    assert (train.fingerprint(), test.fingerprint()) == ("7531db42dd3ff2d2", "a2fc2790f951761e")


def test_a_fingerprint_depends_on_pixels_and_labels() -> None:
    data = numbered()
    images, labels = data.images.clone(), data.labels.clone()
    images[3], labels[3] = 99, 0
    prints = {data.fingerprint(), ImageSet(images, data.labels, 5).fingerprint()}
    prints.add(ImageSet(data.images, labels, 5).fingerprint())
    assert len(prints) == 3
    assert all(len(p) == 16 for p in prints)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"held_out": 9}, r"data\.held_out: must lie in 10 to 1000, got 9"),
        ({"held_out": 1001}, r"data\.held_out: must lie in 10 to 1000, got 1001"),
        ({"num_workers": -1}, r"data\.num_workers: must be at least 0, got -1"),
    ],
)
def test_digits_options_out_of_range_are_refused(options: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DigitsConfig(**options)
