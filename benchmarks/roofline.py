"""The least time that the operations of a step take on a machine with given ceilings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


@dataclass
class Roofline:
    """Floors of a step, in seconds.

    `operators` takes every operator as it was dispatched: the larger of its arithmetic over the product rate and of
    its bytes (each input read once, each output written once) over the copy rate. Fusing operators can go below it.
    `products` counts matrix products, convolutions and attention alone: all else would cost nothing.
    """

    operators: float = 0.0
    products: float = 0.0
    flops: int = 0
    bytes: int = 0
    """Read and written."""
    written: int = 0


class _Counter(TorchDispatchMode):
    def __init__(self, product_rate: float, copy_rate: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.product_rate, self.copy_rate, self.found = product_rate, copy_rate, Roofline()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            return out  # a view moves nothing
        read = {id(t): t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        written = [t.nbytes for t in tree_leaves(out) if isinstance(t, Tensor)]
        moved = sum(read.values()) + sum(written)
        count = _count(func, args, kwargs or {}, out)
        taken = max(count / self.product_rate, moved / self.copy_rate)
        self.found.operators += taken
        self.found.products += taken if count else 0.0
        self.found.flops += count
        self.found.bytes += moved
        self.found.written += sum(written)
        return out


def _count(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating-point operations of a call, 0 for what is no product."""
    name = func._overloadpacket.__name__
    if name == "_scaled_dot_product_flash_attention_for_cpu":  # torch counts the GPU's kernels alone
        return int(sdpa_flop_count(*(t.shape for t in args[:3])))
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return int(sdpa_backward_flop_count(*(t.shape for t in args[:4])))
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def roofline(step: Callable[[], Any], product_rate: float, copy_rate: float) -> Roofline:
    """The floors of one step.

    Args:
        step: runs it once, eagerly; what it returns is dropped.
        product_rate: FLOP/s of matrix products.
        copy_rate: bytes a second, read and written.
    """
    with _Counter(product_rate, copy_rate) as counter:
        step()
    return counter.found


def written(forward: Callable[[], Any]) -> int:
    """Bytes that all operators of a forward pass put out: about what a training step keeps for its backward pass."""
    with torch.no_grad():
        return roofline(forward, 1.0, 1.0).written
