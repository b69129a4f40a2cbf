"""The common base of DiT and the latent DiffiT: patch embedding, positions, condition, blocks, unpatchifying."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffbench.denoisers.base import Denoiser, check_divides, check_shape, check_sizes
from diffbench.denoisers.layers import ConditionEmbedding, both_sides, zero_
from diffbench.denoisers.positions import sincos_position_table

IMAGENET_LATENT = {"image_size": 32, "channels": 4, "num_classes": 1000, "learn_sigma": True}
"""Input and output of the published latent transformers: encoded ImageNet at 256x256."""


@dataclass
class PatchConfig:
    """Sizes of a Vision Transformer (DiT, Table 1: S 12/384/6, B 12/768/12, L 24/1024/16, XL 28/1152/16)."""

    patch_size: int = 2
    """Side of the square patch that becomes one token; must divide the image's height and width."""
    hidden_size: int = 384
    """Width of the tokens; must be divisible by `num_heads` and by 4."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 6
    mlp_ratio: float = 4.0
    """Hidden width of the MLP as a multiple of `hidden_size`."""
    dropout: float = 0.0
    """Dropout after attention and MLP; the papers use none."""
    gradient_checkpointing: bool = False
    """Store only the blocks' inputs for the backward pass and recompute the rest: less memory, more time."""

    def __post_init__(self) -> None:
        check_sizes(self, "patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio")
        check_divides("num_heads", self.num_heads, self.hidden_size, "denoiser.hidden_size=")
        if self.hidden_size % 4:
            raise ValueError(
                f"denoiser.hidden_size: must be divisible by 4 for the position table, got {self.hidden_size}"
            )


class PatchTransformer(Denoiser):
    """A transformer over image patches, for any height and width that the patch divides; subclasses add the head.

    Args:
        block: builds one block, given the height and width of the token grid.
    """

    final: nn.Linear
    """The last layer, from a token to the `patch_values` values of its patch."""

    def __init__(
        self,
        config: PatchConfig,
        image_size: int | tuple[int, int],
        channels: int,
        num_classes: int,
        null_class: bool,
        learn_sigma: bool,
        block: Callable[[tuple[int, int]], nn.Module],
    ) -> None:
        super().__init__(channels, num_classes, null_class, learn_sigma)
        p, d = config.patch_size, config.hidden_size
        self.image_size = height, width = both_sides(image_size)
        for side in self.image_size:
            check_divides("patch_size", p, side, "a side of the image")
        self.gradient_checkpointing = config.gradient_checkpointing
        self.patch_size, self.grid = p, (height // p, width // p)
        self.patch_values = p * p * self.out_channels
        self.patch = nn.Conv2d(channels, d, kernel_size=p, stride=p)
        self.register_buffer("position", sincos_position_table(d, *self.grid).float()[None])
        self.condition = ConditionEmbedding(d, 256, num_classes, null_class)
        self.blocks = nn.ModuleList([block(self.grid) for _ in range(config.depth)])

    def initialise_first_and_last(self) -> None:
        """Initialise the patch embedding, and zero the last layer `final`, which the subclass must have set."""
        zero_(self.patch)
        nn.init.xavier_uniform_(self.patch.weight.flatten(1))
        zero_(self.final)

    def tokens(self, x: Tensor) -> Tensor:
        """Embed images (B, C, H, W) as tokens (B, N, D) and add their positions.

        Raises:
            ValueError: if the image size is not the network's.
        """
        check_shape(x, self.channels, *self.image_size)
        return rearrange(self.patch(x), "b d h w -> b (h w) d") + self.position

    def run_blocks(self, tokens: Tensor, c: Tensor) -> Tensor:
        """Pass tokens (B, N, D) through all blocks with the condition `c`."""
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, c, use_reentrant=False)
            else:
                tokens = block(tokens, c)
        return tokens

    def image(self, patches: Tensor) -> Tensor:
        """Assemble patches (B, N, p * p * C) into images (B, C, H, W); within a patch, channels vary fastest."""
        p = self.patch_size
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=self.grid[0], p=p, q=p)
