"""Decoding of one image: crop, conversion, and images that are refused."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffbench.data.transforms import BrokenError, centre_crop, decode


def encode(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_an_image_of_the_right_size_is_unchanged() -> None:
    pixels = noise(9, 9, 3)
    out, kind, _ = decode(encode(pixels), 9, 3)
    assert kind == "PNG"
    assert out.dtype == np.uint8 and out.shape == (3, 9, 9)
    assert np.array_equal(out, pixels.transpose(2, 0, 1))


def test_a_longer_side_is_cropped_at_the_centre() -> None:
    pixels = noise(8, 13, 3)
    out, *_ = decode(encode(pixels), 8, 3)
    assert np.array_equal(out, pixels[:, 2:10].transpose(2, 0, 1))  # (13 - 8) // 2 = 2
    out, *_ = decode(encode(pixels.transpose(1, 0, 2)), 8, 3)
    assert np.array_equal(out, pixels.transpose(1, 0, 2)[2:10].transpose(2, 0, 1))


def test_twice_the_size_is_halved_by_box_averaging() -> None:
    pixels = noise(16, 16, 1)
    out, *_ = decode(encode(pixels[..., 0]), 8, 1)
    means = pixels.reshape(8, 2, 8, 2).mean(axis=(1, 3))
    assert np.abs(out[0] - means).max() <= 1  # Pillow rounds after each direction


def test_other_sizes_are_halved_repeatedly_then_resampled_bicubically() -> None:
    image = Image.fromarray(noise(37, 50, 3))
    half = image.resize((25, 18), Image.Resampling.BOX)  # 37 >= 2 * 8, 18 >= 2 * 8, then no more
    quarter = half.resize((12, 9), Image.Resampling.BOX)
    small = quarter.resize((11, 8), Image.Resampling.BICUBIC)  # round(12 * 8 / 9) = 11
    assert np.array_equal(np.asarray(centre_crop(image, 8)), np.asarray(small)[:, 1:9])
    enlarged = Image.fromarray(noise(5, 5, 3))
    expected = enlarged.resize((8, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(centre_crop(enlarged, 8)), np.asarray(expected))


def test_colour_and_grey_are_converted() -> None:
    grey = noise(4, 4)
    out, *_ = decode(encode(grey), 4, 3)
    assert all(np.array_equal(out[c], grey) for c in range(3))
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    out, *_ = decode(encode(red), 4, 1)
    assert out.shape == (1, 4, 4)
    assert set(out.flatten().tolist()) == {76}  # 0.299 * 255, ITU-R 601


def test_transparency_is_dropped_and_palettes_are_applied() -> None:
    pixels = noise(4, 4, 4)
    out, *_ = decode(encode(pixels), 4, 3)
    assert np.array_equal(out, pixels[..., :3].transpose(2, 0, 1))
    palette = Image.fromarray(noise(4, 4, 3)).quantize(8)
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=b"\x00\x80")
    out, *_ = decode(file.getvalue(), 4, 3)
    assert np.array_equal(out, np.asarray(palette.convert("RGB")).transpose(2, 0, 1))


def test_sixteen_bits_are_scaled_not_clamped() -> None:
    levels = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        out, *_ = decode(encode(levels, kind), 2, 1)
        assert out[0].tolist() == [[0, 100], [200, 255]]


def test_a_photograph_is_rotated_by_its_exif_orientation() -> None:
    pixels = noise(6, 6, 3)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held sideways
    out, *_ = decode(encode(pixels, exif=turned), 6, 3)
    assert np.array_equal(out, np.rot90(pixels, -1).transpose(2, 0, 1))


def test_a_path_and_its_bytes_decode_to_the_same_pixels(tmp_path: Path) -> None:
    pixels = noise(5, 5, 3)
    (tmp_path / "a.png").write_bytes(encode(pixels))
    assert np.array_equal(decode(str(tmp_path / "a.png"), 5, 3)[0], decode(encode(pixels), 5, 3)[0])


JPEG = encode(noise(64, 64, 3), "JPEG")
PNG = encode(noise(64, 64, 3))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "no image of a known format"),
        (b"no image", "no image of a known format"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (PNG[: len(PNG) // 2], "Truncated"),
        (PNG[:100] + bytes([PNG[100] ^ 4]) + PNG[101:], "bad header checksum"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known format"),  # would start a program
        (encode(np.ones((4, 4), np.float32), "TIFF"), "floating-point"),
        (encode(np.full((4, 4), 200, np.int32), "TIFF"), r"pixels in 0\.\.200 .* would become black"),
    ],
    ids=["empty", "text", "half a JPEG", "half a PNG", "a flipped bit", "PostScript", "floats", "8 bits in 32"],
)
def test_undecodable_data_is_reported_as_broken(data: bytes, text: str) -> None:
    with pytest.raises(BrokenError, match=text):
        decode(data, 8, 3)


def test_huge_images_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 30)
    with pytest.raises(BrokenError, match="pixels"):
        decode(encode(noise(31, 30, 3)), 8, 3)
    narrow = encode(noise(1, 40, 3))  # 24 x 960 pixels in between
    with pytest.raises(BrokenError, match="960x24 pixels, more than the 900 that Pillow considers safe"):
        decode(narrow, 24, 3)


def test_a_missing_file_is_reported_as_broken(tmp_path: Path) -> None:
    with pytest.raises(BrokenError, match="No such file"):
        decode(str(tmp_path / "none.png"), 8, 3)
