"""The two ceilings of a machine: matrix products, and copies through memory."""

from typing import Any

import torch
from torch import Tensor

from diffbench.bench.clock import Work, in_turns, seconds
from diffbench.bench.figures import spread
from diffbench.training.speed import float32_products

DTYPES = {"32-true": torch.float32, "tf32": torch.float32, "bf16-mixed": torch.bfloat16, "64-true": torch.float64}

SIZES: dict[str, list[tuple[int, int, int]]] = {
    "cpu": [(1024, 1024, 1024), (2048, 2048, 2048), (4096, 384, 1536), (4096, 1152, 1152)],
    "cuda": [(8192, 8192, 8192), (16384, 16384, 16384), (32768, 1152, 4608), (32768, 4096, 4096)],
    "tiny": [(128, 128, 128), (256, 128, 128)],
}
"""(rows, inner, columns) of products: square ones, and tall ones as tokens times weights are."""
COPIED = {"cpu": 2**28, "cuda": 2**32, "tiny": 2**20}
"""Bytes of the tensor that is copied, several times a cache."""


class Peak:
    """The best matrix product of several sizes, to be measured in turns with what is held against it.

    Args:
        precision: of the products, as `trainer.precision`, or tf32.
        device: where.
        tiny: small sizes.
    """

    def __init__(self, precision: str, device: torch.device, tiny: bool = False) -> None:
        self.precision, self.device = precision, device
        self.sizes = SIZES["tiny" if tiny else device.type]
        best = in_turns([self._work(size) for size in self.sizes], device, 2, once=tiny)
        rates = {size: self._rate(size, min(work.times)) for size, work in zip(self.sizes, best, strict=True)}
        self.sizes = sorted(self.sizes, key=lambda size: -rates[size])[:2]
        self.best = max(rates.values())

    def works(self) -> list[Work]:
        """Products of the two best sizes."""
        return [self._work(size) for size in self.sizes]

    def of(self, works: list[Work]) -> dict[str, Any]:
        """The rate in FLOP/s of the better size by its median time, and what it was."""
        rates = [
            (self._rate(size, spread(work.times).median), size) for size, work in zip(self.sizes, works, strict=True)
        ]
        rate, size = max(rates)
        return {"precision": self.precision, "flops_per_s": rate, "size": list(size)}

    def _work(self, size: tuple[int, int, int]) -> Work:
        rows, inner, columns = size
        a, b = self._random(rows, inner), self._random(inner, columns)
        out = torch.empty(rows, columns, dtype=a.dtype, device=self.device)

        def product() -> None:
            with float32_products(self.precision == "tf32"):
                torch.mm(a, b, out=out)

        return Work("x".join(map(str, size)), product)

    def _random(self, *shape: int) -> Tensor:
        # Zeros would be multiplied faster than what networks hold.
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(*shape, generator=generator, device=self.device).to(DTYPES[self.precision])

    def _rate(self, size: tuple[int, int, int], taken: float) -> float:
        return 2.0 * size[0] * size[1] * size[2] / taken


def copy_rate(device: torch.device, tiny: bool = False) -> float:
    """Bytes read and written a second by a large copy, the median of five."""
    source = torch.ones(COPIED["tiny" if tiny else device.type] // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(5)]
    return 2 * source.nbytes / spread(times).median
