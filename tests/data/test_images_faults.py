"""Custom images that are broken, hostile, damaged on disk or missing: a one-line error, or a repair."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_images import folder, load, numbers, pixels, png, table

from diffbench.core import store
from diffbench.data.places import ImagesConfig, locate


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFBENCH_CACHE", str(tmp_path / "cache"))


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
    printed = capsys.readouterr().out
    assert len(train) + len(held_out) == 10
    assert "warning: 2 broken images left out: " in printed and "002.png" in printed and "004.png" in printed
    assert [int(n >= 6) for n in numbers(train)] == train.labels.tolist()  # labels stay with their images
    with pytest.raises(ValueError, match=r"broken image"):  # the cache does not hide them
        load(root, held_out=2)


def test_a_folder_of_only_broken_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "b.png").write_bytes(b"y")
    with pytest.raises(ValueError, match=r"^data\.path: every one of 1 images is broken"):
        load(tmp_path, skip_broken=True)


def test_tables_may_not_refer_to_local_files(tmp_path: Path) -> None:
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


def test_a_pipe_named_like_an_image_is_skipped(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", {"": 4})
    os.mkfifo(root / "x.png")
    (root / ".hidden.png").write_bytes(b"")
    place = locate(str(root))
    assert place.listing is not None
    assert (len(place.files), place.listing.skipped["other"]) == (4, ["x.png"])
    assert place.listing.skipped["hidden"] == [".hidden.png"]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: "", r"^data\.path: missing; allowed: a folder of images"),
        (lambda p: str(p / "none"), r"^data\.path: no file or folder .*none; allowed: a folder"),
        (lambda p: str(p), r"^data\.path: no images in .* \(0 other files\); allowed: \.bmp"),
        (lambda p: str(p / "*.parquet"), r"^data\.path: no \.parquet file matches"),
        (
            lambda p: str(folder(p / "f", {"": 1})),
            r"^data\.held_out: 1 of 1 images leave none to train on; add images$",
        ),
        (lambda p: f"{folder(p / 'f', {'': 1})}/000.png", r"^data\.path: .*000\.png is a file; allowed: a folder"),
        (lambda p: str(_text(p / "a.parquet")), r"^data\.path: .*a\.parquet: not a readable parquet file"),
        (lambda p: str(table(p / "a.parquet", [0]).with_name("b.parquet")), r"^data\.path: no file or folder"),
        (
            lambda p: "someone/thing",
            r"^data\.path: someone/thing is not a file or folder in .*, nor a hub name that can",
        ),
    ],
)
def test_missing_data_is_refused(make: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=text) as caught:
        load(make(tmp_path))
    assert "\n" not in str(caught.value)


def _text(path: Path) -> Path:
    path.write_text("no table")
    return path


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"channels": 2}, r"data\.channels: must be 1 \(grey\), 3 \(colour\) or null, got 2"),
        ({"image_size": 0}, r"data\.image_size: must be a positive number, or \[height, width\], got 0"),
        ({"held_out": 0}, r"data\.held_out: must be at least 1, got 0"),
        ({"num_workers": -1}, r"data\.num_workers: must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ImagesConfig(**options)  # type: ignore[arg-type]


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: len(data) // 2] if how == "cut" else b"" if how == "empty" else data)


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone"])
@pytest.mark.parametrize("name", ["train/images.bin", "held-out/labels.bin", "train/manifest.json"])
def test_damage_is_named_and_repaired(name: str, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffbench.data.images import _images

    root = folder(tmp_path / "pets", {"cat": 6, "dog": 6})
    before = [p.digest for p in load(root)]
    (cache,) = tmp_path.glob("cache/images/*")
    whole = {p: p.read_bytes() for p in cache.rglob("*.*") if p.name != ".lock"}
    damage(cache / name, how) if how != "gone" else (cache / name).unlink()
    capsys.readouterr()
    _images.cache_clear()
    after = load(root)
    assert [p.digest for p in after] == before
    assert [dataclasses.replace(p, digest=None).fingerprint() for p in after] == before
    assert {p: p.read_bytes() for p in cache.rglob("*.*") if p.name != ".lock"} == whole
    if not (how == "gone" and name.endswith(".json")):  # without a manifest, the cache counts as unfinished
        assert f"warning: {cache / name}: damaged" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "object"])
def test_a_damaged_file_of_an_unfinished_cache_is_rebuilt(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CHUNK_BYTES", 600)
    root = folder(tmp_path / "flat", {"": 20})
    add = store.Filling.add

    def stop(filling: Any, chunk: store.Chunk, *rest: Any) -> None:
        if chunk.number == 3:
            raise KeyboardInterrupt
        add(filling, chunk, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store.Filling, "add", stop)
        load(root)
    chunks = sorted(tmp_path.glob("cache/images/*/train/chunk-*.json"))
    assert len(chunks) == 3
    chunks[1].write_text("{}") if how == "object" else damage(chunks[1], how)
    train, held_out = load(root)
    assert sorted(numbers(train) + numbers(held_out)) == list(range(20))


def test_a_damaged_label_column_is_named(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = table(tmp_path / "train.parquet", [0, 1, 2], label=[0, 1, 0])
    columns = pq.read_metadata(path).row_group(0)
    label = columns.column(columns.num_columns - 1)
    data, first = bytearray(path.read_bytes()), label.dictionary_page_offset
    for i in range(first, first + label.total_compressed_size):
        data[i] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"^data\.path: cannot read column 'label' of split train of {tmp_path} \("):
        load(path)


def test_a_full_disk_is_a_one_line_error_and_a_retry_succeeds(tmp_path: Path) -> None:
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


def test_the_chunk_size_does_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "pets", {"cat": 15, "dog": 15})
    (root / "cat" / "004.png").write_bytes(b"x")
    whole, _ = load(root, skip_broken=True)
    monkeypatch.setenv("DIFFBENCH_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(store, "CHUNK_BYTES", 600)
    parts, _ = load(root, skip_broken=True)
    assert parts.fingerprint() == whole.fingerprint()
    assert np.array_equal(parts.images, whole.images)
