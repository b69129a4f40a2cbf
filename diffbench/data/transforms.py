"""An encoded image to pixels: decoded, converted, cropped at its centre, and resized."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The formats that are read. Some of Pillow's other formats start programs (EPS) or hold no pixels."""
SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}


class BrokenError(ValueError):
    """An image that cannot be decoded; the text says why."""


def decode(
    encoded: bytes | str, size: int | tuple[int, int] | None = None, channels: int | None = None
) -> tuple[np.ndarray, str, tuple[int, int]]:
    """Decode an image, for training as for scoring: upright as its EXIF says, 8 bits a channel, without transparency.

    Args:
        encoded: the file's bytes, or its path.
        size: side of the square, or height and width of the part, at the centre that is kept; None keeps the image's
            own height and width.
        channels: 3 for colour, 1 for grey; what the file has is converted (transparency is dropped, as ADM does). None
            keeps grey images grey and gives colour for all others.

    Returns:
        (channels, height, width) uint8, the file's format, and the height and width that the image had.

    Raises:
        BrokenError: whatever the reason.
    """
    try:
        data = encoded if isinstance(encoded, bytes) else Path(encoded).read_bytes()
        if data.startswith(b"\x89PNG"):
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                image.verify()  # the checksums, which reading pixels passes over
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(image.size)
            kind = str(image.format)
            upright = ImageOps.exif_transpose(image)
            converted = with_channels(upright, channels or (1 if is_grey(image) else 3))
            pixels = np.asarray(converted if size is None else centre_crop(converted, size))
    except BrokenError:
        raise
    except Exception as e:  # decoders of a hostile file raise anything
        text = " ".join(str(e).split()) or type(e).__name__
        raise BrokenError("no image of a known format" if "cannot identify" in text else text) from None
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1), kind, (upright.height, upright.width)


def is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")


def both_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width that `image_size` means: one number is both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def centre_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Crop the largest part of a shape at an image's centre, and bring it to that size, as ADM does for squares.

    The image is halved by box averaging while both sides are at least twice as long as needed, then brought to the
    size by bicubic resampling, then cropped. An image of the right size stays as it is. (Dhariwal & Nichol 2021)

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
    """Keep Pillow's warnings about odd files off the terminal; to be used around threads, not in them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `check_size` refuses these
        yield


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """An image of any mode as grey (1 channel) or colour (3), 8 bits each; BrokenError where its range is unknown."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clamp
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise BrokenError("pixels of more than 16 bits")
        if image.mode == "I" and 1 < levels.max() < 256:  # 8 bits, kept in 32
            raise BrokenError(f"pixels in 0..{levels.max()} that are kept in more than 8 bits would become black")
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise BrokenError("floating-point pixels, whose range is unknown")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # by way of its palette's transparency, which Pillow warns of otherwise
    return image.convert("RGB" if channels == 3 else "L")


def check_size(size: tuple[int, int]) -> None:
    """Refuse an image of (width, height) that Pillow takes for too large to be safe, by a BrokenError."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and size[0] * size[1] > limit:
        raise BrokenError(f"{size[0]}x{size[1]} pixels, more than the {limit:,} that Pillow takes for safe")
