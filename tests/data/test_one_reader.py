"""Training and scoring read the same files of a folder, and the same pixels of each file."""

from pathlib import Path

import numpy as np
import own_images
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffbench.core.errors import UserError
from diffbench.data.places import list_files
from diffbench.evaluation.images import ImageFolder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFBENCH_CACHE", str(tmp_path / "cache"))


def odd_images(root: Path) -> Path:
    """Write a folder with one image of each kind that readers decode differently."""
    root.mkdir()
    pixels = own_images.pixels
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.fromarray(pixels(0)).save(root / "a-turned.png", exif=rotated)
    Image.fromarray(pixels(1)).quantize(8).save(root / "b-palette.png")
    Image.fromarray(pixels(2, channels=4)).save(root / "c-alpha.png")
    Image.fromarray(pixels(3, channels=1)).save(root / "d-grey.png")
    Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)).save(root / "e-16-bits.png")
    Image.fromarray(pixels(4)).save(root / "f-turned.tif", exif=rotated)
    Image.fromarray(pixels(5)).save(root / "g.gif")
    return root


def scored(root: Path) -> Tensor:
    return torch.cat(list(ImageFolder(root).batches(4)))


def test_scoring_sees_the_same_pixels_as_training(tmp_path: Path) -> None:
    root = odd_images(tmp_path / "odd")
    train, held_out = own_images.load(root, held_out=1)
    trained = {image.numpy().tobytes() for part in (train, held_out) for image in part.images}
    assert {image.numpy().tobytes() for image in scored(root)} == trained and len(trained) == 7
    for i, number in ((0, 0), (5, 4)):  # upright
        assert np.array_equal(scored(root)[i], np.rot90(own_images.pixels(number), -1).transpose(2, 0, 1))
    assert np.array_equal(scored(root)[2], own_images.pixels(2, channels=4)[..., :3].transpose(2, 0, 1))
    assert set(scored(root)[4].flatten().tolist()) == {100}


def test_training_and_scoring_both_skip_hidden_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = own_images.folder(tmp_path / "flat", {"": 20})
    alone = scored(root)
    own_images.folder(root / ".ipynb_checkpoints", {"": 10})
    (root / ".DS_Store").write_bytes(b"")
    (root / "notes.txt").write_text("")
    capsys.readouterr()
    assert torch.equal(scored(root), alone)
    line = f"{root}: 20 images (20 png); skipped 2 hidden (.DS_Store, .ipynb_checkpoints), 1 other (notes.txt)"
    assert capsys.readouterr().out == line + "\n"
    assert sum(map(len, own_images.load(root))) == 20
    assert capsys.readouterr().out.startswith(line + "\n")
    own_images.table(tmp_path / "p" / "train.parquet", [0, 1, 2])
    own_images.table(tmp_path / "p" / "test.parquet", [3])
    own_images.load(tmp_path / "p")
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'p'}: 2 parquet files\n")


def test_training_and_scoring_follow_and_refuse_the_same_links(tmp_path: Path) -> None:
    root = own_images.folder(tmp_path / "in", {"": 4})
    (root / "again.png").symlink_to(root / "000.png")
    (root / "loop").symlink_to(root)
    assert len(scored(root)) == sum(map(len, own_images.load(root))) == 5
    assert list_files(root).skipped["links to folders"] == ["loop"]
    (tmp_path / "outside.png").write_bytes(b"")
    (root / "x.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(UserError, match=r"^.*x\.png is a link that leaves .*; put the files themselves there$"):
        ImageFolder(root)
    with pytest.raises(ValueError, match=r"^data\.path: .*x\.png is a link that leaves"):
        own_images.load(root)


def test_formats_are_counted(tmp_path: Path) -> None:
    folder = ImageFolder(odd_images(tmp_path / "odd"))
    assert folder.formats() == {"PNG": 5, "TIFF": 1, "GIF": 1}
    train, held_out = own_images.load(tmp_path / "odd", held_out=1)
    assert sum(train.formats.values()) == 6 and sum(held_out.formats.values()) == 1
