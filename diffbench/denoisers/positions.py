"""Positions of tokens in the image: tables added to the tokens, and rotations of their queries and keys."""

import torch
from torch import Tensor, nn


def position_angles(width: int, height_tokens: int, width_tokens: int) -> tuple[Tensor, Tensor]:
    """Return each token's row and column times 10,000^(-4 i / width), (N, width / 4) float64 each, tokens row-major."""
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, col = torch.meshgrid(
        torch.arange(height_tokens, dtype=torch.float64),
        torch.arange(width_tokens, dtype=torch.float64),
        indexing="ij",
    )
    return row.reshape(-1, 1) * frequency, col.reshape(-1, 1) * frequency


def sincos_position_table(width: int, height_tokens: int, width_tokens: int) -> Tensor:
    """Return the fixed 2-D sine-cosine position table of DiT and the latent DiffiT.

    Returns:
        (height_tokens * width_tokens, width) float64, row-major; the first half of the features encodes the
        column, the second the row, each with sines before cosines, as in the released tables.

    Raises:
        ValueError: if `width` is not divisible by 4.
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width divisible by 4, got {width}")
    row, col = position_angles(width, height_tokens, width_tokens)
    return torch.cat([f(angle) for angle in (col, row) for f in (torch.sin, torch.cos)], dim=1)


class RotaryPosition(nn.Module):
    """Rotary position embedding: rotates pairs of features, in the first half by row, in the second by column.

    Dot products of queries and keys then depend only on the relative position of their tokens (RoPE, Su et al. 2021;
    in two dimensions as in EVA-02 and LightningDiT).

    Args:
        dim: features per head, divisible by 4.
        grid: rows and columns of the token grid.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        angle = torch.cat(position_angles(dim, *grid), dim=1).repeat_interleave(2, dim=1)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate the last N tokens (the grid's, row-major) of x (B, heads, M + N, dim); the first M stay unchanged."""
        extras, tokens = x.split([x.shape[2] - len(self.cos), len(self.cos)], dim=2)
        even, odd = tokens.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = tokens * self.cos + torch.stack([-odd, even], dim=-1).flatten(-2) * self.sin
        return torch.cat([extras, rotated], dim=2)
