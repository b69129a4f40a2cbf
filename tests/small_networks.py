"""Small networks of every registered denoiser, and inputs for them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffbench.denoisers import (
    DENOISERS,
    DDPMppConfig,
    DiffiTConfig,
    DiffiTLatentConfig,
    DiTConfig,
    SegFormerConfig,
    UNetConfig,
    UViTConfig,
    build,
)

SMALL = {
    "unet": UNetConfig(8, [1, 2], 1, [4], num_heads=2, norm_groups=4),
    "dit": DiTConfig(hidden_size=32, depth=2, num_heads=4),
    "diffit": DiffiTConfig([8, 16], [1, 1], num_heads=2, time_dim=16, norm_groups=4),
    "diffit-latent": DiffiTLatentConfig(hidden_size=32, depth=2, num_heads=4),
    "ddpmpp": DDPMppConfig(8, [1, 2], 1, [4]),
    "uvit": UViTConfig(hidden_size=32, depth=2, num_heads=4),
    "segformer": SegFormerConfig([8, 8, 16], [1, 1, 1], [1, 1, 2], decoder_hidden_size=8, time_dim=16),
}
SIZE, CHANNELS, CLASSES = 8, 3, 5


def small(name: str, shaken: bool = True, **changes: Any) -> nn.Module:
    """Build a small network in eval mode with changes of shape or config; `shaken` moves weights away from zero."""
    config = SMALL[name] if name in SMALL else DENOISERS[name].config()
    config = replace(config, **{key: value for key, value in changes.items() if hasattr(config, key)})
    shape = {"image_size": SIZE, "channels": CHANNELS, "num_classes": CLASSES}
    shape |= {key: value for key, value in changes.items() if not hasattr(config, key)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build(name, config, **shape).eval()
        for p in net.parameters() if shaken else []:
            p.data += 0.1 * torch.randn_like(p)
    return net.requires_grad_(False)


def inputs(batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy images, times and labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, CHANNELS, SIZE, SIZE, generator=generator)
    return x, torch.linspace(0, 999, batch), torch.arange(batch) % CLASSES
