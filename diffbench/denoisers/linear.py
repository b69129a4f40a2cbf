"""The linear layer of all denoisers, which uses oneDNN on CPUs where PyTorch's default runs at half speed."""

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

LEAST = 1 << 25
"""Fewest multiply-accumulates for which oneDNN is faster; below, the overhead of its calls dominates."""
ROWS = 256
"""Fewest rows for which oneDNN is faster; with fewer, reading the weights dominates."""
BATCH = 16
"""Batch size of the 1x1 convolution; PyTorch may send smaller batches to MKL as well (on one thread it always does)."""
CPUINFO = Path("/proc/cpuinfo")


def mkl_is_slow() -> bool:
    """Return whether PyTorch uses MKL on a CPU with AVX-512 that is not Intel's; False except on Linux."""
    backends = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not backends or torch.backends.cpu.get_cpu_capability() != "AVX512" or not CPUINFO.is_file():
        return False
    return "GenuineIntel" not in CPUINFO.read_text()


BY_ONEDNN = mkl_is_slow()
"""Whether large products use oneDNN on this machine."""


class Linear(nn.Linear):
    """A linear layer that computes large float32 products as 1x1 convolutions where oneDNN is faster than MKL.

    PyTorch sends matrix products to MKL (2024.2), which uses AVX-512 on Intel CPUs but only AVX2 on others, and
    convolutions to oneDNN, which uses AVX-512 on all. The results agree up to rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return linear_as_convolution(x, self.weight, self.bias) if BY_ONEDNN and self._pays(x) else super().forward(x)

    def _pays(self, x: Tensor) -> bool:
        if not x.is_cpu or not x.dtype == self.weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        rows = x.numel() // self.in_features
        return rows >= ROWS and rows % BATCH == 0 and x.numel() * self.out_features >= LEAST


def linear_as_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute nn.functional.linear as a convolution; x is (..., C) with a multiple of `BATCH` rows, weight (D, C)."""
    pixels = rearrange(x.reshape(BATCH, 1, -1, x.shape[-1]), "b h w c -> b c h w")
    out = nn.functional.conv2d(pixels, weight[:, :, None, None], bias)
    return rearrange(out, "b c h w -> b h w c").reshape(*x.shape[:-1], len(weight))
