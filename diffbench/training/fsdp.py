"""Sharding of a network over ranks (FSDP2), and conversion between shards and full tensors."""

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
    """Shard every weight of a network over the ranks; a block's weights are gathered only while it computes."""
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    lists = [m for m in network.modules() if isinstance(m, nn.ModuleList)]
    for module in reversed(lists if getattr(network, "shards_blocks", True) else []):  # inner blocks first
        for block in module:
            if not isinstance(block, nn.ModuleList) and any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=False)


def local_shard(weight: Tensor) -> Tensor:
    """Return this rank's shard of a weight, as a view; the whole weight if it is not sharded."""
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def shard_of(value: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of the full tensor `value`, with the sharding, dtype, device and strides of `like`."""
    if not isinstance(like, DTensor):
        return torch.empty_like(like, requires_grad=False).copy_(value)
    value = value.to(device=like.device, dtype=like.dtype).contiguous()
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to_local()


def full_tensor(value: Tensor, like: Tensor | None = None) -> Tensor:
    """Return the full tensor of which each rank has a shard; all ranks must call this.

    Args:
        value: a sharded tensor or a full one; with `like`, this rank's shard as a plain tensor.
        like: a weight sharded in the same way as `value`.
    """
    if isinstance(like, DTensor):
        mesh, placements = like.device_mesh, like.placements
        value = DTensor.from_local(value, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    return value.full_tensor() if isinstance(value, DTensor) else value


def match_strides(optimizer: Optimizer) -> None:
    """Give an optimizer's state the strides of its weights, which fused steps expect; a state that was saved from
    shards has lost the channels-last layout."""
    for weight, state in optimizer.state.items():
        for name, value in state.items() if not isinstance(weight, DTensor) else ():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight, dtype=value.dtype, requires_grad=False).copy_(value)


def restore(network: nn.Module, optimizers: Sequence[Optimizer], state: Mapping[str, Any]) -> None:
    """Load a full checkpoint into a sharded network and its optimizers; all ranks must call this."""
    from torch.distributed.checkpoint import state_dict as dcp  # slow to import

    # Ranks exchange raw memory and ignore strides.
    state = tree_map_only(Tensor, Tensor.contiguous, state)
    options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp.set_model_state_dict(network, state["state_dict"], options=options)
    for optimizer, saved in zip(optimizers, state["optimizer_states"], strict=True):
        named = FullyShardedDataParallel.rekey_optim_state_dict(saved, OptimStateKeyType.PARAM_NAME, network)
        dcp.set_optimizer_state_dict(network, optimizer, named, options=options)


@contextlib.contextmanager
def weights_replaced(network: nn.Module, weights: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Replace a network's weights by `values` inside the block; they are restored after an exception too.

    `values` are this rank's shards. A sharded network stays gathered on each rank inside the block, so ranks may run it
    any number of times, independently of each other.
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
    local = [local_shard(w) for w in weights]
    before = [part.clone() for part in local]
    with torch.no_grad():
        torch._foreach_copy_(local, list(values))
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
            torch._foreach_copy_(local, before)
