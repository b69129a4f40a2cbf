"""DiffiT for latents, as released: a Vision Transformer with time-dependent self-attention (Hatamizadeh et al. 2024).

Paper and release disagree on the depth (30 in §H.2, 28 in the published model, which has the paper's 561M parameters),
and only the release has a SiLU before the last layer: both are keys here.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffbench.denoisers.layers import (
    ConditionEmbedding,
    both_sides,
    check_divides,
    check_shape,
    sincos_position_table,
    zero_,
)
from diffbench.denoisers.tmsa import DiffiTBlock, TimeIn


@dataclass
class DiffiTLatentConfig:
    """Sizes of a latent DiffiT; the published model: patch 2, width 1152, depth 28, 16 heads (§H.2)."""

    patch_size: int = 2
    """Side of the square patch that becomes one token; must divide the image's height and width."""
    hidden_size: int = 384
    """Width of the tokens; divisible by `num_heads` and by 4."""
    depth: int = 12
    """Number of DiffiT blocks."""
    num_heads: int = 6
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over `hidden_size`."""
    dropout: float = 0.0
    """Dropout after attention and MLP; the release uses none."""
    head_silu: bool = True
    """A SiLU between the last norm and the last layer, as released; the paper says "a linear layer"."""
    time_in: TimeIn = "qkv"
    """How the time enters a block; see `tmsa.TimeIn`."""
    gradient_checkpointing: bool = False
    """Keep only the blocks' inputs for the backward pass and compute the rest again: less memory, more time."""


class DiffiTLatent(nn.Module):
    """Denoiser of (B, C, H, W) latents; see `forward`. The attention window is the whole grid of tokens.

    Args:
        config: sizes.
        image_size: side of the input, or its height and width.
        channels: C of the input.
        num_classes: classes 0..num_classes-1; 0 for none.
        null_class: whether label `num_classes` means "no class".
        learn_sigma: whether the output carries C more channels for a learned variance.

    Raises:
        ValueError: if the patch does not divide the image or the heads do not divide the width.
    """

    def __init__(
        self,
        config: DiffiTLatentConfig,
        image_size: int | tuple[int, int],
        channels: int,
        num_classes: int = 0,
        null_class: bool = True,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__()
        p, d = config.patch_size, config.hidden_size
        self.image_size = both_sides(image_size)
        for side in self.image_size:
            check_divides(p, side, "denoiser.patch_size must divide the image size")
        check_divides(config.num_heads, d, "denoiser.num_heads must divide denoiser.hidden_size")
        self.channels, self.num_classes, self.null_class = channels, num_classes, null_class
        self.gradient_checkpointing = config.gradient_checkpointing
        self.patch_size, self.grid = p, (self.image_size[0] // p, self.image_size[1] // p)
        out_channels = channels * (2 if learn_sigma else 1)

        def block() -> DiffiTBlock:
            return DiffiTBlock(d, config.num_heads, self.grid, d, config.mlp_ratio, config.dropout, config.time_in)

        self.patch = nn.Conv2d(channels, d, kernel_size=p, stride=p)
        self.register_buffer("position", sincos_position_table(d, *self.grid).float()[None])
        self.condition = ConditionEmbedding(d, 256, num_classes, null_class)
        self.blocks = nn.ModuleList([block() for _ in range(config.depth)])
        self.final_norm = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.final_activation = nn.SiLU() if config.head_silu else nn.Identity()
        self.final = zero_(nn.Linear(d, p * p * out_channels))
        zero_(self.patch)
        nn.init.xavier_uniform_(self.patch.weight.view(d, -1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predicts from a noisy latent.

        Args:
            x: (B, C, H, W) noisy input.
            t: (B,) time in the process's units.
            y: (B,) int64 labels, `num_classes` for "no class"; None for no class at all.

        Returns:
            (B, C, H, W), or (B, 2C, H, W) with a learned variance.

        Raises:
            ValueError: if the latent has another size than the network.
        """
        check_shape(x, self.channels, *self.image_size)
        tokens = rearrange(self.patch(x), "b d h w -> b (h w) d") + self.position
        c = self.condition(t, y)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, c, use_reentrant=False)
            else:
                tokens = block(tokens, c)
        tokens = self.final(self.final_activation(self.final_norm(tokens)))
        p = self.patch_size
        return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=self.grid[0], p=p, q=p)
