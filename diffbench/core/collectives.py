"""What the ranks of a job tell each other. A process alone talks to nobody, and gets its own back."""

import torch
import torch.distributed as dist
from torch import Tensor


def size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which one this is; rank 0 alone writes."""
    return dist.get_rank() if size() > 1 else 0


def share(count: int) -> Tensor:
    """This rank's part of the numbers 0 to count - 1: the parts differ by one at most, and nothing is padded."""
    return torch.arange(count).tensor_split(size())[rank()]


def total(values: Tensor) -> Tensor:
    """The sum over all ranks, in place and the same on each."""
    if size() > 1:
        there = _meet(values)
        dist.all_reduce(there)
        values.copy_(there)
    return values


def largest(values: list[float]) -> list[float]:
    """The largest of each value over all ranks."""
    if size() == 1:
        return values
    there = _meet(torch.tensor(values, dtype=torch.float64))
    dist.all_reduce(there, dist.ReduceOp.MAX)
    return there.tolist()


def rows(mine: Tensor) -> Tensor:
    """The rows (n, ...) of all ranks, in their order; each may have another number of them."""
    if size() == 1:
        return mine
    counts = torch.zeros(size(), dtype=torch.int64)
    counts[rank()] = len(mine)
    longest = int(total(counts).max())
    padded = mine.new_zeros(longest, *mine.shape[1:])
    padded[: len(mine)] = mine
    there = _meet(padded)
    parts = [torch.empty_like(there) for _ in range(size())]
    dist.all_gather(parts, there)
    return torch.cat([part[:count].to(mine.device) for part, count in zip(parts, counts.tolist(), strict=True)])


def wait() -> None:
    """Until all ranks are here."""
    total(torch.zeros(1))


def part() -> None:
    """Waits for all ranks a last time; from here on each is alone."""
    if size() > 1:
        wait()
        dist.destroy_process_group()


def _meet(values: Tensor) -> Tensor:
    """The values where the ranks can exchange them: NCCL knows tensors on its GPU alone."""
    on_gpu = dist.get_backend() == "nccl"
    return values.to(torch.device("cuda", torch.cuda.current_device())) if on_gpu else values.cpu()
