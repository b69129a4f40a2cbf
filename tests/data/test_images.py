"""Custom images: folders, parquet files, splits, classes, and one-line errors."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import own_images
import pytest
import torch
from own_images import folder, load, numbers, pixels, png, table
from PIL import Image

from diffbench.core.files import cache_folder
from diffbench.data.images import CIFAR10Config, cifar10
from diffbench.data.places import locate


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFBENCH_CACHE", str(tmp_path / "cache"))


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    train, held_out = load(folder(tmp_path / "pets", {"dog": 6, "cat": 5}), held_out=3)
    assert train.class_names == held_out.class_names == ("cat", "dog")
    assert (train.num_classes, train.name, len(train), len(held_out)) == (2, "pets", 8, 3)
    assert train.images.shape == (8, 3, 8, 8) and train.images.dtype == torch.uint8
    for part in (train, held_out):  # images 0 to 5 are dogs
        assert [int(n < 6) for n in numbers(part)] == part.labels.tolist()
    assert sorted(numbers(train) + numbers(held_out)) == list(range(11))
    assert train.labels.dtype == torch.int64


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    train, held_out = load(folder(tmp_path / "flat", {"": 20}))
    assert (len(train), len(held_out)) == (18, 2)  # a tenth
    assert train.num_classes == 0 and train.class_names == ()
    assert set(train.labels.tolist()) == {0}
    nested, _ = load(folder(tmp_path / "one", {"all": 20}))  # a single folder is not a class
    assert nested.num_classes == 0
    unused, _ = load(folder(tmp_path / "pets", {"dog": 10, "cat": 10}), labels=False)
    assert unused.num_classes == 0


def test_folders_named_like_splits_are_splits(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", {"train/dog": 4, "train/cat": 4, "val/dog": 1, "val/cat": 2})
    train, held_out = load(root)
    assert (len(train), len(held_out), train.class_names) == (8, 3, ("cat", "dog"))
    assert held_out.labels.tolist() == [0, 0, 1]
    other, rest = load(root, split="validation", held_out=1)
    assert (len(other), len(rest)) == (2, 1)
    # A class may be named like a split.
    train, _ = load(folder(tmp_path / "b", {"bus": 10, "train": 10}))
    assert train.class_names == ("bus", "train")


def test_fewer_held_out_images_are_a_subset_of_more(tmp_path: Path) -> None:
    root = folder(tmp_path / "flat", {"": 20})
    first = numbers(load(root, held_out=5)[1])
    assert len(set(first)) == 5 and first != [0, 1, 2, 3, 4]
    assert sorted(first) == first  # in the order of the files
    assert set(numbers(load(root, held_out=3)[1])) <= set(first)


def test_parquet_files_are_read_by_split(tmp_path: Path) -> None:
    table(tmp_path / "p" / "train-00000.parquet", [0, 1, 2], label=[2, 0, 1])
    table(tmp_path / "p" / "train-00001.parquet", [3, 4], label=[1, 1])
    table(tmp_path / "p" / "test.parquet", [5, 6], label=[0, 2])
    train, held_out = load(tmp_path / "p")
    assert numbers(train) == [0, 1, 2, 3, 4] and train.labels.tolist() == [2, 0, 1, 1, 1]
    assert numbers(held_out) == [5, 6] and held_out.labels.tolist() == [0, 2]
    assert train.class_names == ("0", "1", "2")
    some, _ = load(tmp_path / "p" / "train-*.parquet", held_out=1)
    assert len(some) == 4
    one, _ = load(tmp_path / "p" / "train-00000.parquet", held_out=1, labels=False)
    assert len(one) == 2 and one.name == "train-00000"


def test_names_may_contain_glob_characters(tmp_path: Path) -> None:
    root = tmp_path / "photos [2020] *"
    table(root / "train.parquet", [0, 1, 2])
    table(root / "test [x]?.parquet", [3])
    train, held_out = load(root)
    assert (len(train), len(held_out), train.name) == (3, 1, "photos [2020] *")
    named, _ = load(folder(tmp_path / "im [1]", {"a{b}": 5, "c?": 6}))
    assert named.class_names == ("a{b}", "c?")


def test_labels_may_be_names(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", [0, 1, 2], label=["pear", "apple", "pear"])
    table(tmp_path / "test.parquet", [3], label=["apple"])
    train, held_out = load(tmp_path / "train.parquet", held_out=1)
    both, test = load(f"{tmp_path}/t*.parquet")
    assert both.class_names == ("apple", "pear") and both.labels.tolist() == [1, 0, 1] and test.labels.tolist() == [0]
    assert len(train) == 2 and len(held_out) == 1


def test_a_test_split_without_labels_is_skipped(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", [0, 1, 2], label=[0, 1, 0])
    table(tmp_path / "test.parquet", [3, 4], label=[-1, -1])
    table(tmp_path / "validation.parquet", [5], label=[1])
    _, held_out = load(tmp_path)
    assert numbers(held_out) == [5]


def test_columns_are_found_and_may_be_named(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", [0, 1, 2, 3], fine_label=[0, 1, 0, 1], number=[7, 7, 8, 9])
    assert load(tmp_path / "a.parquet", held_out=1)[0].class_names == ("0", "1")
    assert load(tmp_path / "a.parquet", held_out=1, label_column="number")[0].class_names == ("7", "8", "9")
    with pytest.raises(
        ValueError, match=r"^data\.label_column: no column 'lable'; choose from img, fine_label, number"
    ):
        load(tmp_path / "a.parquet", label_column="lable")
    with pytest.raises(ValueError, match=r"^data\.label_column: 'img' contains neither whole numbers nor names"):
        load(tmp_path / "a.parquet", label_column="img")
    with pytest.raises(ValueError, match=r"^data\.image_column: no column 'image'; choose from img"):
        load(tmp_path / "a.parquet", image_column="image")
    with pytest.raises(ValueError, match=r"^data\.split: no split 'tran'; choose from train; did you mean 'train'"):
        load(tmp_path / "a.parquet", split="tran")


def test_sizes_formats_and_channels_may_be_mixed(tmp_path: Path) -> None:
    root = tmp_path / "mixed"
    root.mkdir()
    Image.fromarray(own_images.pixels(0, 20, 30)).save(root / "a.jpg")
    Image.fromarray(own_images.pixels(1, 5, 7, 1)).save(root / "b.PNG")
    Image.fromarray(own_images.pixels(2, 8, 8, 4)).save(root / "c.webp")
    Image.fromarray(own_images.pixels(3, 9, 9)).quantize(8).save(root / "d.gif")
    (root / "notes.txt").write_text("no image")
    train, held_out = load(root, held_out=1)
    assert train.images.shape == (3, 3, 8, 8) and held_out.images.shape == (1, 3, 8, 8)
    grey, _ = load(root, held_out=1, channels=1, image_size=16)
    assert grey.images.shape == (3, 1, 16, 16)
    assert len(locate(str(root)).listing.skipped["other"]) == 1


def test_nothing_is_decoded_the_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "flat", {"": 12})
    first, _ = load(root)
    again, _ = load(root, num_workers=1, flip=True)  # neither changes a byte
    assert torch.equal(first.images, again.images)
    assert len(list(cache_folder().glob("images/*"))) == 1
    assert first.digest is not None
    assert dataclasses.replace(first, digest=None).fingerprint() == first.fingerprint() == first.digest
    (tmp_path / "elsewhere").mkdir()
    moved = root.rename(tmp_path / "elsewhere" / "flat")
    monkeypatch.setattr("diffbench.data.images.decode", None)
    assert load(moved)[0].fingerprint() == first.fingerprint()  # the same files in another place


def test_changed_files_are_decoded_again(tmp_path: Path) -> None:
    root = folder(tmp_path / "flat", {"": 12})
    before = load(root)[0].fingerprint()
    (root / "new.png").write_bytes(png(pixels(99)))
    assert load(root)[0].fingerprint() != before
    assert len(list(tmp_path.glob("cache/images/*"))) == 2
    deep = folder(tmp_path / "deep", {"train/cat": 5, "train/dog": 5})
    load(deep)
    (deep / "train" / "cat" / "005.png").write_bytes(png(pixels(99)))
    train, held_out = load(deep)
    assert len(train) + len(held_out) == 11
    (deep / "train" / "cat" / "005.png").write_bytes(png(pixels(98)))
    assert 98 in [number for part in load(deep) for number in numbers(part)]
    for first in (0, 10):
        train, held_out = load(table(tmp_path / "a.PARQUET", [first, first + 1]))
        assert sorted(numbers(train) + numbers(held_out)) == [first, first + 1]


def test_a_jpeg_copy_is_never_called_cifar10(tmp_path: Path) -> None:
    for name, kind in (("a", "PNG"), ("b", "JPEG")):
        root = tmp_path / name / "cifar10"
        root.mkdir(parents=True)
        for i in range(4):
            (root / f"{i}.img.png").write_bytes(png(pixels(i), kind))  # the suffix does not decide
    assert cifar10(CIFAR10Config(path=str(tmp_path / "a" / "cifar10"), image_size=8))[0].name == "cifar10"
    assert cifar10(CIFAR10Config(path=str(tmp_path / "b" / "cifar10"), image_size=8))[0].name == "cifar10-jpeg"


def test_cifar10_without_a_path_is_read_from_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^data\.path: CIFAR-10 is not on this machine; allowed: uoft-cs/cifar10"):
        cifar10(CIFAR10Config())
    table(tmp_path / "data" / "cifar10" / "train.parquet", [0, 1], label=[0, 1])
    table(tmp_path / "data" / "cifar10" / "test.parquet", [2], label=[1])
    train, held_out = cifar10(CIFAR10Config(image_size=8))
    assert (len(train), len(held_out), train.name) == (2, 1, "cifar10")


def test_a_new_modification_time_changes_the_cache_key(tmp_path: Path) -> None:
    root = folder(tmp_path / "flat", {"": 3})
    key = locate(str(root)).key
    assert locate(str(root)).key == key
    os.utime(root / "000.png", ns=(time.time_ns(), time.time_ns()))
    assert locate(str(root)).key != key


def fake_hub(monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[int]]) -> list[tuple[Any, ...]]:
    """Replace the hub by a fake one; return the list of calls made to it."""
    import datasets

    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog", "emu"]))
    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None = None) -> Any:
        calls.append((path, name))
        made = {}
        for split, chosen in splits.items():
            rows = {"img": [{"bytes": png(pixels(n)), "path": None} for n in chosen], "label": [n % 3 for n in chosen]}
            made[split] = datasets.Dataset.from_dict(rows, features=features)
        return datasets.DatasetDict(made)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    return calls


def test_an_unreachable_hub_is_queried_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for switch in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(switch, False)  # restored afterwards
    queries: list[str] = []

    def cut_off(_: Any, name: str, **__: Any) -> None:
        queries.append(name)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", cut_off)
    with pytest.raises(ValueError, match=r"nowhere is not a file or folder in .*, nor a hub name .*OfflineMode"):
        load("nowhere")
    assert queries == ["nowhere"]


def test_a_hub_data_set_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls = fake_hub(monkeypatch, {"train": [0, 1, 2, 3, 4], "test": [5, 6]})
    train, held_out = load("someone/animals", subset="small")
    assert (numbers(train), numbers(held_out)) == ([0, 1, 2, 3, 4], [5, 6])
    assert train.labels.tolist() == [0, 1, 2, 0, 1]
    assert (train.name, train.class_names) == ("animals", ("cat", "dog", "emu"))
    again, _ = load("someone/animals", subset="small", flip=True)
    assert again.fingerprint() == train.fingerprint()
    assert calls == [("someone/animals", "small")]


@pytest.mark.parametrize("word", ["valid", "dev", "validation"])
def test_a_held_out_split_of_the_hub_may_have_other_names(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_hub(monkeypatch, {"train": [0, 1, 2], word: [3, 4, 6], "train_more": [5]})
    train, held_out = load("someone/animals")
    assert (numbers(train), numbers(held_out)) == ([0, 1, 2], [3, 4, 6])
    assert len(load("someone/animals", split=word)[0]) == 2
    fake_hub(monkeypatch, {"train": [0, 1, 2], "val": [3, 4], "validation": [5]})
    assert numbers(load("someone/other")[1]) == [5]
    with pytest.raises(ValueError, match=r"^data\.split: no split 'x'; choose from train, val, validation"):
        load("someone/other", split="x")


def test_cifar10_is_downloaded_only_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls = fake_hub(monkeypatch, {"train": [0, 1, 2], "test": [3]})
    with pytest.raises(ValueError, match="CIFAR-10 is not on this machine"):
        cifar10(CIFAR10Config(image_size=8))
    assert not calls
    train, _ = cifar10(CIFAR10Config(path="uoft-cs/cifar10", image_size=8))
    again, _ = cifar10(CIFAR10Config(image_size=8))  # served from the cache
    assert (len(calls), again.name, again.fingerprint()) == (1, "cifar10", train.fingerprint())
