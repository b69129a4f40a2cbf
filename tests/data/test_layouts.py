"""How folders and tables are interpreted: splits, classes, their order, and layouts refused as ambiguous."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from own_images import folder, load, numbers, pixels, png, table

from diffbench.data.facts import DataFacts
from diffbench.data.sets import ImageSet, describe
from diffbench.data.splits import hold_out, natural_order


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def read_by_library(root: Path) -> dict[str, tuple[int, list[str]]]:
    """Return the number of images and the class names of each split, read by the datasets library's imagefolder."""
    found = datasets.load_dataset("imagefolder", data_dir=str(root), streaming=True)
    labels = {split: data.features.get("label") for split, data in found.items()}
    rows = {split: len(list(data.select_columns([*data.features][-1:]))) for split, data in found.items()}
    return {split: (rows[split], labels[split].names if labels[split] else []) for split in found}


@pytest.mark.parametrize(
    "counts",
    [
        {"dog": 6, "cat": 5},
        {"": 12},
        {"train/dog": 4, "train/cat": 4, "val/dog": 1, "val/cat": 2},
        {"training_set/a": 4, "training_set/b": 4, "test_set/a": 2, "test_set/b": 2},
        {"train/a": 4, "train/b": 4, "eval/a": 2, "eval/b": 2},
    ],
)
def test_unambiguous_layouts_are_read_as_by_the_datasets_library(counts: dict[str, int], tmp_path: Path) -> None:
    root = folder(tmp_path / "data", counts)
    library = read_by_library(root)
    train, held_out = load(root)
    sizes = (len(train), len(held_out)) if len(library) > 1 else (len(train) + len(held_out),)
    assert sizes == tuple(rows for rows, _ in library.values())
    assert list(train.class_names) == library["train"][1]


def test_the_datasets_library_drops_images_and_classes(tmp_path: Path) -> None:
    """These losses are why diffbench lists folders itself."""
    like_a_split = folder(tmp_path / "a", {"bus": 10, "train": 10})
    assert read_by_library(like_a_split) == {"train": (10, [])}
    assert load(like_a_split)[0].class_names == ("bus", "train")
    stray = folder(tmp_path / "b", {"": 1, "cat": 5, "dog": 5})
    assert read_by_library(stray) == {"train": (11, [])}
    with pytest.raises(datasets.data_files.EmptyDatasetError):
        read_by_library(folder(tmp_path / "c [1]", {"": 10}))


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_stray_image_next_to_class_folders_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "pets", {"": 1, "cat": 10, "dog": 10})
    assert refusal(root) == (
        f"data.path: {root} has images (000.png) next to folders of images (cat, dog); move them into a class folder,"
        " or set data.labels=false to train without classes"
    )
    assert load(root, labels=False)[0].num_classes == 0
    root = folder(tmp_path / "split", {"train": 1, "train/cat": 10, "train/dog": 10, "test/cat": 2, "test/dog": 2})
    assert refusal(root).startswith(f"data.path: {root / 'train'} has images (train/000.png) next to folders of")


def test_splits_next_to_other_folders_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", {"train/x": 5, "test/x": 5, "extra": 5})
    assert refusal(root) == (
        f"data.path: {root}: test, train look like splits; move extra elsewhere, or choose one folder, such as"
        f" data.path={root / 'test'}"
    )
    root = folder(tmp_path / "b", {"test": 5, "val": 5})
    assert "test, val look like splits; name one of them train, or choose" in refusal(root)


def test_classes_one_level_too_deep_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", {"images/cat": 10, "images/dog": 10})
    assert refusal(root) == (
        f"data.path: {root}: all images are in images; to use its folders (cat, dog) as classes, set"
        f" data.path={root / 'images'}, or set data.labels=false to train without classes"
    )
    assert load(root / "images")[0].class_names == ("cat", "dog")


def test_a_held_out_class_missing_from_the_training_split_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", {"train/cat": 5, "train/dog": 5, "test/cat": 2, "test/emu": 1})
    assert (
        refusal(root)
        == f"data.label_column: {root / 'test/emu/000.png'} has no class that split train has; fix or remove it"
    )


def test_a_held_out_split_of_one_class_is_used_and_one_of_unknown_classes_is_not(tmp_path: Path) -> None:
    _, held_out = load(folder(tmp_path / "a", {"train/cat": 5, "train/dog": 5, "test/dog": 2}))
    assert (held_out.origin, held_out.labels.tolist()) == ("split test", [1, 1])
    _, held_out = load(folder(tmp_path / "b", {"train/cat": 5, "train/dog": 5, "test/unknown": 2}))
    assert held_out.origin == "of split train, by class, as no image of split test has a class"
    train, held_out = load(folder(tmp_path / "c", {"train": 5, "test/cat": 2}))
    assert (train.num_classes, held_out.origin, len(held_out)) == (0, "split test", 2)


def test_folders_of_one_split_are_merged_or_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", {"train-1": 3, "train-2": 4, "val": 2})
    assert [len(part) for part in load(root)] == [7, 2]
    root = folder(tmp_path / "b", {"freight-train": 10, "steam-train": 10})
    assert refusal(root) == (
        f"data.path: {root}: freight-train, steam-train all look like split train; merge them into one folder, or"
        " rename them without that word if they are classes"
    )
    assert len(load(root, labels=False)[0]) == 18


def write_typed_table(path: Path, count: int) -> None:
    """Write a table as the datasets library does: images, and labels with class names."""
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=["pear", "apple", "fig"]))
    rows = [{"bytes": png(pixels(i)), "path": f"{i}.png"} for i in range(count)]
    labels = [i % 3 for i in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"img": rows, "label": labels}, features=features).to_parquet(path)


def test_each_split_of_tables_may_have_different_columns(tmp_path: Path) -> None:
    write_typed_table(tmp_path / "a" / "train.parquet", 9)
    rows = [{"bytes": png(pixels(i)), "path": None} for i in (10, 11)]
    pq.write_table(pa.table({"img": rows, "label": [1, 0]}), tmp_path / "a" / "test.parquet")
    train, held_out = load(tmp_path / "a")
    assert train.class_names == ("pear", "apple", "fig") and held_out.labels.tolist() == [1, 0]
    table(tmp_path / "b" / "train.parquet", [0, 1, 2], label=[0, 1, 0], more=[1, 2, 3])
    table(tmp_path / "b" / "test.parquet", [3])
    table(tmp_path / "b" / "validation.parquet", [4], label=[1])
    train, held_out = load(tmp_path / "b")
    assert (numbers(train), numbers(held_out), held_out.origin) == ([0, 1, 2], [4], "split validation")
    pq.write_table(pa.table({"image": rows}), tmp_path / "b" / "test.parquet")
    assert refusal(tmp_path / "b") == "data.image_column: split test has no column 'img', only image"


def test_a_table_without_rows_is_skipped(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", [0, 1, 2], label=[0, 1, 0])
    table(tmp_path / "test.parquet", [], label=pa.array([], pa.int64()))
    assert load(tmp_path)[1].origin == "of split train, by class"
    assert refusal(tmp_path / "test.parquet") == f"data.path: no rows in {tmp_path}"


def test_numbered_classes_sort_by_number(tmp_path: Path) -> None:
    train, _ = load(folder(tmp_path / "a", {str(i): 2 for i in range(12)}), held_out=3)
    assert train.class_names == tuple(str(i) for i in range(12))
    for number, label in zip(numbers(train), train.labels.tolist(), strict=True):
        assert number // 2 == label  # images 0 and 1 are of class 0, and so on
    assert natural_order(["1", "01", "001"]) == natural_order(["001", "1", "01"]) == ["001", "01", "1"]
    assert natural_order(["c10", "c9", "b", "10", "9", "1"]) == ["1", "9", "10", "b", "c9", "c10"]


def test_class_names_come_from_the_features_of_the_table(tmp_path: Path) -> None:
    write_typed_table(tmp_path / "train.parquet", 9)
    train, _ = load(tmp_path / "train.parquet", held_out=3)
    assert train.class_names == ("pear", "apple", "fig")
    assert [n % 3 for n in numbers(train)] == train.labels.tolist()
    plain = table(tmp_path / "other" / "train.parquet", list(range(12)), label=[i % 3 + 1 for i in range(12)])
    train, _ = load(plain, held_out=3)
    assert train.class_names == ("1", "2", "3") and train.labels.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("count", [1, 5, 17, 40])
def test_held_out_images_are_stratified_and_leave_one_image_of_each_class(count: int) -> None:
    labels = np.repeat([0, 1, 2, 3], [1, 2, 40, 80])
    chosen = hold_out(labels, count)
    kept = np.delete(labels, chosen)
    assert len(chosen) == count and set(kept) == {0, 1, 2, 3} and 0 not in labels[chosen]
    of_each = np.bincount(labels[chosen], minlength=4)
    assert abs(of_each[3] - 2 * of_each[2]) <= 2
    assert set(hold_out(labels, max(1, count - 1))) <= set(chosen)


def test_holding_out_the_last_image_of_a_class_is_refused(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2], [1, 1, 5])
    assert len(hold_out(labels, 4)) == 4
    with pytest.raises(ValueError, match=r"^data\.held_out: 5 of 7 images leave a class without .*; allowed: 1 to 4$"):
        hold_out(labels, 5)
    singles = folder(tmp_path / "a", {"cat": 1, "dog": 1})
    assert refusal(singles).endswith("add images, or set data.labels=false to train without classes")
    assert len(hold_out(np.repeat(np.arange(3), [1, 1, 2]), None)) == 1


def test_images_without_classes_are_held_out_in_a_random_order() -> None:
    from diffbench.core import rng

    order = rng.permutation(rng.key("held-out"), 50).numpy()
    assert hold_out(np.zeros(50, np.int64), 7).tolist() == sorted(order[:7].tolist())


def test_the_interpretation_of_a_folder_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "pets", {"train/cat": 6, "train/dog": 5, "test/cat": 1, "test/dog": 2})
    train, held_out = load(root)
    printed = capsys.readouterr().out.splitlines()
    line = "11 images to train on (split train), 3 images held out (split test); 2 classes: cat 6, dog 5"
    assert printed[:2] == [f"{root}: 14 images (14 png)", f"pets: {line}"]
    assert describe(train, held_out) == f"pets, 3x8x8: {line}"
    train, held_out = load(folder(tmp_path / "b", {"train/cat": 9, "train/dog": 9, "test": 4}))
    assert held_out.origin == "of split train, by class, as no image of split test has a class"
    one = ImageSet(train.images[:9], train.labels[:9] * 0, 1, "one", ("cat",))
    assert describe(one, one).endswith("; 1 class: cat 9")
    many = ImageSet(train.images, train.labels, 30, "many", tuple(f"c{i}" for i in range(30)))
    empty = "".join(f"c{i} 0, " for i in range(2, 10))
    assert describe(many, many).endswith(f"; 30 classes: c0 9, c1 8, {empty}... c29 0 (0 to 9 images each)")


def test_the_difference_of_changed_data_names_a_renamed_class(tmp_path: Path) -> None:
    root = folder(tmp_path / "pets", {"cat": 6, "dog": 6})
    before = DataFacts.of(load(root)[0])
    (root / "cat").rename(root / "emu")
    assert before.difference(DataFacts.of(load(root)[0])) == "classes cat, dog, now dog, emu"
    (root / "emu").rename(root / "cat")
    assert before.difference(DataFacts.of(load(root)[0])) is None
    (root / "cat" / "new.png").write_bytes(png(pixels(99)))
    after = DataFacts.of(load(root)[0])
    assert before.difference(after) == f"{before.fingerprint}, now {after.fingerprint}"
