"""DiT: a Vision Transformer whose time and class enter through adaptive layer norm (Peebles & Xie 2023)."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from diffbench.denoisers.layers import ConditionEmbedding, check_divides, sincos_position_table, xavier_, zero_


@dataclass
class DiTConfig:
    """Sizes of a DiT (Table 1 of the paper: S 12/384/6, B 12/768/12, L 24/1024/16, XL 28/1152/16)."""

    patch_size: int = 2
    """Side of the square patch that becomes one token; must divide the image's height and width."""
    hidden_size: int = 384
    """Width of the tokens; divisible by `num_heads` and by 4."""
    depth: int = 12
    """Number of adaLN-Zero blocks."""
    num_heads: int = 6
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over `hidden_size`."""
    dropout: float = 0.0
    """Dropout after attention and MLP; the paper uses none."""


# Table 1: depth, width, heads; each with patches of 2, 4 and 8.
_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
DIT_PRESETS = {
    f"DiT-{size}/{patch}": DiTConfig(patch, width, depth, heads)
    for size, (depth, width, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}


class DiT(nn.Module):
    """Denoiser of (B, C, H, W) images or latents; see `forward`.

    Args:
        config: sizes.
        image_size: height and width of the input.
        channels: C of the input.
        num_classes: classes 0..num_classes-1; 0 for none.
        null_class: whether label `num_classes` means "no class".
        learn_sigma: whether the output carries C more channels for a learned variance.

    Raises:
        ValueError: if the patch does not divide the image or the heads do not divide the width.
    """

    def __init__(
        self,
        config: DiTConfig,
        image_size: int,
        channels: int,
        num_classes: int = 0,
        null_class: bool = True,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__()
        p, d = config.patch_size, config.hidden_size
        check_divides(p, image_size, "denoiser.patch_size must divide the image size")
        check_divides(config.num_heads, d, "denoiser.num_heads must divide denoiser.hidden_size")
        self.num_classes, self.null_class = num_classes, null_class
        self.patch_size, self.grid = p, image_size // p
        out_channels = channels * (2 if learn_sigma else 1)

        self.patch = nn.Conv2d(channels, d, kernel_size=p, stride=p)
        self.register_buffer("position", sincos_position_table(d, self.grid, self.grid).float()[None])
        self.condition = ConditionEmbedding(d, 256, num_classes, null_class)
        self.blocks = nn.ModuleList([DiTBlock(config) for _ in range(config.depth)])
        self.final_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))
        self.final_norm = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.final = nn.Linear(d, p * p * out_channels)
        self._initialise()

    def _initialise(self) -> None:
        xavier_(self.blocks)
        for block in self.blocks:
            assert isinstance(block, DiTBlock)
            zero_(block.modulation)
        zero_(self.patch)
        nn.init.xavier_uniform_(self.patch.weight.view(self.patch.weight.shape[0], -1))
        zero_(self.final_modulation)
        zero_(self.final)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predicts from a noisy image.

        Args:
            x: (B, C, H, W) noisy input.
            t: (B,) time in the process's units.
            y: (B,) int64 labels, `num_classes` for "no class"; None for no class at all.

        Returns:
            (B, C, H, W), or (B, 2C, H, W) with a learned variance.
        """
        tokens = rearrange(self.patch(x), "b d h w -> b (h w) d") + self.position
        c = self.condition(t, y)
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.final_modulation(c)[:, None].chunk(2, dim=-1)
        tokens = self.final(modulate(self.final_norm(tokens), shift, scale))
        p = self.patch_size
        return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=self.grid, p=p, q=p)


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-Zero, DiT §3.2)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        d = config.hidden_size
        hidden = int(d * config.mlp_ratio)
        self.heads = config.num_heads
        self.norm1 = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(d, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, d))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N, D) tokens and (B, D) condition to (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.dropout(self.attention(modulate(self.norm1(x), shift1, scale1)))
        return x + gate2 * self.dropout(self.mlp(modulate(self.norm2(x), shift2, scale2)))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        out: Tensor = self.proj(rearrange(scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
        return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)
