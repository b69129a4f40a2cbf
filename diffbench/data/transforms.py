"""Decoding of an image to pixels: format and colour conversion, centre crop and resizing."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The formats that are read. Some of Pillow's other formats start programs (EPS) or contain no pixels."""
SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}


class BrokenError(ValueError):
    """An image that cannot be decoded; the message says why."""


def decode(
    encoded: bytes | str, size: int | tuple[int, int] | None = None, channels: int | None = None
) -> tuple[np.ndarray, str, tuple[int, int]]:
    """Decode an image, identically for training and scoring: rotated by its EXIF tag, 8 bits a channel, no alpha.

    Args:
        encoded: the file's bytes, or its path.
        size: side of the centre square to keep, or height and width of the centre part; None keeps the image's own
            height and width.
        channels: 3 for colour, 1 for grey; other images are converted (transparency is dropped, as in ADM). None keeps
            grey images grey and converts all others to colour.

    Returns:
        (channels, height, width) uint8, the file's format, and the image's original height and width.

    Raises:
        BrokenError: if the image cannot be decoded, for whatever reason.
    """
    try:
        data = encoded if isinstance(encoded, bytes) else Path(encoded).read_bytes()
        if data.startswith(b"\x89PNG"):
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                image.verify()  # the checksums, which decoding ignores
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(image.size)
            kind = str(image.format)
            upright = ImageOps.exif_transpose(image)
            converted = with_channels(upright, channels or (1 if is_grey(image) else 3))
            pixels = np.asarray(converted if size is None else centre_crop(converted, size))
    except BrokenError:
        raise
    except Exception as e:  # decoders can raise anything on a hostile file
        text = " ".join(str(e).split()) or type(e).__name__
        raise BrokenError("no image of a known format" if "cannot identify" in text else text) from None
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1), kind, (upright.height, upright.width)


def is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")


def both_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Return the height and width that `image_size` stands for; a single number is both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def centre_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Crop an image at its centre to the aspect ratio of `size` and resize it to `size`, as ADM does for squares.

    The image is halved by box averaging while both sides are at least twice as long as needed, then resized bicubically
    until it just covers `size`, then cropped. An image of the right size stays as it is. (Dhariwal & Nichol 2021)

    Args:
        image: of any size.
        size: side of a square, or height and width.
    """
    height, width = both_sides(size)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    if scale != 1:
        enlarged = round(image.width * scale), round(image.height * scale)
        check_size(enlarged)
        image = image.resize(enlarged, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress Pillow's warnings about odd files; use it around threads, not inside them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `check_size` refuses these
        yield


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image to 8-bit grey (1 channel) or colour (3); raise BrokenError if its range is unknown."""
    if image.mode.startswith("I"):  # 16-bit pixels, which Pillow would clamp
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise BrokenError("pixels of more than 16 bits")
        if image.mode == "I" and 1 < levels.max() < 256:  # 8-bit values stored in 32 bits
            raise BrokenError(f"pixels in 0..{levels.max()} stored in more than 8 bits would become black")
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise BrokenError("floating-point pixels, whose range is unknown")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # Pillow warns if a palette with transparency is converted to RGB directly
    return image.convert("RGB" if channels == 3 else "L")


def check_size(size: tuple[int, int]) -> None:
    """Raise BrokenError for an image of (width, height) with more pixels than Pillow considers safe."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and size[0] * size[1] > limit:
        raise BrokenError(f"{size[0]}x{size[1]} pixels, more than the {limit:,} that Pillow considers safe")
