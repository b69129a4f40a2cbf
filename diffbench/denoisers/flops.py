"""Parameters and multiply-accumulates of a network, counted on the meta device at no cost in memory or time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Last parts of the state-dict names of the running statistics that torch's batch norms store."""


@dataclass(frozen=True)
class Cost:
    """The cost of a network for one image."""

    parameters: int
    """Parameter count, see the function `parameters`."""
    macs: int
    """Multiply-accumulates of a forward pass at batch 1, attention included; papers call 1e9 of them a Gflop."""

    @property
    def gmacs(self) -> float:
        return self.macs / 1e9

    def training_flops(self, images: float) -> float:
        """Return the FLOPs of training on `images` images: 2 per multiply-accumulate, backward twice forward."""
        return 2.0 * 3 * self.macs * images

    def sampling_flops(self, evaluations: float) -> float:
        """Return the FLOPs of `evaluations` network evaluations."""
        return 2.0 * self.macs * evaluations


def count(make: Callable[[], nn.Module], channels: int, image_size: int | tuple[int, int]) -> Cost:
    """Count the cost of the network that `make` builds, for one image; an int `image_size` is both sides.

    It is built on the meta device, because on a CPU the counter misses the products inside fused attention.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    with torch.device("meta"):
        return measure(
            make(), torch.empty(1, channels, height, width), torch.empty(1), torch.zeros(1, dtype=torch.int64)
        )


def measure(net: nn.Module, *inputs: Tensor) -> Cost:
    """Count the cost of a network for inputs of batch size 1; see `count` for the choice of device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(*inputs)
    return Cost(parameters(net), counter.get_total_flops() // 2)


def parameters(net: nn.Module) -> int:
    """Count the values in parameters and saved buffers (DiT's published sizes include its fixed position table), but
    not the running statistics of batch norms."""
    return sum(v.numel() for name, v in net.state_dict().items() if name.rpartition(".")[2] not in STATISTICS)
