"""DDPM++: the U-Net of Song et al. 2021 as trained by EDM (Karras et al. 2022), with standard encoder and decoder."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, silu

from diffbench.denoisers import laptop
from diffbench.denoisers.base import Denoiser, Preset, check_divides, check_sides, check_sizes, unet_levels
from diffbench.denoisers.flops import Cost
from diffbench.denoisers.layers import (
    Direction,
    FourierFeatures,
    GroupNorm,
    PixelAttention,
    TimeFeatures,
    augment_embedding,
    labels_or_null,
    resample,
    timestep_embedding,
)
from diffbench.denoisers.linear import Linear
from diffbench.denoisers.tmsa import TimeAttention


@dataclass
class DDPMppConfig:
    """Sizes and options of DDPM++; the defaults are EDM's CIFAR-10 network without its augmentation input."""

    model_channels: int = 128
    """Base width, multiplied by `channel_mult` at each level."""
    channel_mult: list[int] = field(default_factory=lambda: [2, 2, 2])
    """One factor per level; the resolution halves between levels."""
    num_blocks: int = 4
    """Residual blocks per level in the encoder; the decoder has one more."""
    attention_resolutions: list[int] | None = None
    """Resolutions (pixels of the longer side) with attention; the first block of the decoder always has it. null: 16,
    if there is such a level."""
    dropout: float = 0.13
    """0.13 for CIFAR-10, 0.05 for FFHQ-64."""
    augment_dim: int | None = None
    """Width of the augmentation label `augment`; 9 in EDM's pipeline."""
    embedding_mult: int = 4
    """Width of the embedding as a multiple of `model_channels`."""
    num_heads: int = 1
    time_features: TimeFeatures = "sinusoidal"
    """Time features that the embedding MLP takes."""
    fourier_scale: float = 16.0
    """Standard deviation of the Fourier frequencies, in periods per unit of time; 16 suits EDM's ln(sigma)/4."""
    tmsa: bool = False
    """Replace the attention by DiffiT's time-dependent attention (DiffiT, Table 5)."""

    def __post_init__(self) -> None:
        numbers = ("model_channels", "channel_mult", "num_blocks", "augment_dim", "embedding_mult", "num_heads")
        check_sizes(self, *numbers, "fourier_scale")


class DDPMpp(Denoiser):
    """DDPM++ for images whose sides can be halved between all levels; see `Denoiser`.

    The null class, if there is one, is a label vector of zeros.
    """

    def __init__(
        self,
        config: DDPMppConfig,
        image_size: int | tuple[int, int],
        channels: int,
        num_classes: int = 0,
        null_class: bool = True,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__(channels, num_classes, null_class, learn_sigma)
        widths, attended, longer = unet_levels(config, image_size)
        levels, self.side = len(widths), longer
        self.divisor = longer if config.tmsa else 2 ** (levels - 1)
        self.embedding = Embedding(config, num_classes)
        emb = config.embedding_mult * config.model_channels

        def block(c_in: int, c_out: int, level: int, attention: bool = False, **options: Any) -> Block:
            return Block(config, c_in, c_out, emb, longer >> level if attention else None, **options)

        width = config.model_channels
        self.stem = xavier_conv(channels, width, 3)
        self.encoder = nn.ModuleList()
        skips = [width]
        for level, c in enumerate(widths):
            attention = longer >> level in attended
            if level:
                self.encoder.append(block(width, width, level, direction="down"))
                skips.append(width)
            for _ in range(config.num_blocks):
                self.encoder.append(block(width, c, level, attention))
                width = c
                skips.append(width)
        self.decoder = nn.ModuleList()
        for level, c in reversed(list(enumerate(widths))):
            attention = longer >> level in attended
            if level == levels - 1:
                self.decoder.extend([block(width, width, level, attention=True), block(width, width, level)])
            else:
                self.decoder.append(block(width, width, level, direction="up"))
            for i in range(config.num_blocks + 1):
                attends = attention and i == config.num_blocks
                self.decoder.append(block(width + skips.pop(), c, level, attends, joins=True))
                width = c
        self.out_norm = group_norm(width)
        self.out = xavier_conv(width, self.out_channels, 3, scale=1e-5)

    def label_rows(self) -> Tensor | None:
        """See `Denoiser.label_rows`; the rows are scaled columns of the label layer, the null class is zeros."""
        if self.embedding.label is None:
            return None
        rows = self.embedding.label.weight.T * math.sqrt(self.num_classes)
        return nn.functional.pad(rows, (0, 0, 0, int(self.null_class)))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """See `Denoiser.forward`; `augment` is the (B, augment_dim) augmentation label, None for unaugmented images."""
        check_sides(x, self.channels, self.divisor)
        if self.num_classes:
            y = labels_or_null(y, len(t), self.num_classes, self.null_class, t.device)
        c = self.embedding(t, y, augment)
        h = self.stem(x)
        skips = [h]
        for block in self.encoder:
            h = block(h, c)
            skips.append(h)
        for block in self.decoder:
            h = block(torch.cat([h, skips.pop()], dim=1) if block.joins else h, c)
        return self.out(silu(self.out_norm(h)))


class Embedding(nn.Module):
    """Embedding of time (sines first, endpoint included), one-hot class times sqrt(classes) and augmentation label."""

    def __init__(self, config: DDPMppConfig, num_classes: int) -> None:
        super().__init__()
        width, emb = config.model_channels, config.embedding_mult * config.model_channels
        self.width, self.num_classes = width, num_classes
        fourier = config.time_features == "fourier"
        self.fourier = FourierFeatures(width, config.fourier_scale) if fourier else None
        self.label = xavier_linear(num_classes, width) if num_classes else None
        self.augment = xavier_linear(config.augment_dim, width, bias=False) if config.augment_dim else None
        self.layer1 = xavier_linear(width, emb)
        self.layer2 = xavier_linear(emb, emb)

    def forward(self, t: Tensor, y: Tensor | None, augment: Tensor | None) -> Tensor:
        """Map times (B,), labels or their weights, and augmentation labels (B, augment_dim) to (B, emb), activated."""
        features = self.fourier(t) if self.fourier else timestep_embedding(t, self.width, 10_000.0, True, True)
        h = features.to(self.layer1.weight.dtype)
        if self.label is not None and y is not None:
            # Without its last column, the null class is a row of zeros.
            weights = y if y.is_floating_point() else one_hot(y, self.num_classes + 1)
            h = h + self.label(weights[:, : self.num_classes].to(h.dtype) * math.sqrt(self.num_classes))
        if augment is not None:
            h = h + augment_embedding(self.augment, augment, h.dtype)
        return silu(self.layer2(silu(self.layer1(h))))


class Block(nn.Module):
    """GN, SiLU, conv | add embedding | GN, SiLU, dropout, conv | add skip, / sqrt 2 | add attention, / sqrt 2.

    Args:
        config: sizes.
        c_in: width of the input.
        c_out: width of the output.
        emb: width of the embedding.
        size: side of the image on which attention acts; None for no attention.
        direction: resampling at the start: "down" by the mean of 2x2 pixels, "up" by nearest neighbour; None for none.
        joins: whether the network concatenates a skip to the input.
    """

    def __init__(
        self,
        config: DDPMppConfig,
        c_in: int,
        c_out: int,
        emb: int,
        size: int | None,
        direction: Direction | None = None,
        joins: bool = False,
    ) -> None:
        super().__init__()
        self.direction, self.joins = direction, joins
        self.norm1 = group_norm(c_in)
        self.conv1 = xavier_conv(c_in, c_out, 3)
        self.condition = xavier_linear(emb, c_out)
        self.norm2 = group_norm(c_out)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = xavier_conv(c_out, c_out, 3, scale=1e-5)
        changes = c_in != c_out or direction is not None
        self.skip = xavier_conv(c_in, c_out, 1) if changes else nn.Identity()
        self.attention: PixelAttention | TimeAttention | None = None
        if size is None:
            return
        heads = config.num_heads
        check_divides("num_heads", heads, c_out, "a width with attention")
        if config.tmsa:
            self.attention = TimeAttention(group_norm(c_out), c_out, heads, size, emb, scale=1e-5)
        else:
            qkv = xavier_conv(c_out, 3 * c_out, 1, scale=math.sqrt(0.2))
            self.attention = PixelAttention(heads, group_norm(c_out), qkv, xavier_conv(c_out, c_out, 1, scale=1e-5))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map (B, C_in, H, W) and the activated embedding (B, emb) to (B, C_out, H', W')."""
        h, x = resample(silu(self.norm1(x)), self.direction), resample(x, self.direction)
        h = self.conv1(h) + self.condition(c)[:, :, None, None]
        h = self.conv2(self.dropout(silu(self.norm2(h))))
        h = (self.skip(x) + h) * math.sqrt(0.5)
        return h if self.attention is None else (h + self.attention(h, c)) * math.sqrt(0.5)


def group_norm(channels: int) -> GroupNorm:
    """Build a group normalisation of 32 groups, or fewer so that each has at least four channels."""
    groups = min(32, channels // 4)
    if not groups or channels % groups:
        raise ValueError(
            f"denoiser.model_channels: {groups} norm groups (of at least four channels) do not divide {channels},"
            " a level's width, alone or with its skip"
        )
    return GroupNorm(groups, channels, eps=1e-6)


def xavier_conv(c_in: int, c_out: int, kernel: int, scale: float = 1.0) -> nn.Conv2d:
    """Build a convolution with scaled Xavier-uniform weights and zero bias."""
    layer = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
    nn.init.xavier_uniform_(layer.weight, gain=scale)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def xavier_linear(c_in: int, c_out: int, bias: bool = True) -> nn.Linear:
    """Build a Linear with Xavier-uniform weights and zero bias."""
    layer = Linear(c_in, c_out, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def laptop_sizes(height: int, width: int) -> dict[str, Any]:
    """Return config keys for a laptop, see `laptop`."""
    return laptop.unet(height, width, [2, 2]) | {"num_blocks": 1, "dropout": 0.0}


_CIFAR10 = DDPMppConfig(channel_mult=[2, 2, 2], dropout=0.13, augment_dim=9)
_FFHQ = DDPMppConfig(channel_mult=[1, 2, 2, 2], dropout=0.05, augment_dim=9)
PRESETS = {
    name: Preset(config, {"image_size": size, "channels": 3, "num_classes": classes}, f"EDM's code: {stated}", cost)
    for name, config, size, classes, stated, cost in (
        ("DDPM++-CIFAR10", _CIFAR10, 32, 0, "55,733,891, 21.19", Cost(55_733_891, 21_190_213_632)),
        ("DDPM++-CIFAR10-cond", _CIFAR10, 32, 10, "55,735,299", Cost(55_735_299, 21_190_214_912)),
        ("DDPM++-FFHQ64", _FFHQ, 64, 0, "61,805,571, 41.87", Cost(61_805_571, 41_861_447_680)),
    )
}
