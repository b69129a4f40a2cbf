"""Parameters and multiply-accumulates of a network, counted on the meta device without memory or time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Last parts of the names, in a state dict, of the values that torch's norms over a batch keep of their inputs."""


@dataclass(frozen=True)
class Cost:
    """Size of a network for one image."""

    parameters: int
    """As `parameters` counts them."""
    macs: int
    """Multiply-accumulates of a forward pass at batch 1, attention included; papers call 1e9 of them a Gflop."""

    @property
    def gmacs(self) -> float:
        return self.macs / 1e9

    def training_flops(self, images: float) -> float:
        """FLOPs of training on so many images: 2 a multiply-accumulate, and a backward pass costs two forward ones."""
        return 2.0 * 3 * self.macs * images

    def sampling_flops(self, evaluations: float) -> float:
        """FLOPs of so many network evaluations."""
        return 2.0 * self.macs * evaluations


def count(make: Callable[[], nn.Module], channels: int, image_size: int | tuple[int, int]) -> Cost:
    """The cost of the network that `make` builds, at (1, channels, height, width); one number is both sides.

    The meta device matters: on a CPU the counter sees no products inside fused attention.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    with torch.device("meta"):
        return measure(
            make(), torch.empty(1, channels, height, width), torch.empty(1), torch.zeros(1, dtype=torch.int64)
        )


def measure(net: nn.Module, *inputs: Tensor) -> Cost:
    """The cost of a network on the meta device for inputs of batch 1."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(*inputs)
    return Cost(parameters(net), counter.get_total_flops() // 2)


def parameters(net: nn.Module) -> int:
    """Values in parameters and saved buffers (DiT's published sizes count its fixed position table), besides what
    norms of a batch keep of their inputs."""
    return sum(v.numel() for name, v in net.state_dict().items() if name.rpartition(".")[2] not in STATISTICS)
