"""Networks small enough for a laptop, fitted to the image: the common rules behind `denoiser.preset: laptop`.

At 32x32, a forward pass costs 0.07 to 0.18 GMACs: in ten minutes, two CPU cores train on 40,000 images (convolutional
networks) to 75,000 (transformers).
Larger images get larger patches, or more levels if the network halves the image.
"""

from math import gcd
from typing import Any

MOST_PATCHES = 256


def transformer(height: int, width: int) -> dict[str, Any]:
    """Return the config keys of a plain Vision Transformer for images of this size."""
    return {"patch_size": patch(height, width), "hidden_size": 128, "depth": 6, "num_heads": 4}


def unet(height: int, width: int, top: list[int]) -> dict[str, Any]:
    """Return the config keys of a U-Net with attention at its lowest resolution; see `levels`.

    Args:
        top: width factors of the last levels; earlier levels have the base width.
    """
    n = levels(height, width)
    mult = [*[1] * n, *top][-n:]
    return {"model_channels": 24, "channel_mult": mult, "attention_resolutions": [max(height, width) >> (n - 1)]}


def levels(height: int, width: int) -> int:
    """Return the number of levels: even sides are halved once, and again while the shorter is above 8 pixels."""
    n = 1
    while gcd(height, width) % 2**n == 0 and (n == 1 or min(height, width) >> (n - 1) > 8):
        n += 1
    return n


def patch(height: int, width: int) -> int:
    """Return the smallest patch from 2 (from 20 pixels on: 3) that divides both sides into at most `MOST_PATCHES`."""
    common, smallest = gcd(height, width), 3 if max(height, width) >= 20 else 2
    fitting = [p for p in range(smallest, common + 1) if common % p == 0 and height * width <= MOST_PATCHES * p * p]
    return fitting[0] if fitting else common
