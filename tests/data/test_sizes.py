"""Sizes of custom images: the default side, cropping, and network sizes that fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_images import folder, load, png

from diffbench.config.load import load as load_config
from diffbench.core.errors import UserError
from diffbench.data.places import ImagesConfig
from diffbench.data.sets import ImageSet, describe_sizes
from diffbench.data.transforms import decode
from diffbench.denoisers import DENOISERS, build
from diffbench.denoisers.flops import count


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFBENCH_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("shape", "suits"),
    [((20, 30, 3), (3, 24, 24)), ((8, 8, 1), (1, 8, 8)), ((28, 28, 1), (1, 32, 32)), ((90, 120, 3), (3, 32, 32))],
)
def test_side_and_channels_suit_the_images(shape: tuple[int, int, int], suits: tuple[int, ...], tmp_path: Path) -> None:
    height, width, channels = shape
    root = folder(tmp_path / "a", {"cat": 3, "dog": 3}, height=height, width=width, channels=channels)
    assert ImagesConfig(path=str(root)).shape == suits
    assert ImagesConfig(path=str(root), image_size=12, channels=3).shape == (3, 12, 12)
    assert ImagesConfig().shape == (3, 32, 32)


def test_images_are_cropped_to_height_and_width(tmp_path: Path) -> None:
    pixels = np.zeros((10, 24, 3), np.uint8)
    pixels[:, 2:22] = np.arange(1, 21, dtype=np.uint8)[:, None]
    out, _, size = decode(png(pixels), (10, 20), 3)
    assert size == (10, 24) and np.array_equal(out[0], pixels[:, 2:22, 0])
    halved, *_ = decode(png(pixels[:, 2:22]), (5, 10), 1)
    assert np.abs(halved[0].astype(float) - np.arange(1.5, 21, 2)).max() <= 0.5
    train, _ = load(folder(tmp_path / "a", {"": 10}, height=10, width=24), image_size=[10, 20])
    assert train.shape == (3, 10, 20) and train.sizes == {"10x24": 9}
    assert ImagesConfig(image_size=[16, 16]).image_size == 16
    with pytest.raises(ValueError, match=r"data.image_size: must be a positive number, or \[height, width\]"):
        ImagesConfig(image_size=[8, 8, 8])


@pytest.mark.parametrize(
    ("sizes", "shape", "line"),
    [
        ({"32x32": 5}, (32, 32), "all 32x32, used as they are"),
        ({"16x16": 5}, (32, 32), "all 16x16; resized to 32x32"),
        (
            {"48x40": 9, "40x40": 1},
            (32, 32),
            "40 to 48 high and 40 wide, most often 48x40; resized to 32x32, 9 of 10 cropped at the centre (up to"
            " 17% of an image); data.image_size=[40,32] crops less",
        ),
        (
            {"100x200": 1, "200x100": 1},
            (32, 32),
            "100 to 200 high and 100 to 200 wide, most often 100x200; resized to 32x32, 2 of 2 cropped at the centre"
            " (up to 50% of an image); data.image_size=64 keeps more detail",
        ),
        (
            {"50x40": 4},
            (16, 16),
            "all 50x40; resized to 16x16, 4 of 4 cropped at the centre (up to 20% of an image); data.image_size=32"
            " keeps more detail",
        ),
        ({"96x80": 4}, (48, 40), "all 96x80; resized to 48x40; data.image_size=80 keeps more detail"),
    ],
)
def test_sizes_are_described_in_one_line(sizes: dict[str, int], shape: tuple[int, int], line: str) -> None:
    data = ImageSet(torch.empty(0, 3, *shape, dtype=torch.uint8), torch.empty(0), 0, sizes=sizes)
    assert describe_sizes(data) == line


def laptop(name: str, height: int, width: int) -> dict[str, Any]:
    """Return the laptop-size config keys of a registered denoiser."""
    sizes = DENOISERS[name].laptop
    assert sizes is not None
    return sizes(height, width)


@pytest.mark.parametrize("name", DENOISERS)
def test_laptop_sizes_fit_every_image_size(name: str) -> None:
    for side in (8, 16, 24, 28, 32, 40, 64):
        config = DENOISERS[name].config(**laptop(name, side, side))
        shape = {"image_size": side, "channels": 3, "num_classes": 2, "null_class": True, "learn_sigma": False}
        cost = count(lambda config=config, shape=shape: build(name, config, **shape), 3, side)  # type: ignore[misc]
        assert 0.004 < cost.gmacs < (0.2 if side <= 32 else 0.6), side


@pytest.mark.parametrize("name", DENOISERS)
def test_images_need_not_be_square(name: str) -> None:
    for height, width in ((16, 24), (48, 40)):
        config = DENOISERS[name].config(**laptop(name, height, width))
        shape = {"image_size": (height, width), "channels": 3, "num_classes": 2}
        with torch.device("meta"):
            network = build(name, config, **shape, null_class=True, learn_sigma=False)
            x = torch.empty(2, 3, height, width)
            assert network(x, torch.empty(2), torch.zeros(2, dtype=torch.int64)).shape == x.shape
    with pytest.raises(ValueError, match=r"denoiser\.tmsa: needs a square image, got 16x24"):
        build("unet", DENOISERS["unet"].config(tmsa=True), image_size=(16, 24), channels=3)


def test_a_laptop_preset_follows_the_images_and_keeps_overrides() -> None:
    config = load_config("experiments/own/dit.yaml", ["data.image_size=64", "denoiser.depth=2"])
    assert (config.denoiser.patch_size, config.denoiser.depth, config.denoiser.hidden_size) == (4, 2, 128)
    with pytest.raises(UserError, match="laptop sizes a network for images, not for an autoencoder's latents"):
        load_config("experiments/own/dit.yaml", ["autoencoder=some/folder"])


def test_the_error_for_a_key_of_another_data_set_names_that_data_set() -> None:
    with pytest.raises(
        UserError, match=r"data.path: unknown key; .*; data.path is a key of data.name=images or cifar10"
    ):
        load_config("experiments/digits/dit.yaml", ["data.path=pets"])
