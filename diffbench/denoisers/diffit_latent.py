"""DiffiT for latents, as released: a Vision Transformer with time-dependent self-attention (Hatamizadeh et al. 2024).

Paper and release disagree on the depth (30 in §H.2, 28 in the published model, which has the paper's 561M parameters),
and only the release has a SiLU before the last layer; both are config keys here.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from diffbench.denoisers.base import Preset
from diffbench.denoisers.flops import Cost
from diffbench.denoisers.linear import Linear
from diffbench.denoisers.patches import IMAGENET_LATENT, PatchConfig, PatchTransformer
from diffbench.denoisers.tmsa import DiffiTBlock, TimeIn


@dataclass
class DiffiTLatentConfig(PatchConfig):
    """Sizes of a latent DiffiT; the published model: patch 2, width 1152, depth 28, 16 heads (§H.2)."""

    head_silu: bool = True
    """A SiLU between the last norm and the last layer, as released; the paper says "a linear layer"."""
    time_in: TimeIn = "qkv"
    """Conditioning of the blocks on the time; see `tmsa.TimeIn`."""


class DiffiTLatent(PatchTransformer):
    """Latent DiffiT, whose attention window is the whole token grid; see `Denoiser`."""

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
        self.initialise_first_and_last()
        if config.time_in == "none":
            self.condition.requires_grad_(False)  # unused: with several devices, DDP would wait for its gradient

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `Denoiser.forward`."""
        tokens = self.run_blocks(self.tokens(x), self.condition(t, y))
        return self.image(self.final(self.final_activation(self.final_norm(tokens))))


PRESETS = {
    name: Preset(DiffiTLatentConfig(2, 1152, depth, 16), IMAGENET_LATENT | {"image_size": side}, f"DiffiT, {at}", cost)
    for name, depth, side, at, cost in (
        ("DiffiT-XL/2", 28, 32, "Table 9: 561M, 114 without attention matmuls", Cost(561_330_144, 118_507_290_624)),
        ("DiffiT-XL/2-depth30", 30, 32, "§H.2: depth 30", Cost(601_201_664, 126_970_970_112)),
        ("DiffiT-XL/2-512", 28, 64, "§I.2: at 512x512", Cost(563_562_464, 524_424_167_424)),
    )
}
