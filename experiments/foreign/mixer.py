"""MLP-Mixer (Tolstikhin et al. 2021) as a denoiser: MLPs over patches and channels by turns; time and class added."""

import math

import torch
from torch import Tensor, nn


def mlp(size: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size))


class Block(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.over_tokens = nn.LayerNorm(width), mlp(tokens, 2 * tokens)
        self.norm2, self.over_channels = nn.LayerNorm(width), mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self, width: int, depth: int, patch: int, image_size: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.label = nn.Embedding(num_classes + 1, width)  # the last row means no class
        self.time = mlp(width, width)
        self.blocks = nn.ModuleList([Block((image_size // patch) ** 2, width) for _ in range(depth)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels * patch * patch))
        self.fold = nn.PixelShuffle(patch)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.embed(x)
        width, rows = tokens.shape[1:3]
        angle = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
        condition = self.time(torch.cat([angle.cos(), angle.sin()], dim=1)) + self.label(y)
        tokens = tokens.flatten(2).transpose(1, 2) + condition[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        return self.fold(self.head(tokens).transpose(1, 2).unflatten(2, (rows, rows)))
