"""A network recorded as CUDA graphs, for sampling."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


class Graphed:
    """A network (x, t, y) -> output without gradients, as CUDA graphs, one for each shape of the input.

    A graph replays the kernels of one call on the same memory, without the time that a CPU needs to start them. The
    weights must stay where they are. If recording fails, that is printed once, and the network is called as it is.

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
