"""DiffiT in image space: a U-shaped transformer with time-dependent self-attention (Hatamizadeh et al. 2024).

For image space, the paper does not specify the number of heads, the kind of skip, the resampling kernels or the
initialisation; each choice made here is a key of `DiffiTConfig` or noted next to the layer.
"""

from dataclasses import dataclass, field
from math import gcd
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from diffbench.denoisers import laptop
from diffbench.denoisers.base import Denoiser, Preset, check_divides, check_halves, check_shape, check_sizes
from diffbench.denoisers.flops import Cost
from diffbench.denoisers.layers import (
    ConditionEmbedding,
    GroupNorm,
    TimeFeatures,
    both_sides,
    from_windows,
    to_windows,
    zero_,
)
from diffbench.denoisers.linear import Linear
from diffbench.denoisers.tmsa import DiffiTBlock, TimeIn


@dataclass
class DiffiTConfig:
    """Sizes of an image-space DiffiT (paper, Tables S.2 and S.3, §I.1); the defaults are its CIFAR-10 model."""

    channels: list[int] = field(default_factory=lambda: [128, 256, 256])
    """Width of each stage; the resolution halves between stages."""
    blocks: list[int] = field(default_factory=lambda: [4, 4, 4])
    """Residual blocks per stage, the same in encoder and decoder (L1, L2, ... in the paper)."""
    window: int | list[int] = 4
    """Side of the attention window, for all stages or per stage (Fig. 8); at most the stage's shorter side."""
    num_heads: int = 4
    mlp_ratio: float = 4.0
    time_dim: int = 512
    """Width of the time token (Table 3)."""
    dropout: float = 0.0
    norm_groups: int = 32
    """Groups of the group normalisation; must divide every width, including those with a concatenated skip."""
    token_dim: int | None = None
    """Width of queries, keys and values (Table 3); null: the stage's width."""
    skip: Literal["concat", "add", "none"] = "concat"
    """Skip connection from encoder to decoder at each resolution; the paper shows one but not its kind."""
    resample: Literal["conv", "bilinear"] = "conv"
    """conv: 3x3 convolutions, strided on the way down, after nearest x2 on the way up; bilinear: no weights (§I.1)."""
    time_in: TimeIn = "qkv"
    """Conditioning of the blocks on the time (Tables 6 and 7; adaln instead of TMSA); see `tmsa.TimeIn`."""
    tmsa: Literal["both", "encoder", "decoder", "none"] = "both"
    """Halves that use `time_in` (Table 4, D: encoder, E: both); the others add the time to each stage's input."""
    time_features: TimeFeatures = "sinusoidal"
    """Time features that the embedding MLP takes (Table 8)."""
    fourier_scale: float = 16.0
    """Standard deviation of the Fourier frequencies, in periods per unit of time; 16 suits EDM's ln(sigma)/4."""
    augment_dim: int | None = None
    """Width of the augmentation label `augment`; 9 in EDM's pipeline, which the paper follows (§I.1)."""

    def __post_init__(self) -> None:
        numbers = ("channels", "blocks", "window", "num_heads", "mlp_ratio", "time_dim", "norm_groups", "token_dim")
        check_sizes(self, *numbers, "fourier_scale", "augment_dim")
        for key, values in {"blocks": self.blocks, "window": self.windows}.items():
            if len(values) != len(self.channels):
                raise ValueError(
                    f"denoiser.{key}: must have one entry for each of the {len(self.channels)} stages of"
                    f" denoiser.channels, got {len(values)}"
                )
        for width in [self.token_dim] if self.token_dim else self.channels:
            what = "denoiser.token_dim=" if self.token_dim else "a width in denoiser.channels"
            check_divides("num_heads", self.num_heads, width, what)

    @property
    def windows(self) -> list[int]:
        """The window of each stage."""
        return self.window if isinstance(self.window, list) else [self.window] * len(self.channels)


class DiffiT(Denoiser):
    """DiffiT for any image height and width that stages and windows divide; see `Denoiser`."""

    def __init__(
        self,
        config: DiffiTConfig,
        image_size: int | tuple[int, int],
        channels: int,
        num_classes: int = 0,
        null_class: bool = True,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__(channels, num_classes, null_class, learn_sigma)
        self.image_size = both_sides(image_size)
        self.resample, self.skip = config.resample, config.skip
        widths, depths = config.channels, config.blocks
        stages = len(widths)
        check_halves("channels", stages, self.image_size)

        def stage(c_in: int, i: int, half: str) -> Stage:
            sides = [side >> i for side in self.image_size]
            window = min(config.windows[i], *sides)
            for side in sides:
                check_divides("window", window, side, f"a side of stage {i + 1}")
            c_ins = [c_in] + [widths[i]] * (depths[i] - 1)
            time_in: TimeIn = config.time_in if config.tmsa in ("both", half) else "none"
            return Stage([ResBlock(config, c, widths[i], window, time_in) for c in c_ins])

        def stage_times(c_ins: list[int], half: str) -> nn.ModuleList:
            plain = config.tmsa not in ("both", half)
            return nn.ModuleList([Linear(config.time_dim, c) for c in c_ins] if plain else [])

        self.condition = ConditionEmbedding(
            config.time_dim,
            256,
            num_classes,
            null_class,
            config.time_features,
            config.fourier_scale,
            config.augment_dim,
        )
        self.tokenizer = nn.Conv2d(channels, widths[0], 3, padding=1)
        inputs = [widths[0], *widths[:-1]]
        self.encoder = nn.ModuleList([stage(inputs[i], i, "encoder") for i in range(stages)])
        self.down = nn.ModuleList([self._resampler(c, stride=2) for c in widths[:-1]])
        # Decoder, coarsest first: upsample, join the encoder's output at that resolution, run the blocks.
        finer = list(reversed(range(stages - 1)))
        inputs_up = [widths[i + 1] + (widths[i] if config.skip == "concat" else 0) for i in finer]
        self.up = nn.ModuleList([self._resampler(widths[i + 1], stride=1) for i in finer])
        self.decoder = nn.ModuleList([stage(c, i, "decoder") for c, i in zip(inputs_up, finer, strict=True)])
        adds = config.skip == "add"
        self.join = nn.ModuleList([nn.Conv2d(widths[i], widths[i + 1], 1) for i in finer] if adds else [])
        self.encoder_time = stage_times(inputs, "encoder")
        self.decoder_time = stage_times(inputs_up, "decoder")
        if config.time_in == "none" and not (self.encoder_time or self.decoder_time):
            self.condition.requires_grad_(False)  # unused: with several devices, DDP would wait for its gradient
        self.head_norm = GroupNorm(config.norm_groups, widths[0], eps=1e-5)
        self.head = zero_(nn.Conv2d(widths[0], self.out_channels, 3, padding=1))

    def _resampler(self, width: int, stride: int) -> nn.Module:
        return nn.Conv2d(width, width, 3, stride=stride, padding=1) if self.resample == "conv" else nn.Identity()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """See `Denoiser.forward`; `augment` is the (B, augment_dim) augmentation label, None for unaugmented images."""
        check_shape(x, self.channels, *self.image_size)
        bilinear = self.resample == "bilinear"
        c = self.condition(t, y, augment)
        h = self.tokenizer(x)
        skips = []
        for i, blocks in enumerate(self.encoder):
            if self.encoder_time:
                h = h + self.encoder_time[i](c)[:, :, None, None]
            h = blocks(h, c)
            if i < len(self.down):
                skips.append(h)
                # For a factor of 2, bilinear interpolation is the mean of 2x2 pixels.
                h = interpolate(h, scale_factor=0.5, mode="bilinear") if bilinear else self.down[i](h)
        for i, blocks in enumerate(self.decoder):
            h = self.up[i](interpolate(h, scale_factor=2.0, mode="bilinear" if bilinear else "nearest"))
            skip = skips.pop()
            if self.skip == "concat":
                h = torch.cat([h, skip], dim=1)
            elif self.skip == "add":
                h = h + self.join[i](skip)
            if self.decoder_time:
                h = h + self.decoder_time[i](c)[:, :, None, None]
            h = blocks(h, c)
        return self.head(self.head_norm(h))


class Stage(nn.ModuleList):
    """The residual blocks of one resolution, run one after the other."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self:
            x = block(x, c)
        return x


class ResBlock(nn.Module):
    """x + DiffiT-Block(Conv3x3(Swish(GN(x)))), Eq. 9 and 10; the skip has a 1x1 convolution if the width changes."""

    def __init__(self, config: DiffiTConfig, c_in: int, c_out: int, window: int, time_in: TimeIn) -> None:
        super().__init__()
        check_divides("norm_groups", config.norm_groups, c_in, "a stage's width, alone or with its skip")
        self.window = window
        self.norm = GroupNorm(config.norm_groups, c_in, eps=1e-5)
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.block = DiffiTBlock(
            c_out,
            config.num_heads,
            window,
            config.time_dim,
            config.mlp_ratio,
            config.dropout,
            time_in,
            config.token_dim,
        )
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map (B, C_in, H, W) and the time token (B, time_dim) to (B, C_out, H, W)."""
        height, width = x.shape[2:]
        h = self.conv(nn.functional.silu(self.norm(x)))
        tokens = self.block(to_windows(h, self.window), c)
        return self.skip(x) + from_windows(tokens, self.window, height, width)


def laptop_sizes(height: int, width: int) -> dict[str, Any]:
    """Return config keys for a laptop, see `laptop`: up to three stages, each divisible by its window."""
    common = gcd(height, width)
    stages = next(n for n in range(min(laptop.levels(height, width), 3), 0, -1) if n == 1 or common >> (n - 1) >= 4)
    windows = [next(w for w in (4, 8, 7, 6, 5, 3, 2, 1) if (common >> i) % w == 0) for i in range(stages)]
    sizes = {"channels": [24, 48, 96][:stages], "blocks": [1] * stages, "window": windows}
    return sizes | {"time_dim": 128, "norm_groups": 8}


def _published(data: str, reading: str, blocks: list[int], stated: str, cost: Cost) -> tuple[str, Preset]:
    # The dropout is EDM's, whose training the paper "strictly followed"; the number of heads is our choice.
    faces = data == "FFHQ64"
    widths, window, dropout = ([128, 256, 256, 256], 8, 0.05) if faces else ([128, 256, 256], 4, 0.13)
    config = DiffiTConfig(widths, blocks, window, dropout=dropout)
    shape = {"image_size": 64 if faces else 32, "channels": 3}
    return f"DiffiT-{data}-{reading}", Preset(config, shape, f"DiffiT, {stated}", cost)


# The paper contradicts itself: four blocks per stage (§H.1), or 2,2,2 and 1,2,2,2 (§I.1); it gives no parameter count.
PRESETS = dict(
    [
        _published("CIFAR10", "H1", [4, 4, 4], "§H.1: 4 blocks a stage", Cost(28_747_987, 7_355_891_712)),
        _published("CIFAR10", "I1", [2, 2, 2], "§I.1: 2 blocks a stage", Cost(15_935_787, 4_331_798_528)),
        _published("FFHQ64", "H1", [4, 4, 4, 4], "§H.1: 4 blocks a stage", Cost(44_857_587, 32_212_647_936)),
        _published("FFHQ64", "I1", [1, 2, 2, 2], "§I.1: 1, 2, 2, 2 blocks", Cost(23_854_515, 15_954_608_128)),
    ]
)
