"""Time-dependent multi-head self-attention (TMSA) and the DiffiT block, shared by both DiffiTs and the U-Nets."""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from diffbench.denoisers.base import check_divides
from diffbench.denoisers.layers import (
    both_sides,
    from_windows,
    mlp,
    modulate,
    relative_position_index,
    to_windows,
    xavier_,
    zero_,
)
from diffbench.denoisers.linear import Linear

TimeIn = Literal["qkv", "qk", "qv", "kv", "q", "k", "v", "separate", "bias", "mlp", "adaln", "none"]
"""The way a block is conditioned on the time.

qkv: added to queries, keys and values, the paper's TMSA (Eq. 3 to 5); or only to the ones named. The softmax cancels
whatever all keys have in common, so `k` alone has no effect and `qv` equals `qkv`.
separate: a separate token among the keys and values (Table 7). With its own softmax, it would equal `v`.
bias: a time-dependent part of the relative-position bias (Table 6, F).
mlp: added to the input of the MLP (Table 6, G).
adaln: shift, scale and gate around attention and MLP, as in DiT.
none: not at all.
"""


class TMSA(nn.Module):
    """Time-dependent multi-head self-attention (DiffiT §3.2, Eq. 3 to 6).

    q, k and v are each a projection of the token plus one of the time token. A learned relative-position bias, which
    does not depend on the time, is added after scaling by 1/sqrt(d).

    Args:
        dim: width of the tokens.
        num_heads: number of heads; must divide the width of queries, keys and values.
        window: side of the square window, or its height and width.
        time_dim: width of the time token.
        time_in: where the time enters; "mlp" and "adaln" are handled by the block and mean "none" here.
        width: width of queries, keys and values; by default `dim`.
    """

    bias_index: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int | tuple[int, int],
        time_dim: int,
        time_in: TimeIn = "qkv",
        width: int | None = None,
    ) -> None:
        super().__init__()
        width = width or dim
        check_divides("num_heads", num_heads, width, "the width of queries, keys and values")
        self.heads = num_heads
        self.parts = time_in if set(time_in) <= set("qkv") else "kv" if time_in == "separate" else ""
        self.separate = time_in == "separate"
        height_tokens, width_tokens = both_sides(window)
        rows = (2 * height_tokens - 1) * (2 * width_tokens - 1)
        self.qkv = Linear(dim, 3 * width)
        self.qkv_time = Linear(time_dim, len(self.parts) * width) if self.parts else None
        self.proj = Linear(width, dim)
        self.bias = nn.Parameter(torch.empty(rows, num_heads))
        self.bias_time = Linear(time_dim, rows * num_heads) if time_in == "bias" else None
        self.register_buffer("bias_index", relative_position_index(height_tokens, width_tokens), persistent=False)
        xavier_(self)
        nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens (B * windows, N, dim), a sample's windows adjacent, and time (B, time_dim) to the same shape."""
        qkv = self.qkv(x)
        time = None if self.qkv_time is None else per_window(self.qkv_time(c), x)
        if time is not None and not self.separate:
            qkv = qkv + self._spread(time)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        bias = self._pairs(self.bias.t()[None])
        if self.bias_time is not None:
            table = rearrange(self.bias_time(c), "b (rows h) -> b h rows", h=self.heads)
            bias = bias + per_window(self._pairs(table), x)[:, 0]
        if time is not None and self.separate:
            time_k, time_v = rearrange(time, "b one (two h d) -> two b h one d", two=2, h=self.heads)
            k, v, bias = torch.cat([time_k, k], dim=2), torch.cat([time_v, v], dim=2), pad(bias, (1, 0))
        attend = chunked_attention if needs_chunks(bias) else scaled_dot_product_attention
        return self.proj(rearrange(attend(q, k, v, bias), "b h n d -> b n (h d)"))

    def _pairs(self, table: Tensor) -> Tensor:
        """Expand a bias table (B, heads, rows) to all pairs of tokens, (B, heads, N, N); faster than table[index]."""
        pairs = self.bias_index.flatten().expand(*table.shape[:2], -1)
        return table.gather(2, pairs).unflatten(2, self.bias_index.shape)

    def _spread(self, time: Tensor) -> Tensor:
        """Expand the projected time from the parts that receive it to q, k and v, with zeros for the others."""
        if self.parts == "qkv":
            return time
        by_part = dict(zip(self.parts, time.chunk(len(self.parts), dim=-1), strict=True))
        zeros = torch.zeros_like(next(iter(by_part.values())))
        return torch.cat([by_part.get(part, zeros) for part in "qkv"], dim=-1)


class DiffiTBlock(nn.Module):
    """DiffiT block: x + TMSA(LN(x), time), then x + MLP(LN(x)) (Eq. 7, 8). Norms not affine, eps 1e-6, as released.

    Args:
        dim: width of the tokens.
        num_heads: number of heads.
        window: side of the square window, or its height and width.
        time_dim: width of the time token.
        mlp_ratio: hidden width of the MLP as a multiple of `dim`.
        dropout: rate after attention and MLP.
        time_in: where the time enters.
        token_dim: width of queries, keys and values; by default `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int | tuple[int, int],
        time_dim: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        time_in: TimeIn = "qkv",
        token_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = TMSA(dim, num_heads, window, time_dim, time_in, token_dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = mlp(dim, mlp_ratio)
        self.dropout = nn.Dropout(dropout)
        xavier_(self.mlp)
        self.mlp_time = Linear(time_dim, dim) if time_in == "mlp" else None
        self.modulation = nn.Sequential(nn.SiLU(), zero_(Linear(time_dim, 6 * dim))) if time_in == "adaln" else None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens (B * windows, N, dim), a sample's windows adjacent, and time (B, time_dim) to the same shape."""
        if self.modulation is not None:
            shift1, scale1, gate1, shift2, scale2, gate2 = per_window(self.modulation(c), x).chunk(6, dim=-1)
            x = x + gate1 * self.dropout(self.attention(modulate(self.norm1(x), shift1, scale1), c))
            return x + gate2 * self.dropout(self.mlp(modulate(self.norm2(x), shift2, scale2)))
        x = x + self.dropout(self.attention(self.norm1(x), c))
        h = self.norm2(x)
        if self.mlp_time is not None:
            h = h + per_window(self.mlp_time(c), x)
        return x + self.dropout(self.mlp(h))


class TimeAttention(nn.Module):
    """TMSA over all pixels of an image, as a replacement for a U-Net's attention (DiffiT, Table 5).

    Args:
        norm: normalisation, applied first.
        channels: width.
        heads: number of heads; must divide `channels`.
        size: side of the image at this level.
        time_dim: width of the activated embedding, which serves as the time token.
        scale: factor of the projection's initial weights.
    """

    def __init__(self, norm: nn.Module, channels: int, heads: int, size: int, time_dim: int, scale: float) -> None:
        super().__init__()
        self.size, self.norm = size, norm
        self.tmsa = TMSA(channels, heads, size, time_dim)
        self.tmsa.proj.weight.data.mul_(scale)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map (B, C, H, W) and the activated embedding (B, time_dim) to (B, C, H, W), without the residual."""
        tokens = self.tmsa(to_windows(self.norm(x), self.size), c)
        return from_windows(tokens, self.size, *x.shape[2:])


CHUNK = 1 << 19
"""Number of attention weights computed at a time, about as many as fit into a CPU's caches."""


def needs_chunks(bias: Tensor) -> bool:
    """Return whether the bias needs a gradient on a CPU, where fused attention does not compute one."""
    needs_grad = bias.is_cpu and bias.requires_grad and torch.is_grad_enabled()
    return needs_grad and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(d) + bias) v in chunks of samples with at most `CHUNK` attention weights.

    Args:
        q: (B, heads, N, d).
        k: (B, heads, M, d).
        v: (B, heads, M, d).
        bias: (1 or B, heads, N, M).

    Returns:
        (B, heads, N, d).
    """
    size = max(1, CHUNK // (q.shape[1] * q.shape[2] * k.shape[2]))
    parts = [a.split(size) for a in (q * int(q.shape[-1]) ** -0.5, k.mT, v)]
    biases = bias.split(size) if len(bias) > 1 else [bias] * len(parts[0])
    chunks = [(q @ k).add_(b).softmax(-1) @ v for q, k, v, b in zip(*parts, biases, strict=True)]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def per_window(c: Tensor, tokens: Tensor) -> Tensor:
    """Repeat per-sample values (B, ...) for each window, (B * windows, 1, ...), to match tokens (B * windows, N, D)."""
    return c.repeat_interleave(len(tokens) // len(c), dim=0)[:, None]
