"""A network whose weights lie in parts on several ranks (FSDP2), and its weights as one sees them whole."""

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
    """Leaves each rank its part of every weight; a block's are gathered when it computes, and let go after it."""
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module in reversed(list(network.modules())):  # blocks before the blocks that hold them
        for block in module if isinstance(module, nn.ModuleList) else ():
            if not isinstance(block, nn.ModuleList) and any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=False)


def sharded(network: nn.Module) -> bool:
    """Whether a network is shared out."""
    return isinstance(network, FSDPModule)


def local(weight: Tensor) -> Tensor:
    """What this rank holds of a weight; in place, all of it where it is not shared out."""
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of a whole value of the weight `like`, in its precision and on its device."""
    value = value.to(device=like.device, dtype=like.dtype).contiguous()
    if not isinstance(like, DTensor):
        return value
    parts = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return parts.to_local()


def assembled(part: Tensor, like: Tensor) -> Tensor:
    """The whole value whose parts the ranks hold as they hold the weight `like`; all ranks must ask."""
    if not isinstance(like, DTensor):
        return part
    mesh, placements = like.device_mesh, like.placements
    value = DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    return value.full_tensor()


def whole(value: Tensor) -> Tensor:
    """A tensor as one process would have it; all ranks must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def in_order(optimizer: Optimizer) -> None:
    """Brings an optimizer's state into its weights' order in memory, which fused steps take for granted: a state that
    shards saved knows no channels-last order."""
    for weight, state in optimizer.state.items():
        for name, value in state.items() if not isinstance(weight, DTensor) else ():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight, dtype=value.dtype, requires_grad=False).copy_(value)


def restore(network: nn.Module, optimizers: Sequence[Optimizer], state: Mapping[str, Any]) -> None:
    """Gives a shared-out network and its optimizers a whole resume state, each rank its parts; all ranks must ask."""
    from torch.distributed.checkpoint import state_dict as dcp  # takes a while

    # What one rank sends another is memory, in whatever order it lies.
    state = tree_map_only(Tensor, Tensor.contiguous, state)
    options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp.set_model_state_dict(network, state["state_dict"], options=options)
    for optimizer, saved in zip(optimizers, state["optimizer_states"], strict=True):
        named = FullyShardedDataParallel.rekey_optim_state_dict(saved, OptimStateKeyType.PARAM_NAME, network)
        dcp.set_optimizer_state_dict(network, optimizer, named, options=options)


@contextlib.contextmanager
def gathered(network: nn.Module, weights: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """A shared-out network with other values of this rank's parts, whole on each rank while the block runs.

    So each may compute as often as it likes; they need not do so in step.
    """
    shards = [m for m in network.modules() if isinstance(m, FSDPModule)]
    here = [local(w) for w in weights]
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
