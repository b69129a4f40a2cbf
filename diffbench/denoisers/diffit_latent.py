"""DiffiT for latents, as released: a Vision Transformer with time-dependent self-attention (Hatamizadeh et al. 2024).

Paper and release disagree on the depth (30 in §H.2, 28 in the published model, which has the paper's 561M parameters),
and only the release has a SiLU before the last layer: both are keys here.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from diffbench.denoisers.linear import Linear
from diffbench.denoisers.patches import PatchConfig, PatchTransformer
from diffbench.denoisers.tmsa import DiffiTBlock, TimeIn


@dataclass
class DiffiTLatentConfig(PatchConfig):
    """Sizes of a latent DiffiT; the published model: patch 2, width 1152, depth 28, 16 heads (§H.2)."""

    head_silu: bool = True
    """A SiLU between the last norm and the last layer, as released; the paper says "a linear layer"."""
    time_in: TimeIn = "qkv"
    """How the time enters a block; see `tmsa.TimeIn`."""


class DiffiTLatent(PatchTransformer):
    """Denoiser of (B, C, H, W) latents; see `forward`. The attention window is the whole grid of tokens.

    Args:
        config: sizes.
        image_size: side of the input, or its height and width.
        channels: C of the input.
        num_classes: classes 0..num_classes-1; 0 for none.
        null_class: whether label `num_classes` means "no class".
        learn_sigma: whether the output carries C more channels for a learned variance.

    Raises:
        ValueError: if the patch does not divide the image.
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
        d = config.hidden_size

        def block(grid: tuple[int, int]) -> DiffiTBlock:
            return DiffiTBlock(d, config.num_heads, grid, d, config.mlp_ratio, config.dropout, config.time_in)

        super().__init__(config, image_size, channels, num_classes, null_class, learn_sigma, block)
        self.final_norm = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.final_activation = nn.SiLU() if config.head_silu else nn.Identity()
        self.final = Linear(d, self.patch_values)
        self.initialise_ends()

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
        tokens = self.through_blocks(self.tokens(x), self.condition(t, y))
        return self.image(self.final(self.final_activation(self.final_norm(tokens))))
