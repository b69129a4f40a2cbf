"""The U-Net of ADM, with residual blocks and attention (Dhariwal & Nichol 2021, §3 and appendix)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffbench.denoisers import laptop
from diffbench.denoisers.base import Denoiser, Preset, check_divides, check_sides, check_sizes, unet_levels
from diffbench.denoisers.flops import Cost
from diffbench.denoisers.layers import (
    ConditionEmbedding,
    Direction,
    GroupNorm,
    PixelAttention,
    TimeFeatures,
    resample,
    zero_,
)
from diffbench.denoisers.linear import Linear
from diffbench.denoisers.tmsa import TimeAttention


@dataclass
class UNetConfig:
    """Sizes and options of the U-Net, named after ADM's published flags."""

    model_channels: int = 128
    """Base width, multiplied by `channel_mult` at each level."""
    channel_mult: list[float] = field(default_factory=lambda: [1, 2, 2, 2])
    """One factor per level; the resolution halves between levels."""
    num_res_blocks: int = 2
    """Residual blocks per level in the encoder; the decoder has one more."""
    attention_resolutions: list[int] | None = None
    """Resolutions (pixels of the longer side) at which attention follows each residual block; the middle always has it.
    null: 16, if there is such a level."""
    num_heads: int = 4
    """Attention heads; ignored if `num_head_channels` is set."""
    num_head_channels: int | None = None
    """Channels per attention head."""
    dropout: float = 0.0
    norm_groups: int = 32
    """Groups of the group normalisation; must divide every level's width, with and without its skip."""
    use_scale_shift_norm: bool = True
    """The condition scales and shifts the second norm's output; otherwise it is added to the norm's input."""
    resblock_updown: bool = False
    """Resample inside residual blocks; otherwise in separate layers, see `conv_resample`."""
    conv_resample: bool = True
    """Separate resampling layers convolve (strided, or after nearest x2); otherwise mean of 2x2, and nearest x2."""
    num_heads_upsample: int | None = None
    """Attention heads in the decoder, if different; ignored if `num_head_channels` is set."""
    time_features: TimeFeatures = "sinusoidal"
    """Time features that the embedding MLP takes."""
    fourier_scale: float = 16.0
    """Standard deviation of the Fourier frequencies, in periods per unit of time; 16 suits EDM's ln(sigma)/4."""
    tmsa: bool = False
    """Replace the attention by DiffiT's time-dependent attention (DiffiT, Table 5)."""

    def __post_init__(self) -> None:
        numbers = ("model_channels", "channel_mult", "num_res_blocks", "num_heads", "num_head_channels", "norm_groups")
        check_sizes(self, *numbers, "num_heads_upsample", "fourier_scale")


class UNet(Denoiser):
    """ADM's U-Net, for images whose sides can be halved between all levels; see `Denoiser`."""

    def __init__(
        self,
        config: UNetConfig,
        image_size: int | tuple[int, int],
        channels: int,
        num_classes: int = 0,
        null_class: bool = True,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__(channels, num_classes, null_class, learn_sigma)
        widths, attended, longer = unet_levels(config, image_size)
        levels = len(widths)
        self.divisor = longer if config.tmsa else 2 ** (levels - 1)
        emb = 4 * config.model_channels
        self.condition = ConditionEmbedding(
            emb, config.model_channels, num_classes, null_class, config.time_features, config.fourier_scale
        )

        def heads(width: int, decoder: bool = False) -> int:
            what = "a width with attention"
            if config.num_head_channels is not None:
                check_divides("num_head_channels", config.num_head_channels, width, what)
                return width // config.num_head_channels
            key = "num_heads_upsample" if decoder and config.num_heads_upsample else "num_heads"
            number: int = getattr(config, key)
            check_divides(key, number, width, what)
            return number

        def stage(c_in: int, c_out: int, size: int, decoder: bool = False) -> Stage:
            return Stage(config, c_in, c_out, emb, heads(c_out, decoder) if size in attended else None, size)

        def between(width: int, direction: Direction) -> nn.Module:
            if config.resblock_updown:
                return ResBlock(config, width, width, emb, direction)
            return (Downsample if direction == "down" else Upsample)(width, config.conv_resample)

        width = widths[0]
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.encoder = nn.ModuleList()
        skips = [width]
        for level, c in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.encoder.append(stage(width, c, longer >> level))
                width = c
                skips.append(width)
            if level < levels - 1:
                self.encoder.append(between(width, "down"))
                skips.append(width)
        self.middle = nn.ModuleList(
            [
                Stage(config, width, width, emb, heads(width), longer >> (levels - 1)),
                Stage(config, width, width, emb, None, longer >> (levels - 1)),
            ]
        )
        self.decoder = nn.ModuleList()
        for level, c in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                self.decoder.append(stage(width + skips.pop(), c, longer >> level, decoder=True))
                width = c
            if level:
                self.decoder.append(between(width, "up"))
        self.out_norm = GroupNorm(config.norm_groups, width, eps=1e-5)
        self.out = zero_(nn.Conv2d(width, self.out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `Denoiser.forward`."""
        check_sides(x, self.channels, self.divisor)
        c = nn.functional.silu(self.condition(t, y))
        h = self.stem(x)
        skips = [h]
        for layer in self.encoder:
            h = layer(h, c)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, c)
        for layer in self.decoder:
            h = layer(torch.cat([h, skips.pop()], dim=1) if isinstance(layer, Stage) else h, c)
        return self.out(nn.functional.silu(self.out_norm(h)))


class Stage(nn.Module):
    """A residual block, followed by attention unless `heads` is None."""

    def __init__(self, config: UNetConfig, c_in: int, c_out: int, emb: int, heads: int | None, size: int) -> None:
        super().__init__()
        self.res = ResBlock(config, c_in, c_out, emb)
        self.attention: PixelAttention | TimeAttention | None = None
        if heads is None:
            return
        norm = GroupNorm(config.norm_groups, c_out, eps=1e-5)
        if config.tmsa:
            self.attention = TimeAttention(norm, c_out, heads, size, emb, scale=0.0)
        else:
            qkv, proj = nn.Conv2d(c_out, 3 * c_out, 1), zero_(nn.Conv2d(c_out, c_out, 1))
            self.attention = PixelAttention(heads, norm, qkv, proj)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map (B, C_in, H, W) and the activated condition (B, emb) to (B, C_out, H, W)."""
        x = self.res(x, c)
        return x if self.attention is None else x + self.attention(x, c)


class ResBlock(nn.Module):
    """ADM's residual block: GN, SiLU, conv | condition | GN, SiLU, dropout, conv (zero-initialised) | skip.

    Both branches are resampled before the first convolution: "down" by the mean of 2x2 pixels, "up" by nearest x2.
    """

    def __init__(self, config: UNetConfig, c_in: int, c_out: int, emb: int, direction: Direction | None = None) -> None:
        super().__init__()
        self.direction, self.scale_shift = direction, config.use_scale_shift_norm
        groups = config.norm_groups
        for width in (c_in, c_out):
            check_divides("norm_groups", groups, width, "a level's width, alone or with its skip")
        self.norm1 = GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.condition = Linear(emb, c_out * (2 if self.scale_shift else 1))
        self.norm2 = GroupNorm(groups, c_out, eps=1e-5)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zero_(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map (B, C_in, H, W) and the activated condition (B, emb) to (B, C_out, H', W')."""
        h, x = resample(nn.functional.silu(self.norm1(x)), self.direction), resample(x, self.direction)
        h = self.conv1(h)
        condition = self.condition(c)[:, :, None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + condition)
        return self.skip(x) + self.conv2(self.dropout(nn.functional.silu(h)))


class Downsample(nn.Module):
    """Downsampling by 2: a strided convolution, or the mean of 2x2 pixels."""

    def __init__(self, channels: int, convolve: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if convolve else None

    def forward(self, x: Tensor, _c: Tensor) -> Tensor:
        return resample(x, "down") if self.conv is None else self.conv(x)


class Upsample(nn.Module):
    """Upsampling by 2: nearest neighbour, then optionally a convolution."""

    def __init__(self, channels: int, convolve: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if convolve else nn.Identity()

    def forward(self, x: Tensor, _c: Tensor) -> Tensor:
        return self.conv(resample(x, "up"))


def laptop_sizes(height: int, width: int) -> dict[str, Any]:
    """Return config keys for a laptop, see `laptop`."""
    return laptop.unet(height, width, [2, 3]) | {"num_res_blocks": 1, "norm_groups": 8}


_FLAGS: dict[str, Any] = {"attention_resolutions": [32, 16, 8], "resblock_updown": True}
_HEADS: dict[str, Any] = _FLAGS | {"num_head_channels": 64}
_64 = UNetConfig(192, [1, 2, 3, 4], 3, dropout=0.1, **_HEADS)
_128 = UNetConfig(256, [1, 1, 2, 3, 4], num_heads=4, **_FLAGS)
_256 = UNetConfig(256, [1, 1, 2, 2, 4, 4], **_HEADS)
_512 = UNetConfig(256, [0.5, 1, 1, 2, 2, 4, 4], **_HEADS)
_SHAPE = {"channels": 3, "null_class": False, "learn_sigma": True}
PRESETS = {
    name: Preset(config, _SHAPE | {"image_size": size, "num_classes": classes}, f"ADM's code: {stated}", cost)
    for name, config, size, classes, stated, cost in (
        ("ADM-64", _64, 64, 1000, "295,904,454, 109.7", Cost(295_904_454, 109_678_018_560)),
        ("ADM-128", _128, 128, 1000, "421,529,606, 306.9", Cost(421_529_606, 306_927_894_528)),
        ("ADM-256", _256, 256, 1000, "553,838,086; DiT, Table 6: 1120", Cost(553_838_086, 1_119_832_768_512)),
        ("ADM-256-uncond", _256, 256, 0, "552,814,086", Cost(552_814_086, 1_119_832_768_512)),
        ("ADM-512", _512, 512, 1000, "558,997,638; DiT, Table 6: 1983", Cost(558_997_638, 1_982_334_763_008)),
    )
}
