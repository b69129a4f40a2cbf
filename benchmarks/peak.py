"""The two ceilings of a machine: matrix products, and copies through memory."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.clock import Work, in_turns, seconds
from benchmarks.figures import spread
from diffbench.denoisers.linear import convolved
from diffbench.training.speed import float32_products

DTYPES = {"32-true": torch.float32, "tf32": torch.float32, "bf16-mixed": torch.bfloat16, "64-true": torch.float64}

SIZES: dict[str, list[tuple[int, int, int]]] = {
    "cpu": [(1024, 1024, 1024), (2048, 2048, 2048), (4096, 384, 1536), (4096, 1152, 1152)],
    "cuda": [(8192, 8192, 8192), (16384, 16384, 16384), (32768, 1152, 4608), (32768, 4096, 4096)],
    "tiny": [(128, 128, 128), (256, 128, 128)],
}
"""(rows, inner, columns) of products: square ones, and tall ones as tokens times weights are."""
Way = Literal["mm", "convolution"]
WAYS: tuple[Way, ...] = ("mm", "convolution")
COPIED = {"cpu": 2**28, "cuda": 2**32, "tiny": 2**20}
"""Bytes of the tensor that is copied, several times a cache."""


class Peak:
    """The best matrix product of several sizes, to be measured in turns with what is held against it.

    On a CPU a product of float32 may be faster as a 1x1 convolution, see `denoisers.linear`: it is measured both ways.

    Args:
        precision: of the products, as `trainer.precision`, or tf32.
        device: where.
        tiny: small sizes.
    """

    def __init__(self, precision: str, device: torch.device, tiny: bool = False) -> None:
        self.precision, self.device = precision, device
        sizes = SIZES["tiny" if tiny else device.type]
        ways: tuple[Way, ...] = WAYS if device.type == "cpu" and precision == "32-true" else WAYS[:1]
        self.products = [(way, size) for way in ways for size in sizes]
        best = in_turns(self.works(), device, 2, once=tiny)
        rates = {p: _rate(p[1], min(work.times)) for p, work in zip(self.products, best, strict=True)}
        self.products = [(way, size) for way in ways for size in sorted(sizes, key=lambda size: -rates[way, size])[:2]]
        self.best = max(rates.values())

    def works(self) -> list[Work]:
        """Products of the two best sizes, each way."""
        return [self._work(*product) for product in self.products]

    def of(self, works: list[Work]) -> dict[str, Any]:
        """The rate in FLOP/s of the fastest product by its median time, and what it was; torch.mm's beside it."""
        rates = {p: _rate(p[1], spread(work.times).median) for p, work in zip(self.products, works, strict=True)}
        way, size = max(rates, key=lambda product: rates[product])
        return {
            "precision": self.precision,
            "flops_per_s": rates[way, size],
            "size": list(size),
            "way": way,
            "mm_flops_per_s": max(rate for product, rate in rates.items() if product[0] == "mm"),
        }

    def _work(self, way: Way, size: tuple[int, int, int]) -> Work:
        rows, inner, columns = size
        a, b = self._random(rows, inner), self._random(inner, columns)
        if way == "mm":
            call = partial(torch.mm, a, b, out=torch.empty(rows, columns, dtype=a.dtype, device=self.device))
        else:
            call = partial(convolved, a, b.t().contiguous())

        def product() -> None:
            with float32_products(self.precision == "tf32"):
                call()

        return Work(f"{way} {rows}x{inner}x{columns}", product)

    def _random(self, *shape: int) -> Tensor:
        # Zeros would be multiplied faster than what networks hold.
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(*shape, generator=generator, device=self.device).to(DTYPES[self.precision])


def _rate(size: tuple[int, int, int], taken: float) -> float:
    return 2.0 * size[0] * size[1] * size[2] / taken


def copy_rate(device: torch.device, tiny: bool = False) -> float:
    """Bytes read and written a second by a large copy, the median of five."""
    source = torch.ones(COPIED["tiny" if tiny else device.type] // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(5)]
    return 2 * source.nbytes / spread(times).median
