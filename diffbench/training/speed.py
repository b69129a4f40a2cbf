"""Faster ways to the same numbers, each behind a key: compilation, kept memory, float32's mantissa, CUDA graphs."""

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def compile_network(network: nn.Module, how: Literal["none", "block", "model"], backend: str = "inductor") -> None:
    """Compiles a network in place, as a whole or block by block; names of weights and the weights stay as they are.

    Blocks of one shape share what is compiled, so that a deep network waits no longer than a shallow one.
    """
    if how == "none":
        return
    import torch._dynamo  # seconds
    import torch._inductor.config

    torch._inductor.config.fallback_random = True  # dropout as it falls uncompiled
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 64)  # a U-Net has as many kinds of blocks
    for module in [network] if how == "model" else blocks(network):
        module.compile(backend=backend)


def blocks(network: nn.Module) -> list[nn.Module]:
    """What a network repeats: the members of its module lists, but for single layers."""
    lists = [m for m in network.modules() if isinstance(m, nn.ModuleList)]
    members = [member for found in lists for member in found if not isinstance(member, nn.ModuleList)]
    return [m for m in members if next(m.children(), None) is not None]


def keep_memory() -> None:
    """Has this process keep what it frees, in blocks of up to 32 MiB, instead of giving it back in each step.

    A page that comes back must be cleared by the kernel first: on two CPU cores that is up to a seventh of a training
    step's time, and the most that is in use stays the same. With another C library than glibc, nothing.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 * 2**20)


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Inside, float32 products and convolutions on a CUDA GPU have TF32's 10 bits of mantissa, or all 23."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def in_bfloat16(network: Network, device: torch.device) -> Network:
    """A network whose products are bfloat16's and whose output has the input's type."""

    def low(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return network(x, t, y).to(x.dtype)

    return low


class Graphed:
    """A network (x, t, y) -> output without gradients, as CUDA graphs: one for each shape of the input.

    A graph replays the kernels of one call on the same memory, without the time that a CPU needs to start them. The
    weights must stay where they are. Where recording fails, it says so once and calls the network as it is.

    Args:
        network: free of randomness and of waits for the device.
        warmup: calls before recording, in which libraries choose their kernels.
    """

    def __init__(self, network: Network, warmup: int = 3) -> None:
        self.network, self.warmup = network, warmup
        self.failed = False
        self._recorded: dict[Any, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.failed:
            return self.network(x, t, y)
        inputs = (x, t, y)
        key = tuple((a.shape, a.dtype) for a in inputs)
        if key not in self._recorded:
            try:
                self._recorded[key] = self._record(inputs)
            except torch.OutOfMemoryError:
                raise  # smaller batches may do
            except RuntimeError as e:
                self.failed = True
                print(f"note: sample.cuda_graphs: off, the network cannot be recorded ({str(e).splitlines()[0]})")
                return self.network(x, t, y)
        graph, places, out = self._recorded[key]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return out.clone()

    def _record(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        places = tuple(a.clone() for a in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.warmup):
                self.network(*places)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.network(*places)
        return graph, places, out
