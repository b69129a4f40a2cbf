"""DiT: a Vision Transformer over patches of a latent or an image (Peebles & Xie 2023)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from diffbench.denoisers.base import Preset
from diffbench.denoisers.flops import Cost
from diffbench.denoisers.layers import mlp, modulate, xavier_, zero_
from diffbench.denoisers.linear import Linear
from diffbench.denoisers.patches import IMAGENET_LATENT, PatchConfig, PatchTransformer
from diffbench.denoisers.positions import RotaryPosition


@dataclass
class DiTConfig(PatchConfig):
    """Sizes of a DiT (Table 1 of the paper: S 12/384/6, B 12/768/12, L 24/1024/16, XL 28/1152/16)."""

    conditioning: Literal["adaln-zero", "adaln", "cross-attention", "in-context"] = "adaln-zero"
    """Conditioning of the blocks on time and class (§3.2, Fig. 3)."""
    qk_norm: bool = False
    """Normalise queries and keys per head, which keeps their products small in long training and low precision."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """swiglu: gated, with two thirds of the hidden width."""
    position: Literal["sincos", "rope"] = "sincos"
    """sincos: a table added to the tokens; rope: also rotates queries and keys in every block."""
    norm: Literal["layer", "rms"] = "layer"
    """rms: RMSNorm, which subtracts no mean and learns a scale even with adaLN."""

    def __post_init__(self) -> None:
        super().__post_init__()
        width = self.hidden_size // self.num_heads
        if self.position == "rope" and width % 4:
            raise ValueError(
                f"denoiser.position: rope needs a head width divisible by 4, got {width}="
                "denoiser.hidden_size/denoiser.num_heads"
            )

    def make_norm(self, dim: int, affine: bool = True) -> nn.Module:
        """Build the norm over `dim` features; `affine` says whether a LayerNorm learns scale and shift."""
        rms = self.norm == "rms"
        return RMSNorm(dim, eps=1e-6) if rms else nn.LayerNorm(dim, eps=1e-6, elementwise_affine=affine)


class DiT(PatchTransformer):
    """DiT for any image height and width that the patch divides; see `Denoiser`."""

    def __init__(
        self,
        config: DiTConfig,
        image_size: int | tuple[int, int],
        channels: int,
        num_classes: int = 0,
        null_class: bool = True,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__(
            config, image_size, channels, num_classes, null_class, learn_sigma, lambda grid: DiTBlock(config, grid)
        )
        d, adaptive = config.hidden_size, config.conditioning.startswith("adaln")
        self.in_context = config.conditioning == "in-context"
        self.final_modulation = nn.Sequential(nn.SiLU(), Linear(d, 2 * d)) if adaptive else None
        self.final_norm = config.make_norm(d, affine=not adaptive)
        self.final = Linear(d, self.patch_values)
        xavier_(self.blocks)
        for block in self.blocks:
            assert isinstance(block, DiTBlock)
            if config.conditioning == "adaln-zero" and block.modulation is not None:
                zero_(block.modulation)
        if self.final_modulation is not None:
            zero_(self.final_modulation)
        self.initialise_first_and_last()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `Denoiser.forward`."""
        tokens = self.tokens(x)
        adaptive = self.final_modulation is not None
        c = self.condition(t, y) if adaptive else torch.stack(self.condition.parts(t, y), dim=1)
        if self.in_context:
            tokens = self.run_blocks(torch.cat([c, tokens], dim=1), c)[:, c.shape[1] :]
        else:
            tokens = self.run_blocks(tokens, c)
        tokens = self.final_norm(tokens)
        if self.final_modulation is not None:
            shift, scale = self.final_modulation(c)[:, None].chunk(2, dim=-1)
            tokens = modulate(tokens, shift, scale)
        return self.image(self.final(tokens))


class DiTBlock(nn.Module):
    """Attention and MLP with one of the four conditionings of DiT §3.2.

    adaln-zero: the condition shifts, scales and gates both; adaln: without gates; cross-attention: between the two,
    tokens attend to time and class; in-context: time and class are extra tokens of a plain block.
    """

    def __init__(self, config: DiTConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        d, head = config.hidden_size, config.hidden_size // config.num_heads
        adaptive = config.conditioning.startswith("adaln")
        self.heads = config.num_heads
        self.norm1 = config.make_norm(d, affine=not adaptive)
        self.qkv = Linear(d, 3 * d)
        self.q_norm, self.k_norm = (config.make_norm(head) if config.qk_norm else nn.Identity() for _ in "qk")
        self.rope = RotaryPosition(head, grid) if config.position == "rope" else nn.Identity()
        self.proj = Linear(d, d)
        self.norm2 = config.make_norm(d, affine=not adaptive)
        self.mlp = SwiGLU(d, config.mlp_ratio) if config.mlp == "swiglu" else mlp(d, config.mlp_ratio)
        parts = 6 if config.conditioning == "adaln-zero" else 4
        self.modulation = nn.Sequential(nn.SiLU(), Linear(d, parts * d)) if adaptive else None
        self.dropout = nn.Dropout(config.dropout)
        self.cross = CrossAttention(config) if config.conditioning == "cross-attention" else None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens (B, N, D) to the same shape; c is (B, D) for adaLN, otherwise time and class, (B, 1 or 2, D)."""
        if self.modulation is None:
            x = x + self.dropout(self.attention(self.norm1(x)))
            if self.cross is not None:
                x = x + self.dropout(self.cross(x, c))
            return x + self.dropout(self.mlp(self.norm2(x)))
        parts = self.modulation(c)[:, None]
        if parts.shape[-1] == 4 * x.shape[-1]:
            shift1, scale1, shift2, scale2 = parts.chunk(4, dim=-1)
            x = x + self.dropout(self.attention(modulate(self.norm1(x), shift1, scale1)))
            return x + self.dropout(self.mlp(modulate(self.norm2(x), shift2, scale2)))
        shift1, scale1, gate1, shift2, scale2, gate2 = parts.chunk(6, dim=-1)
        x = x + gate1 * self.dropout(self.attention(modulate(self.norm1(x), shift1, scale1)))
        return x + gate2 * self.dropout(self.mlp(modulate(self.norm2(x), shift2, scale2)))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q, k = (self.rope(norm(part)).to(v.dtype) for norm, part in ((self.q_norm, q), (self.k_norm, k)))
        return self.proj(rearrange(scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class CrossAttention(nn.Module):
    """Attention from the normalised image tokens to the tokens of time and class (DiT §3.2)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, dim = config.num_heads, config.hidden_size
        self.norm = config.make_norm(dim)
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens (B, N, D) and condition tokens (B, M, D) to (B, N, D)."""
        q = rearrange(self.q(self.norm(x)), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.kv(c), "b m (two h d) -> two b h m d", two=2, h=self.heads)
        return self.proj(rearrange(scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class RMSNorm(nn.RMSNorm):
    """RMS normalisation, computed in float32 if input and weight differ in precision, as under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return nn.functional.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """A gated MLP, SiLU(W x) * V x (Shazeer 2020); 2/3 of `mlp`'s hidden width give it as many parameters.

    Raises:
        ValueError: if the hidden width would be below 1.
    """

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(2 / 3 * int(dim * ratio))
        if hidden < 1:
            raise ValueError(f"denoiser.mlp_ratio: two thirds of {ratio} times a width of {dim} is less than one")
        self.inner = Linear(dim, 2 * hidden)
        self.outer = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to the same shape."""
        gate, value = self.inner(x).chunk(2, dim=-1)
        return self.outer(nn.functional.silu(gate) * value)


# Table 1: depth, width, heads.
_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
# Table 4: size, patch, the stated parameters and Gflops, and the exact cost.
_TABLE_4 = (
    ("S", 2, "33M, 6.06", Cost(32_963_360, 6_055_673_856)),
    ("S", 4, "33M, 1.41", Cost(32_945_024, 1_412_579_328)),
    ("S", 8, "33M, 0.36", Cost(33_148_160, 357_974_016)),
    ("B", 2, "130M, 23.01", Cost(130_512_416, 23_005_102_080)),
    ("B", 4, "130M, 5.56", Cost(130_475_648, 5_565_186_048)),
    ("B", 8, "131M, 1.42", Cost(130_881_536, 1_417_543_680)),
    ("L", 2, "458M, 80.71", Cost(458_102_816, 80_697_622_528)),
    ("L", 4, "458M, 19.70", Cost(458_053_760, 19_695_665_152)),
    ("L", 8, "459M, 5.01", Cost(458_594_816, 5_011_406_848)),
    ("XL", 2, "675M, 118.64", Cost(675_129_632, 118_621_421_568)),
    ("XL", 4, "675M, 29.05", Cost(675_074_432, 29_043_671_040)),
    ("XL", 8, "676M, 7.39", Cost(675_683_072, 7_392_411_648)),
)


def _config(size: str, patch: int, **changes: Any) -> DiTConfig:
    depth, width, heads = _SIZES[size]
    return DiTConfig(patch, width, depth, heads, **changes)


PRESETS = {
    f"DiT-{size}/{patch}": Preset(_config(size, patch), IMAGENET_LATENT, f"DiT, Table 4: {stated}", cost)
    for size, patch, stated, cost in _TABLE_4
}
PRESETS["DiT-XL/2-512"] = Preset(
    _config("XL", 2),
    IMAGENET_LATENT | {"image_size": 64},
    "DiT at 512x512: 675M, 524.60",
    Cost(676_014_368, 524_538_298_368),
)
PRESETS |= {
    f"DiT-XL/2-{way}": Preset(_config("XL", 2, conditioning=way), IMAGENET_LATENT, f"DiT, §3.2: {stated}", cost)
    for way, stated, cost in (
        ("in-context", "449M, 119.37", Cost(449_457_440, 119_353_946_112)),
        ("cross-attention", "598M, 137.62", Cost(598_286_624, 137_602_842_624)),
        ("adaln", "600M, 118.56", Cost(600_747_296, 118_547_103_744)),
    )
}
# LightningDiT (Yao et al. 2025), from its last table and its code; the autoencoder of XL/1 has 16x16x32 latents.
_LIGHTNING = {"mlp": "swiglu", "position": "rope", "norm": "rms"}
_SD_LATENT = IMAGENET_LATENT | {"learn_sigma": False}
PRESETS |= {
    f"LightningDiT-{size}/{patch}": Preset(_config(size, patch, **_LIGHTNING), shape, f"LightningDiT: {stated}", cost)
    for size, patch, shape, stated, cost in (
        ("XL", 1, _SD_LATENT | {"image_size": 16, "channels": 32}, "675.26M", Cost(675_256_736, 118_626_140_160)),
        ("XL", 2, _SD_LATENT, "on Stable Diffusion's latents", Cost(675_219_856, 118_616_702_976)),
    )
}
