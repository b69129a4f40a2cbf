"""U-ViT: a Vision Transformer with long skips, which takes time and label as tokens (Bao et al. 2023)."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from diffbench.denoisers.base import Denoiser, Preset, check_divides, check_shape
from diffbench.denoisers.flops import Cost
from diffbench.denoisers.layers import LabelTable, both_sides, mlp, timestep_embedding
from diffbench.denoisers.linear import Linear
from diffbench.denoisers.patches import IMAGENET_LATENT, PatchConfig


@dataclass
class UViTConfig(PatchConfig):
    """Sizes of a U-ViT (paper, Table 1: S 12/512/8, M 16/768/12, L 20/1024/16, H 28/1152/16); depth must be even."""

    hidden_size: int = 512
    num_heads: int = 8
    mlp_time_embed: bool = False
    """Pass the sinusoidal time token through a two-layer MLP; the released networks use it unchanged."""
    skip: bool = True
    """Long skips from the first half of the blocks to the second; without them, a plain Vision Transformer."""
    conv: bool = True
    """Apply a 3x3 convolution to the image assembled from the patches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides("depth", 2, self.depth, "denoiser.depth=")


class UViT(Denoiser):
    """U-ViT for any image height and width that the patch divides; see `Denoiser`. No weights start at zero."""

    def __init__(
        self,
        config: UViTConfig,
        image_size: int | tuple[int, int],
        channels: int,
        num_classes: int = 0,
        null_class: bool = True,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__(channels, num_classes, null_class, learn_sigma)
        p, d = config.patch_size, config.hidden_size
        self.image_size = height, width = both_sides(image_size)
        for side in self.image_size:
            check_divides("patch_size", p, side, "a side of the image")
        self.patch_size, self.grid, self.hidden_size = p, (height // p, width // p), d
        self.gradient_checkpointing = config.gradient_checkpointing
        self.extras = 2 if num_classes else 1
        self.patch = nn.Conv2d(channels, d, kernel_size=p, stride=p)
        mlp_time = nn.Sequential(Linear(d, 4 * d), nn.SiLU(), Linear(4 * d, d))
        self.time = mlp_time if config.mlp_time_embed else nn.Identity()
        self.label = LabelTable(num_classes, null_class, d) if num_classes else None
        self.position = nn.Parameter(torch.empty(1, self.extras + self.grid[0] * self.grid[1], d))
        half = config.depth // 2
        self.encoder = nn.ModuleList([Block(config, joins=False) for _ in range(half)])
        self.middle = nn.ModuleList([Block(config, joins=False)])
        self.decoder = nn.ModuleList([Block(config, joins=config.skip) for _ in range(half)])
        self.norm = nn.LayerNorm(d)
        self.head = Linear(d, p * p * self.out_channels)
        self.conv = nn.Conv2d(self.out_channels, self.out_channels, 3, padding=1) if config.conv else nn.Identity()
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `Denoiser.forward`."""
        check_shape(x, self.channels, *self.image_size)
        tokens = rearrange(self.patch(x), "b d h w -> b (h w) d")
        extras = [self.time(timestep_embedding(t, self.hidden_size).to(tokens.dtype))]
        if self.label is not None:
            extras.insert(0, self.label(y, len(t)))
        tokens = torch.cat([torch.stack(extras, dim=1), tokens], dim=1) + self.position
        skips = []
        for block in self.encoder:
            tokens = self._run(block, tokens)
            skips.append(tokens)
        tokens = self._run(self.middle[0], tokens)
        for block in self.decoder:
            tokens = self._run(block, tokens, skips.pop())
        patches = self.head(self.norm(tokens))[:, self.extras :]
        p = self.patch_size
        image = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=self.grid[0], p=p, q=p)
        return self.conv(image)

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)); with `joins`, x is first concatenated with a skip and projected."""

    def __init__(self, config: UViTConfig, joins: bool) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_heads
        self.join = Linear(2 * d, d) if joins else None
        self.norm1 = nn.LayerNorm(d)
        self.qkv = Linear(d, 3 * d, bias=False)
        self.proj = Linear(d, d)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = mlp(d, config.mlp_ratio, approximate="none")
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Map tokens (B, N, D), and a skip (B, N, D) if the block has `joins`, to (B, N, D)."""
        if self.join is not None and skip is not None:
            x = self.join(torch.cat([x, skip], dim=-1))
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = x + self.dropout(self.proj(rearrange(scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")))
        return x + self.dropout(self.mlp(self.norm2(x)))


_CIFAR10, _64 = {"image_size": 32, "channels": 3}, {"image_size": 64, "channels": 3}
_IMAGENET64 = _64 | {"num_classes": 1000, "null_class": False}
_LATENT = IMAGENET_LATENT | {"learn_sigma": False}
_LATENT512 = _LATENT | {"image_size": 64}


def _config(size: str, patch: int) -> UViTConfig:
    sizes = {"S": (512, 12, 8), "M": (768, 16, 12), "L": (1024, 20, 16), "H": (1152, 28, 16)}
    width, depth, heads = sizes[size]
    return UViTConfig(patch, width, depth, heads, conv=size != "H")


PRESETS = {
    f"U-ViT-{size}/{patch}{data}": Preset(_config(size, patch), shape, f"U-ViT's code: {stated}", cost)
    for size, patch, data, shape, stated, cost in (
        ("S", 2, "", _CIFAR10, "CIFAR-10; paper: 44M", Cost(44_255_328, 12_200_808_448)),
        ("S", 4, "", _64, "CelebA 64x64; paper: 44M", Cost(44_292_228, 12_210_512_896)),
        ("M", 4, "", _IMAGENET64, "ImageNet 64x64; paper: 131M", Cost(130_940_292, 35_235_809_280)),
        ("L", 4, "", _IMAGENET64, "ImageNet 64x64; paper: 287M", Cost(286_827_652, 76_473_249_792)),
        ("L", 2, "", _LATENT, "ImageNet 256x256; paper: 287M", Cost(286_763_172, 76_456_222_720)),
        ("H", 2, "", _LATENT, "ImageNet 256x256; paper: 501M", Cost(500_832_016, 133_196_719_104)),
        ("L", 4, "-512", _LATENT512, "ImageNet 512x512; paper: 287M", Cost(286_861_524, 76_481_929_216)),
        ("H", 4, "-512", _LATENT512, "ImageNet 512x512; paper: 501M", Cost(500_942_656, 133_225_141_248)),
    )
}
