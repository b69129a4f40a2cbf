"""A training step of a small network on two cores, each of which runs half of the batch forward and backward.

Threads that share a layer synchronize in every layer, which is cheap only while nothing else runs on their cores. The
two threads here synchronize once per step.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

Losses = Callable[[slice], Tensor]
"""A function from a slice of the batch to the losses of its images; changes no state and draws no random numbers."""


def loss_in_halves(losses: Losses, weight: Tensor, parameters: Iterable[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Compute the loss of a batch with one thread for each half; call `backward` on it once.

    Args:
        losses: computes the loss of each image.
        weight: (B,) weights of the images in the loss, B >= 2.
        parameters: the parameters to differentiate by.

    Returns:
        The weighted sum of the losses, which backpropagates to the parameters, and the losses (B,), detached.
    """
    trained = [p for p in parameters if p.requires_grad]
    total, each = _Halves.apply(losses, weight, *trained)  # type: ignore[no-untyped-call]
    return total, each


class _Halves(torch.autograd.Function):
    """An autograd function whose forward pass also computes the gradients; `backward` only scales and returns them."""

    @staticmethod
    def forward(ctx: Any, losses: Losses, weight: Tensor, *parameters: nn.Parameter) -> tuple[Tensor, Tensor]:
        kind = weight.device.type
        mixed, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

        def half(part: slice) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            # Grad mode and autocast are set per thread, but the threads would share autocast's cache.
            with torch.enable_grad(), torch.autocast(kind, dtype, enabled=mixed, cache_enabled=False):
                found = losses(part)
                total = (found * weight[part].to(found.dtype)).sum()
            return found.detach(), torch.autograd.grad(total, parameters, allow_unused=True)

        middle = (len(weight) + 1) // 2
        second = _worker().submit(half, slice(middle, None))
        halves = half(slice(middle)), second.result()
        each = torch.cat([found for found, _ in halves])
        pairs = list(zip(*(gradients for _, gradients in halves), strict=True))
        if both := [(a, b) for a, b in pairs if a is not None and b is not None]:
            torch._foreach_add_(*map(list, zip(*both, strict=True)))
        ctx.gradients = [b if a is None else a for a, b in pairs]
        ctx.mark_non_differentiable(each)
        return (each * weight.to(each.dtype)).sum(), each

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_([g for g in gradients if g is not None], gradient)
        return None, None, *gradients


@cache
def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="half")
