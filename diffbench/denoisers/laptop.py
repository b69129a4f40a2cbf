"""Sizes for a laptop, fitted to the image: what the denoisers' own rules for `denoiser.preset: laptop` share.

At 32x32 a forward pass costs 0.07 to 0.18 GMACs, so that two CPU cores see 40,000 images (networks of convolutions) to
75,000 (transformers) in ten minutes.
Larger images get larger patches, and more levels where a network halves the image.
"""

from math import gcd
from typing import Any

MOST_PATCHES = 256


def transformer(height: int, width: int) -> dict[str, Any]:
    """Keys of a plain Vision Transformer for images of a height and a width."""
    return {"patch_size": patch(height, width), "hidden_size": 128, "depth": 6, "num_heads": 4}


def unet(height: int, width: int, top: list[int]) -> dict[str, Any]:
    """Keys of a U-Net, with attention at its lowest resolution, of at least 8 pixels.

    Args:
        top: factors of the last levels' widths; those before are as wide as the base.
    """
    n = levels(height, width)
    mult = [*[1] * n, *top][-n:]
    return {"model_channels": 24, "channel_mult": mult, "attention_resolutions": [max(height, width) >> (n - 1)]}


def levels(height: int, width: int) -> int:
    """Levels between which both sides halve, down to 8 pixels."""
    n = 1
    while gcd(height, width) % 2**n == 0 and (n == 1 or min(height, width) >> (n - 1) > 8):
        n += 1
    return n


def patch(height: int, width: int) -> int:
    """The smallest patch of 2 (from 20 pixels on: 3) that divides both sides and leaves `MOST_PATCHES` at most."""
    both, least = gcd(height, width), 3 if max(height, width) >= 20 else 2
    fitting = [p for p in range(least, both + 1) if both % p == 0 and height * width <= MOST_PATCHES * p * p]
    return fitting[0] if fitting else both
