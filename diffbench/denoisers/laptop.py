"""Sizes for a laptop, fitted to the image: what `denoiser.preset: laptop` means for each backbone.

At 32x32 a forward pass costs 0.07 to 0.18 GMACs, so that two CPU cores see 60,000 images in about ten minutes. Larger
images get larger patches, and more levels where a network halves the image.
"""

from math import gcd
from typing import Any

MOST_PATCHES = 256


def laptop(height: int, width: int) -> dict[str, dict[str, Any]]:
    """Backbone -> keys of the section `denoiser`, for images of a height and a width."""
    both, longer = gcd(height, width), max(height, width)
    patch = _patch(height, width)
    levels = 1
    while both % 2**levels == 0 and (levels == 1 or min(height, width) >> (levels - 1) > 8):
        levels += 1
    transformer = {"patch_size": patch, "hidden_size": 128, "depth": 6, "num_heads": 4}
    narrow, attended = [1] * levels, {"attention_resolutions": [longer >> (levels - 1)]}
    # A window must fit all stages: no halving to a size that none divides.
    stages = next(n for n in range(min(levels, 3), 0, -1) if n == 1 or both >> (n - 1) >= 4)
    windows = [next(w for w in (4, 8, 7, 6, 5, 3, 2, 1) if (both >> i) % w == 0) for i in range(stages)]
    first = max(stride for stride in range(1, patch // 2 + 1) if both % stride == 0) if patch > 1 else 1
    grids = [both // first >> i for i in range(3) if both // first % 2**i == 0]
    reductions = [next(r for r in (4, 2, 1) if side % r == 0 and (side > r or r == 1)) for side in grids]
    n = len(grids)
    return {
        "unet": {
            "model_channels": 24,
            "channel_mult": [*narrow, 2, 3][-levels:],
            "num_res_blocks": 1,
            "norm_groups": 8,
            **attended,
        },
        "dit": transformer,
        "diffit": {
            "channels": [24, 48, 96][:stages],
            "blocks": [1] * stages,
            "window": windows,
            "time_dim": 128,
            "norm_groups": 8,
        },
        "diffit-latent": transformer,
        "ddpmpp": {
            "model_channels": 24,
            "channel_mult": [*narrow, 2, 2][-levels:],
            "num_blocks": 1,
            "dropout": 0.0,
            **attended,
        },
        "uvit": transformer,
        "segformer": {
            "hidden_sizes": [48, 96, 192][:n],
            "depths": [2] * n,
            "num_heads": [1, 2, 4][:n],
            "sr_ratios": reductions,
            "mlp_ratios": [4.0] * n,
            "strides": [first, 2, 2][:n],
            "decoder_hidden_size": 96,
            "time_dim": 128,
        },
    }


def _patch(height: int, width: int) -> int:
    """The smallest patch of 2 (from 20 pixels on: 3) that divides both sides and leaves `MOST_PATCHES` at most."""
    both, least = gcd(height, width), 3 if max(height, width) >= 20 else 2
    fitting = [p for p in range(least, both + 1) if both % p == 0 and height * width <= MOST_PATCHES * p * p]
    return fitting[0] if fitting else both
