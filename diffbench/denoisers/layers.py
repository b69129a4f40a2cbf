"""Layers shared by the denoisers: embeddings, norms, windows, attention. Only initialisation is random."""

import math
from typing import Literal, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from diffbench.denoisers.linear import Linear


def timestep_embedding(
    t: Tensor, dim: int, max_period: float = 10_000.0, endpoint: bool = False, sines_first: bool = False
) -> Tensor:
    """Return sinusoidal features of the time (Ho et al. 2020), as in DiT and ADM; DDPM++ sets both switches.

    Args:
        t: (B,) times, integer or fractional, in the process's units.
        dim: number of features; if odd, the last one is zero.
        max_period: inverse of the lowest frequency.
        endpoint: whether the lowest frequency is exactly 1 / max_period.
        sines_first: whether the sines come before the cosines.

    Returns:
        (B, dim) float32: half = dim // 2 cosines, then as many sines, at frequencies max_period^(-i / half), or
        max_period^(-i / (half - 1)) with `endpoint`.
    """
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-math.log(max_period) * i / (half - endpoint))
    parts = [angle.sin(), angle.cos()] if sines_first else [angle.cos(), angle.sin()]
    return nn.functional.pad(torch.cat(parts, dim=-1), (0, dim % 2))


class FourierFeatures(nn.Module):
    """Cosines and sines of the time at fixed random frequencies (Song et al. 2021; DiffiT, Table 8).

    Args:
        dim: number of features, even.
        scale: standard deviation of the frequencies, in periods per unit of time.
    """

    frequencies: Tensor

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(dim // 2))

    def forward(self, t: Tensor) -> Tensor:
        """Map times (B,) to features (B, dim), float32."""
        angle = 2 * math.pi * t.float()[:, None] * self.frequencies.float()
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


TimeFeatures = Literal["sinusoidal", "fourier"]


class ConditionEmbedding(nn.Module):
    """Embedding of time and class label in one vector: MLP(features(t)) + table[y] (DiT §3.2; DiffiT §3.2; ADM).

    Args:
        dim: width of the embedding.
        frequencies: number of time features.
        num_classes: number of classes; 0 for an unconditional network, which ignores `y`.
        null_class: whether the label table has one more row, `num_classes`, for "no class".
        features: "sinusoidal", or "fourier" for random frequencies.
        fourier_scale: see `FourierFeatures`.
        augment_dim: width of the augmentation label (EDM), which is projected and added to the time features; None
            if the network takes no such label.
    """

    def __init__(
        self,
        dim: int,
        frequencies: int,
        num_classes: int,
        null_class: bool,
        features: TimeFeatures = "sinusoidal",
        fourier_scale: float = 16.0,
        augment_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.time = nn.Sequential(Linear(frequencies, dim), nn.SiLU(), Linear(dim, dim))
        self.label = LabelTable(num_classes, null_class, dim) if num_classes else None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        self.fourier = FourierFeatures(frequencies, fourier_scale) if features == "fourier" else None
        self.augment = Linear(augment_dim, frequencies, bias=False) if augment_dim else None
        if self.augment is not None:
            nn.init.normal_(self.augment.weight, std=0.02)

    def parts(self, t: Tensor, y: Tensor | None, augment: Tensor | None = None) -> list[Tensor]:
        """Embed times (B,) and, if there are classes, labels (see `LabelTable.forward`) separately, (B, dim) each.

        Raises:
            ValueError: as in `LabelTable.forward`, or if augmentation labels are not (B, augment_dim).
        """
        features = timestep_embedding(t, self.frequencies) if self.fourier is None else self.fourier(t)
        features = features.to(next(self.time.parameters()).dtype)
        time = self.time(
            features if augment is None else features + augment_embedding(self.augment, augment, features.dtype)
        )
        if self.label is None:
            return [time]
        return [time, self.label(y, len(t))]

    def forward(self, t: Tensor, y: Tensor | None, augment: Tensor | None = None) -> Tensor:
        """Return the sum of `parts`, (B, dim)."""
        time, *label = self.parts(t, y, augment)
        return time + label[0] if label else time


def augment_embedding(layer: nn.Linear | None, augment: Tensor, dtype: torch.dtype) -> Tensor:
    """Project augmentation labels (B, augment_dim) with their layer.

    Raises:
        ValueError: if the network has no such layer, or the layer takes another width.
    """
    if layer is None or augment.shape[1] != layer.in_features:
        width = 0 if layer is None else layer.in_features
        raise ValueError(f"denoiser.augment_dim: is {width}, got an augmentation label of width {augment.shape[1]}")
    return layer(augment.to(dtype))


class LabelTable(nn.Embedding):
    """Embedding table with a row per class and, if `null_class`, a last row for "no class"."""

    def __init__(self, num_classes: int, null_class: bool, dim: int) -> None:
        super().__init__(num_classes + null_class, dim)
        self.num_classes, self.null_class = num_classes, null_class

    def forward(self, y: Tensor | None, batch: int) -> Tensor:  # type: ignore[override]
        """Embed labels (B,), weights over the table's rows (B, rows), or None for no class, as (B, dim).

        Raises:
            ValueError: if `y` is None and there is no null class, or if there is not one weight per row.
        """
        y = labels_or_null(y, batch, self.num_classes, self.null_class, self.weight.device)
        if not y.is_floating_point():
            return super().forward(y)
        # Unlike a matrix product, this keeps the table's precision under autocast: one-hot weights give exactly a row.
        indices = torch.arange(self.num_embeddings, device=y.device).expand_as(y)
        return nn.functional.embedding_bag(indices, self.weight, per_sample_weights=y.to(self.weight.dtype), mode="sum")


def labels_or_null(y: Tensor | None, batch: int, num_classes: int, null_class: bool, device: torch.device) -> Tensor:
    """Check and return `y`; if it is None, return the null label `num_classes` for each sample.

    Args:
        y: (B,) int64 labels, or (B, num_classes + null_class) float weights, a mixture of classes.
        batch: B.
        num_classes: number of classes.
        null_class: whether label `num_classes` means "no class".
        device: device of the null labels.

    Raises:
        ValueError: if `y` is None and there is no null class, or if weights have the wrong shape.
    """
    if y is not None:
        rows = num_classes + null_class
        if y.is_floating_point() and y.shape != (batch, rows):
            raise ValueError(f"label weights must be ({batch}, {rows}), one per label, got {tuple(y.shape)}")
        return y
    if not null_class:
        raise ValueError(f"this network has no null class: give labels y in 0..{num_classes - 1}")
    return torch.full((batch,), num_classes, device=device)


class GroupNorm(nn.GroupNorm):
    """Group normalisation that is computed in at least float32, whatever the input's precision (ADM)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        return nn.functional.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def relative_position_index(height: int, width: int | None = None) -> Tensor:
    """Return the row of the relative-position table for each pair of tokens in a window (Swin; DiffiT §3.2).

    Returns:
        (N, N) int64 in 0..(2 height - 1)(2 width - 1) - 1 for N = height * width (default: a square); entry (i, j)
        depends only on position i - position j.
    """
    width = height if width is None else width
    row, col = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    row, col = row.reshape(-1), col.reshape(-1)
    drow = row[:, None] - row[None, :] + height - 1
    dcol = col[:, None] - col[None, :] + width - 1
    return drow * (2 * width - 1) + dcol


def to_windows(x: Tensor, window: int) -> Tensor:
    """Split (B, C, H, W) into non-overlapping windows of row-major tokens, (B * windows, window^2, C)."""
    return rearrange(x, "b c (h wh) (w ww) -> (b h w) (wh ww) c", wh=window, ww=window)


def from_windows(tokens: Tensor, window: int, height: int, width: int) -> Tensor:
    """Invert `to_windows`."""
    h, w = height // window, width // window
    return rearrange(tokens, "(b h w) (wh ww) c -> b c (h wh) (w ww)", h=h, w=w, wh=window, ww=window)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


def mlp(dim: int, ratio: float, approximate: Literal["tanh", "none"] = "tanh") -> nn.Sequential:
    """Build a transformer block's MLP: two layers, `ratio` times as wide inside, with a GELU in between.

    Raises:
        ValueError: if the hidden width would be below 1.
    """
    hidden = int(dim * ratio)
    if hidden < 1:
        raise ValueError(f"denoiser.mlp_ratio: {ratio} times a width of {dim} is less than one")
    return nn.Sequential(Linear(dim, hidden), nn.GELU(approximate), Linear(hidden, dim))


Direction = Literal["down", "up"]


def resample(x: Tensor, direction: Direction | None) -> Tensor:
    """Halve the resolution of (B, C, H, W) by averaging 2x2 pixels, double it by nearest neighbour, or keep it."""
    if direction is None:
        return x
    return nn.functional.avg_pool2d(x, 2) if direction == "down" else nn.functional.interpolate(x, scale_factor=2.0)


class PixelAttention(nn.Module):
    """Self-attention over all pixels in a U-Net: norm, qkv, softmax(q k^T / sqrt d) v, projection; no residual.

    Args:
        heads: number of heads; must divide the width.
        norm: normalisation, applied first.
        qkv: 1x1 convolution to three times the width.
        proj: final 1x1 convolution.
    """

    def __init__(self, heads: int, norm: nn.Module, qkv: nn.Module, proj: nn.Module) -> None:
        super().__init__()
        self.heads, self.norm, self.qkv, self.proj = heads, norm, qkv, proj

    def forward(self, x: Tensor, _c: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape; the condition is ignored."""
        height = x.shape[2]
        pattern = "b (three heads d) h w -> three b heads (h w) d"
        q, k, v = rearrange(self.qkv(self.norm(x)), pattern, three=3, heads=self.heads)
        h = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(h, "b heads (h w) d -> b (heads d) h w", h=height))


M = TypeVar("M", bound=nn.Module)


def zero_(module: M) -> M:
    """Set all parameters of a module to zero and return it."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def xavier_(module: nn.Module) -> None:
    """Give every Linear inside Xavier-uniform weights and zero biases (DiT, DiffiT)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def both_sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of an image size given as one side or as both."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size
