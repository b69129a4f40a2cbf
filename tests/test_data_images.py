"""Own images: folders, parquet files, splits, classes, and what is refused in one line."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import own_images
import pytest
import torch
from own_images import folder, pixels, png, table
from PIL import Image

from diffbench.core.files import cache_folder
from diffbench.data import store
from diffbench.data.images import CIFAR10Config, ImagesConfig, cifar10, images
from diffbench.data.places import locate
from diffbench.data.sets import ImageSet


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFBENCH_CACHE", str(tmp_path / "cache"))


def load(path: Path | str, **options: Any) -> tuple[ImageSet, ImageSet]:
    return images(ImagesConfig(path=str(path), **{"image_size": 8, **options}))


def numbers(data: ImageSet, count: int = 200) -> list[int]:
    """Which of own_images.pixels each image is."""
    known = {pixels(n).transpose(2, 0, 1).tobytes(): n for n in range(count)}
    return [known[image.numpy().tobytes()] for image in data.images]


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    train, held_out = load(folder(tmp_path / "pets", {"dog": 6, "cat": 5}), held_out=3)
    assert train.classes == held_out.classes == ("cat", "dog")
    assert (train.num_classes, train.name, len(train), len(held_out)) == (2, "pets", 8, 3)
    assert train.images.shape == (8, 3, 8, 8) and train.images.dtype == torch.uint8
    for part in (train, held_out):  # images 0 to 5 are dogs
        assert [int(n < 6) for n in numbers(part)] == part.labels.tolist()
    assert sorted(numbers(train) + numbers(held_out)) == list(range(11))
    assert train.labels.dtype == torch.int64


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    train, held_out = load(folder(tmp_path / "flat", {"": 20}))
    assert (len(train), len(held_out)) == (18, 2)  # a tenth
    assert train.num_classes == 0 and train.classes == ()
    assert set(train.labels.tolist()) == {0}
    nested, _ = load(folder(tmp_path / "one", {"all": 20}))  # one folder is no class
    assert nested.num_classes == 0
    unused, _ = load(folder(tmp_path / "pets", {"dog": 10, "cat": 10}), labels=False)
    assert unused.num_classes == 0


def test_folders_named_like_splits_are_splits(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", {"train/dog": 4, "train/cat": 4, "val/dog": 1, "val/cat": 2})
    train, held_out = load(root)
    assert (len(train), len(held_out), train.classes) == (8, 3, ("cat", "dog"))
    assert held_out.labels.tolist() == [0, 0, 1]
    other, rest = load(root, split="validation", held_out=1)
    assert (len(other), len(rest)) == (2, 1)
    # A class may be named like a split.
    train, _ = load(folder(tmp_path / "b", {"bus": 10, "train": 10}))
    assert train.classes == ("bus", "train")


def test_the_held_out_images_are_the_same_whatever_the_rest(tmp_path: Path) -> None:
    root = folder(tmp_path / "flat", {"": 20})
    first = numbers(load(root, held_out=5)[1])
    assert len(set(first)) == 5 and first != [0, 1, 2, 3, 4]
    assert sorted(first) == first  # in the order of the files
    assert set(numbers(load(root, held_out=3)[1])) <= set(first)


def test_parquet_files(tmp_path: Path) -> None:
    table(tmp_path / "p" / "train-00000.parquet", [0, 1, 2], label=[2, 0, 1])
    table(tmp_path / "p" / "train-00001.parquet", [3, 4], label=[1, 1])
    table(tmp_path / "p" / "test.parquet", [5, 6], label=[0, 2])
    train, held_out = load(tmp_path / "p")
    assert numbers(train) == [0, 1, 2, 3, 4] and train.labels.tolist() == [2, 0, 1, 1, 1]
    assert numbers(held_out) == [5, 6] and held_out.labels.tolist() == [0, 2]
    assert train.classes == ("0", "1", "2")
    some, _ = load(tmp_path / "p" / "train-*.parquet", held_out=1)
    assert len(some) == 4
    one, _ = load(tmp_path / "p" / "train-00000.parquet", held_out=1)
    assert len(one) == 2 and one.name == "train-00000"


def test_labels_may_be_names(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", [0, 1, 2], label=["pear", "apple", "pear"])
    table(tmp_path / "test.parquet", [3], label=["apple"])
    train, held_out = load(tmp_path / "train.parquet", held_out=1)
    both, test = load(f"{tmp_path}/t*.parquet")
    assert both.classes == ("apple", "pear") and both.labels.tolist() == [1, 0, 1] and test.labels.tolist() == [0]
    assert len(train) == 2 and len(held_out) == 1


def test_a_test_split_without_labels_is_passed_over(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", [0, 1, 2], label=[0, 1, 0])
    table(tmp_path / "test.parquet", [3, 4], label=[-1, -1])
    table(tmp_path / "validation.parquet", [5], label=[1])
    _, held_out = load(tmp_path)
    assert numbers(held_out) == [5]


def test_columns_are_found_and_may_be_named(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", [0, 1, 2, 3], fine_label=[0, 1, 0, 1], number=[7, 7, 8, 9])
    assert load(tmp_path / "a.parquet", held_out=1)[0].classes == ("0", "1")
    assert load(tmp_path / "a.parquet", held_out=1, label_column="number")[0].classes == ("7", "8", "9")
    with pytest.raises(
        ValueError, match=r"^data\.label_column: no column 'lable'; choose from img, fine_label, number"
    ):
        load(tmp_path / "a.parquet", label_column="lable")
    with pytest.raises(ValueError, match=r"^data\.label_column: 'img' holds neither whole numbers nor names"):
        load(tmp_path / "a.parquet", label_column="img")
    with pytest.raises(ValueError, match=r"^data\.image_column: no column 'image'; choose from img"):
        load(tmp_path / "a.parquet", image_column="image")
    with pytest.raises(ValueError, match=r"^data\.split: no split 'tran'; choose from train; did you mean 'train'"):
        load(tmp_path / "a.parquet", split="tran")


def test_other_sizes_kinds_and_channels(tmp_path: Path) -> None:
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
    assert locate(str(root)).ignored == 1


def test_the_second_time_nothing_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "flat", {"": 12})
    first, _ = load(root)
    again, _ = load(root, num_workers=1, flip=True)  # neither changes a byte
    assert torch.equal(first.images, again.images)
    assert len(list(cache_folder().glob("images/*"))) == 1
    assert first.digest is not None
    assert dataclasses.replace(first, digest=None).fingerprint() == first.fingerprint() == first.digest
    (tmp_path / "elsewhere").mkdir()
    moved = root.rename(tmp_path / "elsewhere" / "flat")
    monkeypatch.setattr("diffbench.data.decoding.decode", None)
    assert load(moved)[0].fingerprint() == first.fingerprint()  # the same files at another place


def test_changed_files_are_decoded_anew(tmp_path: Path) -> None:
    root = folder(tmp_path / "flat", {"": 12})
    before = load(root)[0].fingerprint()
    (root / "new.png").write_bytes(png(pixels(99)))
    assert load(root)[0].fingerprint() != before
    assert len(list(tmp_path.glob("cache/images/*"))) == 2


def test_broken_images_are_named_counted_and_skipped_only_where_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "pets", {"cat": 6, "dog": 6})
    (root / "cat" / "002.png").write_bytes(b"nonsense")
    (root / "dog" / "004.png").write_bytes(png(pixels(10))[:99])
    with pytest.raises(ValueError, match=r"^data\.path: .*cat/002\.png: broken image \(no image of a known format\);"):
        load(root, held_out=2)
    capsys.readouterr()
    train, held_out = load(root, held_out=2, skip_broken=True)
    said = capsys.readouterr().out
    assert len(train) + len(held_out) == 10
    assert "warning: 2 broken images left out: " in said and "002.png" in said and "004.png" in said
    assert [int(n >= 6) for n in numbers(train)] == train.labels.tolist()  # labels stay with their images
    with pytest.raises(ValueError, match=r"broken image"):  # the cache does not hide them
        load(root, held_out=2)


def test_nothing_but_broken_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "b.png").write_bytes(b"y")
    with pytest.raises(ValueError, match=r"^data\.path: every one of 1 images is broken"):
        load(tmp_path, skip_broken=True)


def test_tables_may_not_name_files_of_this_machine(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    secret = tmp_path / "secret.png"
    secret.write_bytes(png(pixels(0)))
    rows = [{"bytes": None, "path": str(secret)}, {"bytes": png(pixels(1)), "path": "a.png"}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"row 0 of split train .*names a file instead of holding its bytes"):
        load(tmp_path / "t.parquet", held_out=1)


def test_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(png(pixels(0)))
    root = folder(tmp_path / "in", {"": 4})
    (root / "inside.png").symlink_to(root / "000.png")
    assert sum(map(len, load(root))) == 5
    (root / "x.png").symlink_to(outside)
    with pytest.raises(ValueError, match=r"^data\.path: .*x\.png is a link that leaves"):
        load(root)
    (root / "x.png").unlink()
    (root / "up").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"^data\.path: .*up is a link that leaves"):
        load(root)


def test_a_pipe_named_like_an_image_is_no_image(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", {"": 4})
    os.mkfifo(root / "x.png")
    (root / ".hidden.png").write_bytes(b"")
    place = locate(str(root))
    assert (len(place.files["train"]), place.ignored) == (4, 1)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: "", r"^data\.path: missing; allowed: a folder of images"),
        (lambda p: str(p / "none"), r"^data\.path: no file or folder .*none; allowed: a folder"),
        (lambda p: str(p), r"^data\.path: no image in .* \(0 other files\); allowed: \.bmp"),
        (lambda p: str(p / "*.parquet"), r"^data\.path: no \.parquet file matches"),
        (lambda p: str(folder(p / "f", {"": 1})), r"^data\.held_out: 1 of 1 images leave none to train on"),
        (lambda p: f"{folder(p / 'f', {'': 1})}/000.png", r"^data\.path: .*000\.png is a file; allowed: a folder"),
        (lambda p: str(_text(p / "a.parquet")), r"^data\.path: .*a\.parquet: no readable parquet file"),
        (lambda p: str(table(p / "a.parquet", [0]).with_name("b.parquet")), r"^data\.path: no file or folder"),
        (lambda p: "someone/thing", r"^data\.path: someone/thing is no file or folder here, nor a hub name that can"),
    ],
)
def test_what_is_not_there_is_one_line(make: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        load(make(tmp_path))
    assert "\n" not in str(caught.value)


def _text(path: Path) -> Path:
    path.write_text("no table")
    return path


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"channels": 2}, r"data\.channels: must be 1 \(grey\) or 3 \(colour\), got 2"),
        ({"image_size": 0}, r"data\.image_size: must be at least 1, got 0"),
        ({"held_out": 0}, r"data\.held_out: must be at least 1, got 0"),
        ({"num_workers": -1}, r"data\.num_workers: must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range(options: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ImagesConfig(**options)  # type: ignore[arg-type]


def test_a_jpeg_copy_is_never_called_cifar10(tmp_path: Path) -> None:
    for name, kind in (("a", "PNG"), ("b", "JPEG")):
        root = tmp_path / name / "cifar10"
        root.mkdir(parents=True)
        for i in range(4):
            (root / f"{i}.img.png").write_bytes(png(pixels(i), kind))  # the suffix does not decide
    assert cifar10(CIFAR10Config(path=str(tmp_path / "a" / "cifar10"), image_size=8))[0].name == "cifar10"
    assert cifar10(CIFAR10Config(path=str(tmp_path / "b" / "cifar10"), image_size=8))[0].name == "cifar10-jpeg"


def test_cifar10_without_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^data\.path: CIFAR-10 is not on this machine; allowed: uoft-cs/cifar10"):
        cifar10(CIFAR10Config())
    table(tmp_path / "data" / "cifar10" / "train.parquet", [0, 1], label=[0, 1])
    table(tmp_path / "data" / "cifar10" / "test.parquet", [2], label=[1])
    train, held_out = cifar10(CIFAR10Config(image_size=8))
    assert (len(train), len(held_out), train.name) == (2, 1, "cifar10")


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: len(data) // 2] if how == "cut" else b"" if how == "empty" else data)


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone"])
@pytest.mark.parametrize("name", ["train/images.bin", "held-out/labels.bin", "train/manifest.json"])
def test_damage_is_named_and_mended(name: str, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffbench.data.images import _images

    root = folder(tmp_path / "pets", {"cat": 6, "dog": 6})
    before = [p.digest for p in load(root)]
    (kept,) = tmp_path.glob("cache/images/*")
    whole = {p: p.read_bytes() for p in kept.rglob("*.*") if p.name != ".lock"}
    damage(kept / name, how) if how != "gone" else (kept / name).unlink()
    capsys.readouterr()
    _images.cache_clear()
    after = load(root)
    assert [p.digest for p in after] == before
    assert [dataclasses.replace(p, digest=None).fingerprint() for p in after] == before
    assert {p: p.read_bytes() for p in kept.rglob("*.*") if p.name != ".lock"} == whole
    if not (how == "gone" and name.endswith(".json")):  # then it is as if it had not been finished
        assert f"warning: {kept / name}: damaged" in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path: Path) -> None:
    import resource

    root = folder(tmp_path / "flat", {"": 100})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        with pytest.raises(Exception, match=r"images\.bin: no room for 17,280 more bytes") as caught:
            load(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert len(load(root)[0]) == 90


def test_two_commands_decode_once(tmp_path: Path) -> None:
    import multiprocessing

    root = folder(tmp_path / "flat", {"": 30})
    (kept,) = [tmp_path / "cache" / "images"]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_load_in_child, args=(str(root), str(tmp_path / f"{i}"))) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    found = [(tmp_path / f"{i}").read_text() for i in range(2)]
    assert found[0] == found[1] == load(root)[0].fingerprint()
    assert len(list(kept.iterdir())) == 1


def _load_in_child(root: str, out: str) -> None:
    Path(out).write_text(load(root)[0].fingerprint())


def test_chunks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "pets", {"cat": 15, "dog": 15})
    (root / "cat" / "004.png").write_bytes(b"x")
    whole, _ = load(root, skip_broken=True)
    monkeypatch.setenv("DIFFBENCH_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(store, "CHUNK_BYTES", 600)
    parts, _ = load(root, skip_broken=True)
    assert parts.fingerprint() == whole.fingerprint()
    assert np.array_equal(parts.images, whole.images)


def test_the_time_of_a_file_counts(tmp_path: Path) -> None:
    root = folder(tmp_path / "flat", {"": 3})
    key = locate(str(root)).key
    assert locate(str(root)).key == key
    os.utime(root / "000.png", ns=(time.time_ns(), time.time_ns()))
    assert locate(str(root)).key != key
