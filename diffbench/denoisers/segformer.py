"""SegFormer as a denoiser: a hierarchical Mix Transformer and an all-MLP decoder (Xie et al. 2021), made conditional.

The published network segments images; we found no published image generator that uses it. We add conditioning in every
block, as in DiT, an output at full resolution, and a skip connection from the input to the output.
"""

import math
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, relu, scaled_dot_product_attention, silu

from diffbench.denoisers import laptop
from diffbench.denoisers.base import Denoiser, Preset, check_divides, check_sides, check_sizes
from diffbench.denoisers.flops import Cost
from diffbench.denoisers.layers import ConditionEmbedding, both_sides, modulate, xavier_, zero_
from diffbench.denoisers.linear import Linear
from diffbench.denoisers.patches import IMAGENET_LATENT

LISTS = ("hidden_sizes", "depths", "num_heads", "sr_ratios", "mlp_ratios", "strides")
"""Keys with one entry per stage."""


@dataclass
class SegFormerConfig:
    """Sizes of a SegFormer denoiser; the defaults are for 32x32 images, at the cost of a DiT-S/2."""

    hidden_sizes: list[int] = field(default_factory=lambda: [192, 384, 640])
    """Width of each stage."""
    depths: list[int] = field(default_factory=lambda: [3, 6, 3])
    """Blocks of each stage."""
    num_heads: list[int] = field(default_factory=lambda: [3, 6, 10])
    sr_ratios: list[int] = field(default_factory=lambda: [4, 2, 1])
    """Sequence reduction: factor by which the grid of keys and values is smaller."""
    mlp_ratios: list[float] = field(default_factory=lambda: [4.0, 4.0, 4.0])
    """Hidden width of the Mix-FFN as a multiple of the stage's width."""
    strides: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Strides of the patch embeddings; the first one is 4 in the paper."""
    patch_sizes: list[int] | None = None
    """Kernel sizes of the overlapping patch embeddings; null: max(3, 2 stride - 1), as in the paper."""
    decoder_hidden_size: int = 416
    time_dim: int = 384
    """Width of the condition embedding."""
    conditioning: Literal["adaln-zero", "adaln", "add", "none"] = "adaln-zero"
    """Conditioning of the blocks on time and class: as in DiT, with or without gates; added to the tokens; or none."""
    head: Literal["unpatchify", "bilinear", "logits"] = "unpatchify"
    """unpatchify: a patch of pixels per cell of the first grid; bilinear: one pixel per cell, upsampled, which cannot
    denoise if the first stride is above 1; logits: SegFormer's own head, `num_classes` values per cell."""
    input_skip: bool = True
    """Add the input, times a gain computed from the condition, to the output: the first norm removes its amplitude."""
    norm_eps: float = 1e-6
    """Epsilon of the norms in blocks and after stages."""
    dropout: float = 0.0
    drop_path: float = 0.0
    """Probability of skipping half a block in training: from 0 in the first block, linearly, to this in the last."""

    def __post_init__(self) -> None:
        check_sizes(self, *LISTS, "patch_sizes", "decoder_hidden_size", "time_dim", "norm_eps")
        stages = len(self.hidden_sizes)
        for key in (*LISTS, *(["patch_sizes"] if self.patch_sizes else [])):
            if len(getattr(self, key)) != stages:
                raise ValueError(
                    f"denoiser.{key}: must have one entry for each of the {stages} stages of denoiser.hidden_sizes, got"
                    f" {len(getattr(self, key))}"
                )
        for width, heads in zip(self.hidden_sizes, self.num_heads, strict=True):
            check_divides("num_heads", heads, width, "a width in denoiser.hidden_sizes")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"denoiser.drop_path: must lie in [0, 1), got {self.drop_path}")
        if self.input_skip and self.conditioning == "none":
            raise ValueError("denoiser.input_skip: needs denoiser.conditioning, which is none; change one of them")

    @property
    def kernels(self) -> list[int]:
        """Kernel sizes of the patch embeddings."""
        return self.patch_sizes or [max(3, 2 * stride - 1) for stride in self.strides]


class SegFormer(Denoiser):
    """SegFormer for images whose sides are divisible by strides and sequence reductions; see `Denoiser`."""

    def __init__(
        self,
        config: SegFormerConfig,
        image_size: int | tuple[int, int],
        channels: int,
        num_classes: int = 0,
        null_class: bool = True,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__(channels, num_classes, null_class, learn_sigma)
        steps = [math.prod(config.strides[: i + 1]) for i in range(len(config.strides))]
        logits = config.head == "logits"
        self.divisor = 1 if logits else math.lcm(*(a * b for a, b in zip(steps, config.sr_ratios, strict=True)))
        for side in both_sides(image_size):
            if side % self.divisor:
                raise ValueError(
                    f"denoiser.strides: {config.strides} and denoiser.sr_ratios={config.sr_ratios} need image sides"
                    f" divisible by {self.divisor}, got {side}"
                )
        self.stride, self.head, d = config.strides[0], config.head, config.decoder_hidden_size
        conditioned, adaptive = config.conditioning != "none", config.conditioning.startswith("adaln")
        self.condition = ConditionEmbedding(config.time_dim, 256, num_classes, null_class) if conditioned else None
        last = max(1, sum(config.depths) - 1)
        drops = iter([config.drop_path * i / last for i in range(sum(config.depths))])
        inputs = [channels, *config.hidden_sizes[:-1]]
        self.stages = nn.ModuleList(
            [Stage(config, i, c_in, [next(drops) for _ in range(config.depths[i])]) for i, c_in in enumerate(inputs)]
        )
        self.project = nn.ModuleList([Linear(width, d) for width in config.hidden_sizes])
        self.fuse = Linear(len(inputs) * d, d, bias=not logits)
        # The published batch norm makes a sample's output depend on its batch, so denoisers use a layer norm.
        layer_norm = nn.LayerNorm(d, eps=config.norm_eps, elementwise_affine=not adaptive)
        self.norm: nn.Module = nn.BatchNorm1d(d) if logits else layer_norm
        self.modulation = Linear(config.time_dim, 2 * d) if adaptive else None
        self.dropout = nn.Dropout(config.dropout)
        pixels = self.stride**2 if config.head == "unpatchify" else 1
        self.final = Linear(d, num_classes if logits else pixels * self.out_channels)
        self.gain = Linear(config.time_dim, self.stride**2 * channels) if config.input_skip else None
        for part in (self.stages, self.project, self.fuse):
            xavier_(part)
        for module in self.modules():
            if isinstance(module, Block) and module.modulation is not None and config.conditioning == "adaln-zero":
                zero_(module.modulation)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for layer in (self.modulation, self.final, self.gain):
            if layer is not None:
                zero_(layer)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `Denoiser.forward`; the head "logits" returns (B, num_classes, h, w) on the first stage's grid."""
        check_sides(x, self.channels, self.divisor)
        c = None if self.condition is None else silu(self.condition(t, y))
        maps = self.features(x, c)
        height, width = maps[0].shape[2:]
        levels = []
        for project, feature_map in zip(self.project, maps, strict=True):
            level = rearrange(project(rearrange(feature_map, "b c h w -> b h w c")), "b h w d -> b d h w")
            levels.append(interpolate(level, (height, width), mode="bilinear"))
        h = self.fuse(rearrange(torch.cat(levels[::-1], dim=1), "b c h w -> b (h w) c"))
        h = self.norm(h.mT).mT if self.head == "logits" else self.norm(h)
        if self.modulation is not None and c is not None:
            h = modulate(h, *self.modulation(c)[:, None].chunk(2, dim=-1))
        h = self.final(self.dropout(relu(h)))
        p = self.stride if self.head == "unpatchify" else 1
        out: Tensor = rearrange(h, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=p, q=p)
        if self.head == "bilinear":
            out = interpolate(out, x.shape[2:], mode="bilinear")
        if self.gain is None or c is None:
            return out
        gain = rearrange(self.gain(c), "b (p q c) -> b c p q", p=self.stride, q=self.stride)
        mean = out[:, : self.channels] + x * gain.repeat(1, 1, x.shape[2] // self.stride, x.shape[3] // self.stride)
        return torch.cat([mean, out[:, self.channels :]], dim=1)

    def features(self, x: Tensor, c: Tensor | None = None) -> list[Tensor]:
        """Return the stages' feature maps (B, C, h, w), finest first, for an image and the activated condition."""
        maps = []
        for stage in self.stages:
            x = stage(x, c)
            maps.append(x)
        return maps


class Stage(nn.Module):
    """Overlapping patch embedding, blocks and a norm; the resulting map goes to the decoder and the next stage."""

    def __init__(self, config: SegFormerConfig, i: int, c_in: int, drops: list[float]) -> None:
        super().__init__()
        width, kernel = config.hidden_sizes[i], config.kernels[i]
        self.patch = nn.Conv2d(c_in, width, kernel, config.strides[i], kernel // 2)
        self.patch_norm = nn.LayerNorm(width, eps=1e-5)
        self.blocks = nn.ModuleList([Block(config, i, drop) for drop in drops])
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        """Map (B, C_in, H, W) and the activated condition (B, time_dim) to (B, C, H / stride, W / stride)."""
        x = self.patch(x)
        height, width = x.shape[2:]
        x = self.patch_norm(rearrange(x, "b c h w -> b (h w) c"))
        for block in self.blocks:
            x = block(x, c, height, width)
        return rearrange(self.norm(x), "b (h w) c -> b c h w", h=height)


class Block(nn.Module):
    """x + attention(LN(x)), then x + MixFFN(LN(x)), conditioned; keys and values come from a smaller grid."""

    def __init__(self, config: SegFormerConfig, i: int, drop: float) -> None:
        super().__init__()
        d, self.heads, ratio = config.hidden_sizes[i], config.num_heads[i], config.sr_ratios[i]
        adaptive, hidden = config.conditioning.startswith("adaln"), int(d * config.mlp_ratios[i])
        self.norm1 = nn.LayerNorm(d, eps=config.norm_eps, elementwise_affine=not adaptive)
        self.q = Linear(d, d)
        self.reduce = nn.Conv2d(d, d, ratio, ratio) if ratio > 1 else None
        self.reduce_norm = nn.LayerNorm(d, eps=1e-5) if ratio > 1 else None
        self.kv = Linear(d, 2 * d)
        self.proj = Linear(d, d)
        self.norm2 = nn.LayerNorm(d, eps=config.norm_eps, elementwise_affine=not adaptive)
        self.fc1 = Linear(d, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = Linear(hidden, d)
        parts = {"adaln-zero": 6, "adaln": 4, "add": 1, "none": 0}[config.conditioning]
        self.modulation = Linear(config.time_dim, parts * d) if parts else None
        self.dropout, self.drop = nn.Dropout(config.dropout), drop

    def forward(self, x: Tensor, c: Tensor | None, height: int, width: int) -> Tensor:
        """Map tokens (B, N, C) of a grid and the activated condition (B, time_dim) to (B, N, C)."""
        parts = [] if self.modulation is None or c is None else self.modulation(c)[:, None].split(x.shape[-1], dim=-1)
        if len(parts) < 2:
            x = x + parts[0] if parts else x
            x = x + self._dropped(self.attention(self.norm1(x), height, width))
            return x + self._dropped(self.mix_ffn(self.norm2(x), height, width))
        shift1, scale1, *gate1 = parts[: len(parts) // 2]
        shift2, scale2, *gate2 = parts[len(parts) // 2 :]
        h = self._dropped(self.attention(modulate(self.norm1(x), shift1, scale1), height, width))
        x = x + (gate1[0] * h if gate1 else h)
        h = self._dropped(self.mix_ffn(modulate(self.norm2(x), shift2, scale2), height, width))
        return x + (gate2[0] * h if gate2 else h)

    def attention(self, x: Tensor, height: int, width: int) -> Tensor:
        """Attend from tokens (B, N, C) to those of the reduced grid, which ignores leftover rows and columns."""
        q, smaller = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.heads), x
        if self.reduce is not None and self.reduce_norm is not None:
            grid = self.reduce(rearrange(x, "b (h w) c -> b c h w", h=height))
            smaller = self.reduce_norm(rearrange(grid, "b c h w -> b (h w) c"))
        k, v = rearrange(self.kv(smaller), "b m (two h d) -> two b h m d", two=2, h=self.heads)
        return self.dropout(self.proj(rearrange(scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")))

    def mix_ffn(self, x: Tensor, height: int, width: int) -> Tensor:
        """Apply an MLP to tokens (B, N, C); the depthwise 3x3 convolution before its GELU encodes their position."""
        h = self.depthwise(rearrange(self.fc1(x), "b (h w) c -> b c h w", h=height))
        return self.dropout(self.fc2(self.dropout(gelu(rearrange(h, "b c h w -> b (h w) c")))))

    def _dropped(self, h: Tensor) -> Tensor:
        """Apply stochastic depth: in training, drop the branch `h` of random samples and scale up the others."""
        if not self.training or not self.drop:
            return h
        kept = torch.rand(len(h), 1, 1, device=h.device) >= self.drop
        return h * kept / (1 - self.drop)


def laptop_sizes(height: int, width: int) -> dict[str, Any]:
    """Return config keys for a laptop, see `laptop`: up to three stages, sequence-reduced where the grid allows it."""
    common, patch = gcd(height, width), laptop.patch(height, width)
    first = max(stride for stride in range(1, patch // 2 + 1) if common % stride == 0) if patch > 1 else 1
    grids = [common // first >> i for i in range(3) if common // first % 2**i == 0]
    n = len(grids)
    return {
        "hidden_sizes": [48, 96, 192][:n],
        "depths": [2] * n,
        "num_heads": [1, 2, 4][:n],
        "sr_ratios": [next(r for r in (4, 2, 1) if side % r == 0 and (side > r or r == 1)) for side in grids],
        "mlp_ratios": [4.0] * n,
        "strides": [first, 2, 2][:n],
        "decoder_hidden_size": 96,
        "time_dim": 128,
    }


def _published(widths: list[int], depths: list[int], decoder: int) -> SegFormerConfig:
    config = SegFormerConfig(widths, depths, [1, 2, 5, 8], [8, 4, 2, 1], [4.0] * 4, [4, 2, 2, 2])
    return replace(config, decoder_hidden_size=decoder, conditioning="none", head="logits", input_skip=False)


_SEGMENTED = {"image_size": 512, "channels": 3, "num_classes": 150, "null_class": False}
_WIDTHS = [64, 128, 320, 512]
PRESETS = {
    name: Preset(_published(widths, depths, decoder), _SEGMENTED, f"SegFormer's code, for segmentation: {stated}", cost)
    for name, widths, depths, decoder, stated, cost in (
        ("MiT-B0", [32, 64, 160, 256], [2, 2, 2, 2], 256, "3,752,694, 8.39", Cost(3_752_694, 8_387_821_568)),
        ("MiT-B1", _WIDTHS, [2, 2, 2, 2], 256, "13,715,798, 15.88", Cost(13_715_798, 15_878_062_080)),
        ("MiT-B2", _WIDTHS, [3, 4, 6, 3], 768, "27,461,974, 62.34", Cost(27_461_974, 62_337_843_200)),
        ("MiT-B3", _WIDTHS, [3, 4, 18, 3], 768, "47,337,814, 78.96", Cost(47_337_814, 78_963_015_680)),
        ("MiT-B4", _WIDTHS, [3, 8, 27, 3], 768, "64,108,374, 95.57", Cost(64_108_374, 95_567_478_784)),
        ("MiT-B5", _WIDTHS, [3, 6, 40, 3], 768, "84,708,694, 111.51", Cost(84_708_694, 111_510_290_432)),
    )
}
_BASE = SegFormerConfig([384, 768, 1024], [3, 7, 4], [6, 12, 16], decoder_hidden_size=512, time_dim=768)
PRESETS |= {
    "SegFormer-S": Preset(SegFormerConfig(), IMAGENET_LATENT, "ours, cost of DiT-S/2", Cost(48_200_972, 6_026_749_440)),
    "SegFormer-B": Preset(_BASE, IMAGENET_LATENT, "ours, cost of DiT-B/2", Cost(192_348_300, 23_220_128_768)),
}
