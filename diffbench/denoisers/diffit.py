"""DiffiT in image space: a U-shaped transformer with time-dependent self-attention (Hatamizadeh et al. 2024).

The paper leaves open the heads, the kind of skip, the resampling kernels and the initialisation in image space;
each choice made here is a key of `DiffiTConfig` or stated beside the layer.
"""

from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from diffbench.denoisers.layers import (
    ConditionEmbedding,
    GroupNorm,
    check_divides,
    from_windows,
    relative_position_index,
    to_windows,
    xavier_,
    zero_,
)


@dataclass
class DiffiTConfig:
    """Sizes of an image-space DiffiT (paper, Tables S.2 and S.3, §I.1); the defaults are its CIFAR-10 model."""

    channels: list[int] = field(default_factory=lambda: [128, 256, 256])
    """Width of each stage; the resolution halves between stages."""
    blocks: list[int] = field(default_factory=lambda: [4, 4, 4])
    """Residual blocks of each stage, in the encoder and again in the decoder (L1, L2, ... of the paper)."""
    window: int = 4
    """Side of the attention window; a stage smaller than it is one window."""
    num_heads: int = 4
    mlp_ratio: float = 4.0
    time_dim: int = 512
    """Width of the time token (Table 3)."""
    dropout: float = 0.0
    norm_groups: int = 32
    """Groups of the group normalisation; must divide every width, also that of the concatenated skips."""


class DiffiT(nn.Module):
    """Denoiser of (B, C, H, W) images; see `forward`.

    Args:
        config: sizes.
        image_size: height and width of the input.
        channels: C of the input.
        num_classes: classes 0..num_classes-1; 0 for none (as in the paper's image space).
        null_class: whether label `num_classes` means "no class".
        learn_sigma: whether the output carries C more channels for a learned variance.

    Raises:
        ValueError: if stages or windows do not divide the image, or heads or norm groups a width, or if
            `channels` and `blocks` differ in length.
    """

    def __init__(
        self,
        config: DiffiTConfig,
        image_size: int,
        channels: int,
        num_classes: int = 0,
        null_class: bool = True,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes, self.null_class = num_classes, null_class
        widths, depths = config.channels, config.blocks
        if len(widths) != len(depths):
            raise ValueError(
                f"denoiser.channels has {len(widths)} stages, denoiser.blocks has {len(depths)}: they must agree"
            )
        stages = len(widths)
        check_divides(2 ** (stages - 1), image_size, f"{stages} stages halve the image too often")
        sizes = [image_size >> i for i in range(stages)]

        def stage(c_in: int, i: int) -> Stage:
            window = min(config.window, sizes[i])
            check_divides(window, sizes[i], f"denoiser.window must divide the side of stage {i + 1}")
            c_ins = [c_in] + [widths[i]] * (depths[i] - 1)
            return Stage([ResBlock(config, c, widths[i], window) for c in c_ins])

        self.condition = ConditionEmbedding(config.time_dim, 256, num_classes, null_class)
        self.tokenizer = nn.Conv2d(channels, widths[0], 3, padding=1)
        inputs = [widths[0], *widths[:-1]]
        self.encoder = nn.ModuleList([stage(inputs[i], i) for i in range(stages)])
        self.down = nn.ModuleList([nn.Conv2d(c, c, 3, stride=2, padding=1) for c in widths[:-1]])
        # Decoder, coarsest first: upsample, concatenate the encoder's stage of that resolution, blocks.
        self.up = nn.ModuleList([nn.Conv2d(c, c, 3, padding=1) for c in widths[:0:-1]])
        self.decoder = nn.ModuleList([stage(widths[i + 1] + widths[i], i) for i in reversed(range(stages - 1))])
        self.head_norm = GroupNorm(config.norm_groups, widths[0], eps=1e-5)
        self.head = zero_(nn.Conv2d(widths[0], channels * (2 if learn_sigma else 1), 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predicts from a noisy image.

        Args:
            x: (B, C, H, W) noisy input.
            t: (B,) time in the process's units.
            y: (B,) int64 labels, `num_classes` for "no class"; None for no class at all.

        Returns:
            (B, C, H, W), or (B, 2C, H, W) with a learned variance.
        """
        c = self.condition(t, y)
        h = self.tokenizer(x)
        skips = []
        for i, blocks in enumerate(self.encoder):
            h = blocks(h, c)
            if i < len(self.down):
                skips.append(h)
                h = self.down[i](h)
        for up, blocks in zip(self.up, self.decoder, strict=True):
            h = blocks(torch.cat([up(interpolate(h, scale_factor=2.0)), skips.pop()], dim=1), c)
        return self.head(self.head_norm(h))


class Stage(nn.ModuleList):
    """The residual blocks of one resolution, one after the other."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self:
            x = block(x, c)
        return x


class ResBlock(nn.Module):
    """x + DiffiT-Block(Conv3x3(Swish(GN(x)))), Eq. 9 and 10; a 1x1 convolution carries x where the width changes."""

    def __init__(self, config: DiffiTConfig, c_in: int, c_out: int, window: int) -> None:
        super().__init__()
        check_divides(config.norm_groups, c_in, "denoiser.norm_groups must divide each width, skips included")
        self.window = window
        self.norm = GroupNorm(config.norm_groups, c_in, eps=1e-5)
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.block = DiffiTBlock(config, c_out, window)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, C_in, H, W) and the time token (B, time_dim) to (B, C_out, H, W)."""
        height, width = x.shape[2:]
        h = self.conv(nn.functional.silu(self.norm(x)))
        tokens = self.block(to_windows(h, self.window), c)
        out: Tensor = self.skip(x) + from_windows(tokens, self.window, height, width)
        return out


class DiffiTBlock(nn.Module):
    """Eq. 7 and 8: x + TMSA(LN(x), time), then x + MLP(LN(x)). Norms without affine, eps 1e-6, as released."""

    def __init__(self, config: DiffiTConfig, dim: int, window: int) -> None:
        super().__init__()
        hidden = int(dim * config.mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = TMSA(dim, config.num_heads, window, config.time_dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(config.dropout)
        xavier_(self.mlp)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B * windows, window^2, D) tokens, windows of a sample adjacent, and (B, time_dim) to the same shape."""
        x = x + self.dropout(self.attention(self.norm1(x), c))
        return x + self.dropout(self.mlp(self.norm2(x)))


class TMSA(nn.Module):
    """Time-dependent multi-head self-attention (Eq. 3 to 6).

    q, k and v are each a projection of the token plus one of the time token; a learned relative-position bias,
    free of time, is added after the scaling by 1/sqrt(d).

    Args:
        dim: width of the tokens, divisible by `num_heads`.
        num_heads: heads.
        window: side of the window.
        time_dim: width of the time token.
    """

    bias_index: Tensor

    def __init__(self, dim: int, num_heads: int, window: int, time_dim: int) -> None:
        super().__init__()
        check_divides(num_heads, dim, "denoiser.num_heads must divide each stage's width")
        self.heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.qkv_time = nn.Linear(time_dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        self.register_buffer("bias_index", relative_position_index(window), persistent=False)
        xavier_(self)
        nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B * windows, N, D) tokens and (B, time_dim) time tokens to (B * windows, N, D)."""
        windows = len(x) // len(c)
        time = self.qkv_time(c).repeat_interleave(windows, dim=0)[:, None]
        qkv = rearrange(self.qkv(x) + time, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        bias = rearrange(self.bias[self.bias_index], "n m h -> 1 h n m")
        q, k, v = qkv
        h = scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out: Tensor = self.proj(rearrange(h, "b h n d -> b n (h d)"))
        return out
