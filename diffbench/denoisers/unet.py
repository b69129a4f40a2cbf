"""U-Net with residual blocks and attention, the ADM family (Dhariwal & Nichol 2021, §3 and appendix)."""

from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, scaled_dot_product_attention

from diffbench.denoisers.layers import (
    ConditionEmbedding,
    GroupNorm,
    TimeFeatures,
    check_divides,
    check_sides,
    zero_,
)
from diffbench.denoisers.tmsa import TimeAttention


@dataclass
class UNetConfig:
    """Sizes and switches, under the names of ADM's published flags."""

    model_channels: int = 128
    """Base width, multiplied by `channel_mult` at each level."""
    channel_mult: list[float] = field(default_factory=lambda: [1, 2, 2, 2])
    """One factor a level; the resolution halves between levels."""
    num_res_blocks: int = 2
    """Residual blocks a level in the encoder; the decoder has one more."""
    attention_resolutions: list[int] = field(default_factory=lambda: [16])
    """Resolutions (pixels a side) at which attention follows each residual block; the middle always has it."""
    num_heads: int = 4
    """Attention heads; ignored where `num_head_channels` is set."""
    num_head_channels: int | None = None
    """Channels a head."""
    dropout: float = 0.0
    norm_groups: int = 32
    """Groups of the group normalisation; must divide every level's width."""
    use_scale_shift_norm: bool = True
    """Condition scales and shifts the second norm; otherwise it is added before it."""
    resblock_updown: bool = False
    """Resample inside residual blocks; otherwise by strided convolution, and nearest x2 with a convolution."""
    conv_resample: bool = True
    """Whether resampling outside residual blocks has a convolution; otherwise mean of 2x2, and nearest x2."""
    num_heads_upsample: int | None = None
    """Attention heads in the decoder, where they differ; ignored where `num_head_channels` is set."""
    time_features: TimeFeatures = "sinusoidal"
    """Features of the time under the MLP."""
    fourier_scale: float = 16.0
    """Standard deviation of Fourier frequencies, in periods per unit of time: 16 suits EDM's ln(sigma)/4."""
    tmsa: bool = False
    """DiffiT's time-dependent attention in place of the attention (DiffiT, Table 5)."""


class UNet(nn.Module):
    """Denoiser of (B, C, H, W) images or latents; see `forward`.

    Args:
        config: sizes.
        image_size: height and width of the input.
        channels: C of the input.
        num_classes: classes 0..num_classes-1; 0 for none.
        null_class: whether label `num_classes` means "no class".
        learn_sigma: whether the output carries C more channels for a learned variance.

    Raises:
        ValueError: if the levels do not divide the image, or heads or norm groups a level's width.
    """

    def __init__(
        self,
        config: UNetConfig,
        image_size: int,
        channels: int,
        num_classes: int = 0,
        null_class: bool = True,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.num_classes, self.null_class = num_classes, null_class
        widths = [int(config.model_channels * m) for m in config.channel_mult]
        levels = len(widths)
        factor = 2 ** (levels - 1)
        check_divides(factor, image_size, f"{levels} levels of denoiser.channel_mult halve the image too often")
        self.divisor = image_size if config.tmsa else factor
        for width in widths:
            check_divides(config.norm_groups, width, "denoiser.norm_groups must divide each level's width")
        emb = 4 * config.model_channels
        self.condition = ConditionEmbedding(
            emb, config.model_channels, num_classes, null_class, config.time_features, config.fourier_scale
        )

        def heads(width: int, decoder: bool = False) -> int:
            per_head = config.num_head_channels
            if per_head is None:
                return (config.num_heads_upsample if decoder else None) or config.num_heads
            check_divides(per_head, width, "denoiser.num_head_channels must divide the width where attention acts")
            return width // per_head

        def stage(c_in: int, c_out: int, size: int, decoder: bool = False) -> Stage:
            there = size in config.attention_resolutions
            return Stage(config, c_in, c_out, emb, heads(c_out, decoder) if there else None, size)

        def resample(width: int, direction: str) -> nn.Module:
            if config.resblock_updown:
                return ResBlock(config, width, width, emb, resample=direction)
            return (Downsample if direction == "down" else Upsample)(width, config.conv_resample)

        width = widths[0]
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.encoder = nn.ModuleList()
        skips = [width]
        for level, c in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.encoder.append(stage(width, c, image_size >> level))
                width = c
                skips.append(width)
            if level < levels - 1:
                self.encoder.append(resample(width, "down"))
                skips.append(width)
        self.middle = nn.ModuleList(
            [
                Stage(config, width, width, emb, heads(width), image_size // factor),
                Stage(config, width, width, emb, None, image_size // factor),
            ]
        )
        self.decoder = nn.ModuleList()
        for level, c in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                self.decoder.append(stage(width + skips.pop(), c, image_size >> level, decoder=True))
                width = c
            if level:
                self.decoder.append(resample(width, "up"))
        self.out_norm = GroupNorm(config.norm_groups, width, eps=1e-5)
        self.out = zero_(nn.Conv2d(width, channels * (2 if learn_sigma else 1), 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predicts from a noisy image.

        Args:
            x: (B, C, H, W) noisy input.
            t: (B,) time in the process's units.
            y: (B,) int64 labels, `num_classes` for "no class"; None for no class at all.

        Returns:
            (B, C, H, W), or (B, 2C, H, W) with a learned variance.

        Raises:
            ValueError: if the levels do not divide the image; any multiple will do.
        """
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
        out: Tensor = self.out(nn.functional.silu(self.out_norm(h)))
        return out


class Stage(nn.Module):
    """A residual block, followed by attention where `heads` is a number."""

    def __init__(self, config: UNetConfig, c_in: int, c_out: int, emb: int, heads: int | None, size: int) -> None:
        super().__init__()
        self.res = ResBlock(config, c_in, c_out, emb)
        self.attention: Attention | TimeAttention | None = None
        if heads is not None and config.tmsa:
            norm = GroupNorm(config.norm_groups, c_out, eps=1e-5)
            self.attention = TimeAttention(norm, c_out, heads, size, emb, scale=0.0)
        elif heads is not None:
            self.attention = Attention(c_out, heads, config.norm_groups)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, C_in, H, W) and the activated condition (B, emb) to (B, C_out, H, W)."""
        x = self.res(x, c)
        return x if self.attention is None else x + self.attention(x, c)


class ResBlock(nn.Module):
    """GN, SiLU, conv | condition | GN, SiLU, dropout, conv (zero at first) | skip (ADM).

    `resample` "down" (2x2 mean) or "up" (nearest) acts on both branches before the first convolution.
    """

    def __init__(self, config: UNetConfig, c_in: int, c_out: int, emb: int, resample: str | None = None) -> None:
        super().__init__()
        self.resample, self.scale_shift = resample, config.use_scale_shift_norm
        groups = config.norm_groups
        check_divides(groups, c_in, "denoiser.norm_groups must divide each level's width, skips included")
        self.norm1 = GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.condition = nn.Linear(emb, c_out * (2 if self.scale_shift else 1))
        self.norm2 = GroupNorm(groups, c_out, eps=1e-5)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zero_(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, C_in, H, W) and the activated condition (B, emb) to (B, C_out, H', W')."""
        h = nn.functional.silu(self.norm1(x))
        if self.resample == "down":
            h, x = avg_pool2d(h, 2), avg_pool2d(x, 2)
        elif self.resample == "up":
            h, x = interpolate(h, scale_factor=2.0), interpolate(x, scale_factor=2.0)
        h = self.conv1(h)
        condition = self.condition(c)[:, :, None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + condition)
        out: Tensor = self.skip(x) + self.conv2(self.dropout(nn.functional.silu(h)))
        return out


class Attention(nn.Module):
    """Self-attention over all pixels: GN, qkv, softmax(q k / sqrt d) v, projection (zero at first)."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        check_divides(heads, channels, "denoiser.num_heads must divide the width where attention acts")
        self.heads = heads
        self.norm = GroupNorm(groups, channels, eps=1e-5)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero_(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, _c: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape, without the residual."""
        height = x.shape[2]
        pattern = "b (three heads d) h w -> three b heads (h w) d"
        q, k, v = rearrange(self.qkv(self.norm(x)), pattern, three=3, heads=self.heads)
        h = scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(rearrange(h, "b heads (h w) d -> b (heads d) h w", h=height))
        return out


class Downsample(nn.Module):
    """Halves the resolution by a strided convolution, or by the mean of 2x2 pixels."""

    def __init__(self, channels: int, convolve: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if convolve else None

    def forward(self, x: Tensor, _c: Tensor) -> Tensor:
        out: Tensor = avg_pool2d(x, 2) if self.conv is None else self.conv(x)
        return out


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a convolution where asked."""

    def __init__(self, channels: int, convolve: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if convolve else nn.Identity()

    def forward(self, x: Tensor, _c: Tensor) -> Tensor:
        out: Tensor = self.conv(interpolate(x, scale_factor=2.0))
        return out
