"""A network whose weights are sharded over ranks (FSDP2), and its weights as full tensors."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, OptimStateKeyType, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves each rank its shard of every weight; a block's are gathered when it computes, and freed after it."""
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    lists = [m for m in network.modules() if isinstance(m, nn.ModuleList)]
    for module in reversed(lists if getattr(network, "shards_blocks", True) else []):  # blocks before what holds them
        for block in module:
            if not isinstance(block, nn.ModuleList) and any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=False)


def local_shard(weight: Tensor) -> Tensor:
    """This rank's shard of a weight, sharing its memory: all of it where it is not sharded."""
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def shard_of(value: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a full value of the weight `like`, in its precision, on its device, in its strides."""
    if not isinstance(like, DTensor):
        return torch.empty_like(like, requires_grad=False).copy_(value)
    value = value.to(device=like.device, dtype=like.dtype).contiguous()
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to_local()


def full_tensor(value: Tensor, like: Tensor | None = None) -> Tensor:
    """A tensor as one process would have it; all ranks must ask.

    Args:
        value: a sharded tensor, or a full one; with `like`, this rank's shard.
        like: the weight that is sharded as `value` is.
    """
    if isinstance(like, DTensor):
        mesh, placements = like.device_mesh, like.placements
        value = DTensor.from_local(value, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    return value.full_tensor() if isinstance(value, DTensor) else value


def match_strides(optimizer: Optimizer) -> None:
    """Gives an optimizer's state the memory layout of its weights, which fused steps expect: a state that was saved
    from shards has lost the channels-last layout."""
    for weight, state in optimizer.state.items():
        for name, value in state.items() if not isinstance(weight, DTensor) else ():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight, dtype=value.dtype, requires_grad=False).copy_(value)


def restore(network: nn.Module, optimizers: Sequence[Optimizer], state: Mapping[str, Any]) -> None:
    """Gives a sharded network and its optimizers a full resume state, each rank its shards; all ranks must ask."""
    from torch.distributed.checkpoint import state_dict as dcp  # takes a while

    # What one rank sends another is memory, in whatever order it lies.
    state = tree_map_only(Tensor, Tensor.contiguous, state)
    options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp.set_model_state_dict(network, state["state_dict"], options=options)
    for optimizer, saved in zip(optimizers, state["optimizer_states"], strict=True):
        named = FullyShardedDataParallel.rekey_optim_state_dict(saved, OptimStateKeyType.PARAM_NAME, network)
        dcp.set_optimizer_state_dict(network, optimizer, named, options=options)


@contextlib.contextmanager
def weights_replaced(network: nn.Module, weights: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """The network with other values of its weights while the block runs; undone after an exception too.

    `values` are this rank's shards. A sharded network is gathered on each rank meanwhile, so each may compute as often
    as it likes, out of step.
    """
    shards = [m for m in network.modules() if isinstance(m, FSDPModule)]
    if not shards:
        before = [w.data for w in weights]
        try:
            for weight, value in zip(weights, values, strict=True):
                weight.data = value
            yield
        finally:
            for weight, value in zip(weights, before, strict=True):
                weight.data = value
        return
    here = [local_shard(w) for w in weights]
    before = [part.clone() for part in here]
    with torch.no_grad():
        torch._foreach_copy_(here, list(values))
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module is not network, recurse=False)
        with torch.no_grad():
            torch._foreach_copy_(here, before)
