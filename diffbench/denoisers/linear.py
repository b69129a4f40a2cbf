"""Linear layers by oneDNN, where PyTorch's own way leaves half of a CPU's speed unused."""

from functools import cache
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

LEAST = 1 << 25
"""Multiply-accumulates of a product from which it pays: below it, calls cost more."""
ROWS = 256
"""Rows of a product from which it pays: with fewer, weights are what takes time to read."""
PICTURES = 16
"""PyTorch gives a 1x1 convolution of fewer pictures to MKL too, on one thread always, on several by size."""
CPUINFO = Path("/proc/cpuinfo")


class PixelLinear(nn.Linear):
    """A linear layer that computes as a 1x1 convolution of pictures one pixel high, whose pixels are the tokens.

    Products of float32 go to MKL, of which PyTorch's (2024.2) gives AVX-512 to Intel's processors and AVX2 to others;
    convolutions go to oneDNN, which gives it to all. The same to rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if not self._pays(x):
            return super().forward(x)
        return convolved(x, self.weight, self.bias)

    def _pays(self, x: Tensor) -> bool:
        if not x.is_cpu or not x.dtype == self.weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        rows = x.numel() // self.in_features
        return rows >= ROWS and rows % PICTURES == 0 and x.numel() * self.out_features >= LEAST


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What nn.functional.linear gives for a multiple of `PICTURES` rows: (..., C) and (D, C) to (..., D)."""
    pixels = rearrange(x.reshape(PICTURES, 1, -1, x.shape[-1]), "b h w c -> b c h w")
    out = nn.functional.conv2d(pixels, weight[:, :, None, None], bias)
    return rearrange(out, "b c h w -> b h w c").reshape(*x.shape[:-1], len(weight))


def by_onednn(network: nn.Module) -> None:
    """Has a network's linear layers compute by oneDNN where that pays; their weights stay as they are."""
    if mkl_holds_back():
        for module in network.modules():
            if type(module) is nn.Linear:
                module.__class__ = PixelLinear


@cache
def mkl_holds_back() -> bool:
    """Whether PyTorch multiplies by MKL on a processor with AVX-512 that is not Intel's; asked on Linux alone."""
    backends = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not backends or torch.backends.cpu.get_cpu_capability() != "AVX512" or not CPUINFO.is_file():
        return False
    return "GenuineIntel" not in CPUINFO.read_text()
