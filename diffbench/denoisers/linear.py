"""The linear layer of all denoisers: by oneDNN, where PyTorch's own way leaves half of a CPU's speed unused."""

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

LEAST = 1 << 25
"""Multiply-accumulates from which a product by oneDNN is faster: below it, the calls cost more."""
ROWS = 256
"""Rows from which it is faster: with fewer, reading the weights is what takes time."""
BATCH = 16
"""PyTorch gives a 1x1 convolution of a smaller batch to MKL too, on one thread always, on several by size."""
CPUINFO = Path("/proc/cpuinfo")


def mkl_holds_back() -> bool:
    """Whether PyTorch multiplies by MKL on a processor with AVX-512 that is not Intel's; known on Linux only."""
    backends = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not backends or torch.backends.cpu.get_cpu_capability() != "AVX512" or not CPUINFO.is_file():
        return False
    return "GenuineIntel" not in CPUINFO.read_text()


BY_ONEDNN = mkl_holds_back()
"""Whether large products go to oneDNN on this machine."""


class Linear(nn.Linear):
    """A linear layer that computes large float32 products as a 1x1 convolution where oneDNN is faster than MKL.

    PyTorch gives products to MKL (2024.2), which uses AVX-512 on Intel's processors and AVX2 on others, and
    convolutions to oneDNN, which uses AVX-512 on all. The results agree to rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return convolved(x, self.weight, self.bias) if BY_ONEDNN and self._pays(x) else super().forward(x)

    def _pays(self, x: Tensor) -> bool:
        if not x.is_cpu or not x.dtype == self.weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        rows = x.numel() // self.in_features
        return rows >= ROWS and rows % BATCH == 0 and x.numel() * self.out_features >= LEAST


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """nn.functional.linear as a convolution: (..., C) of a multiple of `BATCH` rows and (D, C) to (..., D)."""
    pixels = rearrange(x.reshape(BATCH, 1, -1, x.shape[-1]), "b h w c -> b c h w")
    out = nn.functional.conv2d(pixels, weight[:, :, None, None], bias)
    return rearrange(out, "b c h w -> b h w c").reshape(*x.shape[:-1], len(weight))
