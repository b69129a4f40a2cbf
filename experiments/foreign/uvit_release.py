"""U-ViT as its release writes it (Bao et al. 2023, libs/uvit.py), with the release's own argument names."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=timesteps.device) / half)
    angle = timesteps[:, None].float() * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, skip: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.in_chans, self.embed_dim = in_chans, embed_dim
        self.rows = img_size // patch_size
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.label_emb = nn.Embedding(num_classes, embed_dim)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 2 + self.rows**2, embed_dim))
        self.in_blocks = nn.ModuleList([Block(embed_dim, num_heads) for _ in range(depth // 2)])
        self.mid_block = Block(embed_dim, num_heads)
        self.out_blocks = nn.ModuleList([Block(embed_dim, num_heads, skip=True) for _ in range(depth // 2)])
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * in_chans)
        self.fold = nn.PixelShuffle(patch_size)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        time = timestep_embedding(timesteps, self.embed_dim)[:, None]
        x = torch.cat([self.label_emb(y)[:, None], time, patches], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, 2:]
        return self.final_layer(self.fold(x.transpose(1, 2).unflatten(2, (self.rows, self.rows))))
