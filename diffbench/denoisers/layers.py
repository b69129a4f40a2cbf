"""Layers that the denoisers share: embeddings, norms, windows. Pure PyTorch, no randomness but initialisation."""

import math
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal features of the time (Ho et al. 2020; DiT and ADM use the same form).

    Args:
        t: (B,) times, integer or fractional, in the process's units.
        dim: number of features; with an odd `dim` the last one is zero.
        max_period: the longest period.

    Returns:
        (B, dim) float32: `dim // 2` cosines first, then as many sines, frequencies max_period^(-i / half).
    """
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-math.log(max_period) * i / half)
    features = torch.cat([angle.cos(), angle.sin()], dim=-1)
    return nn.functional.pad(features, (0, dim % 2))


def sincos_position_table(width: int, height_tokens: int, width_tokens: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (DiT, DiffiT latent).

    Returns:
        (height_tokens * width_tokens, width) float64, row-major; the first half of the features encodes the
        column, the second the row, sines before cosines, as in the released tables.

    Raises:
        ValueError: if `width` is not divisible by 4.
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width divisible by 4, got {width}")
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, col = torch.meshgrid(
        torch.arange(height_tokens, dtype=torch.float64),
        torch.arange(width_tokens, dtype=torch.float64),
        indexing="ij",
    )
    parts = [f(p.reshape(-1, 1) * frequency) for p in (col, row) for f in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1)


class ConditionEmbedding(nn.Module):
    """Time and class label as one vector: MLP(sinusoid(t)) + table[y] (DiT §3.2; DiffiT §3.2; ADM).

    Args:
        dim: width of the result.
        frequencies: width of the sinusoid.
        num_classes: number of classes; 0 for an unconditional network, which ignores `y`.
        null_class: adds a row `num_classes` that means "no class".
    """

    def __init__(self, dim: int, frequencies: int, num_classes: int, null_class: bool) -> None:
        super().__init__()
        self.frequencies, self.num_classes, self.null_class = frequencies, num_classes, null_class
        self.time = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(num_classes + null_class, dim) if num_classes else None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, t: Tensor, y: Tensor | None) -> Tensor:
        """(B,) times and (B,) labels (None: no class) to (B, dim).

        Raises:
            ValueError: if `y` is None and the network knows classes but no null class.
        """
        dtype = next(self.time.parameters()).dtype
        c: Tensor = self.time(timestep_embedding(t, self.frequencies).to(dtype))
        if self.label is None:
            return c
        if y is None:
            if not self.null_class:
                raise ValueError(f"this network has no null class: give labels y in 0..{self.num_classes - 1}")
            y = torch.full((len(t),), self.num_classes, device=t.device)
        return c + self.label(y)


class GroupNorm(nn.GroupNorm):
    """Group normalisation computed in float32 whatever the input's precision (ADM)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        return nn.functional.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def relative_position_index(window: int) -> Tensor:
    """Rows of a relative-position table for each pair of tokens in a square window (Swin; DiffiT §3.2).

    Returns:
        (window^2, window^2) int64 in 0..(2 window - 1)^2 - 1: entry (i, j) depends on position i - position j only.
    """
    row, col = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    row, col = row.reshape(-1), col.reshape(-1)
    drow = row[:, None] - row[None, :] + window - 1
    dcol = col[:, None] - col[None, :] + window - 1
    return drow * (2 * window - 1) + dcol


def to_windows(x: Tensor, window: int) -> Tensor:
    """(B, C, H, W) to (B * windows, window^2, C): non-overlapping windows, tokens row-major."""
    return rearrange(x, "b c (h wh) (w ww) -> (b h w) (wh ww) c", wh=window, ww=window)


def from_windows(tokens: Tensor, window: int, height: int, width: int) -> Tensor:
    """The inverse of `to_windows`."""
    h, w = height // window, width // window
    return rearrange(tokens, "(b h w) (wh ww) c -> b c (h wh) (w ww)", h=h, w=w, wh=window, ww=window)


M = TypeVar("M", bound=nn.Module)


def zero_(module: M) -> M:
    """Sets a layer's weight and bias to zero and returns it."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def xavier_(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear inside (DiT, DiffiT)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def check_divides(divisor: int, number: int, what: str) -> None:
    """Raises ValueError naming both numbers unless `divisor` divides `number`."""
    if divisor < 1 or number % divisor:
        raise ValueError(f"{what}: {divisor} does not divide {number}")
