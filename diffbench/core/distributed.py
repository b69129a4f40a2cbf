"""Processes that train or sample together ("ranks"): which one this is, collectives, and a launcher for one machine.

torchrun and srun start ranks as well, also on several machines; `place` reads what each of them sets.

Why an own launcher: `torch.distributed.launcher.api.elastic_launch` hands no open file to its ranks, which so do not
inherit the lock of a run folder, and lets them outlive a launcher that is killed.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

EXIT_LOST = 75
"""Exit code of a rank that failed only because it lost another one, whose error is the one to show."""
GRACE = 3.0
"""Seconds that the other ranks have to end by themselves once one has failed."""
STOPPING = 50.0
"""Seconds that they have after a signal to all ranks, or after a rank has lost another one that still runs."""


AGAIN = 1.0
"""Seconds after a signal in which others count as the same one: `timeout`, scancel and Ctrl-C on a study send two."""


def place() -> tuple[int, int]:
    """(rank, number of ranks) in the whole job; (0, 1) for a process that was started alone."""
    here = os.environ
    if "TORCHELASTIC_RUN_ID" in here:  # torchrun, also inside a SLURM job, or `launch`
        return int(here["RANK"]), int(here["WORLD_SIZE"])
    if by_srun():
        return int(here["SLURM_PROCID"]), int(here["SLURM_STEP_NUM_TASKS"])
    return 0, 1


def local_rank() -> int:
    """The rank among those on this machine."""
    return int(os.environ["SLURM_LOCALID" if by_srun() else "LOCAL_RANK"]) if place()[1] > 1 else 0


def by_srun() -> bool:
    """Whether srun started several tasks. (A batch script and an interactive shell are not such a step.)"""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "TORCHELASTIC_RUN_ID" not in os.environ


def world_size() -> int:
    """The number of ranks in the process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank in the process group; rank 0 alone writes files."""
    return dist.get_rank() if world_size() > 1 else 0


def rank_slice(count: int) -> Tensor:
    """This rank's part of the numbers 0 to count - 1: parts differ by one at most, and nothing is padded."""
    return torch.arange(count).tensor_split(world_size())[rank()]


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over all ranks, in place and the same on each."""
    if world_size() > 1:
        exchanged = _on_group_device(values)
        dist.all_reduce(exchanged)
        values.copy_(exchanged)
    return values


def all_reduce_max(values: list[float]) -> list[float]:
    """Largest of each value over all ranks."""
    if world_size() == 1:
        return values
    exchanged = _on_group_device(torch.tensor(values, dtype=torch.float64))
    dist.all_reduce(exchanged, dist.ReduceOp.MAX)
    return exchanged.tolist()


def all_gather_rows(mine: Tensor) -> Tensor:
    """Rows (n, ...) of all ranks, in the order of the ranks; n may differ between them."""
    if world_size() == 1:
        return mine
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = len(mine)
    longest = int(all_reduce_sum(counts).max())
    padded = mine.new_zeros(longest, *mine.shape[1:])
    padded[: len(mine)] = mine
    exchanged = _on_group_device(padded)
    parts = [torch.empty_like(exchanged) for _ in range(world_size())]
    dist.all_gather(parts, exchanged)
    return torch.cat([part[:count].to(mine.device) for part, count in zip(parts, counts.tolist(), strict=True)])


def barrier() -> None:
    """Wait until all ranks are here."""
    all_reduce_sum(torch.zeros(1))


def leave_group() -> None:
    """Wait for all ranks a last time, then end the process group."""
    if world_size() > 1:
        barrier()
        dist.destroy_process_group()


def _on_group_device(values: Tensor) -> Tensor:
    """The values where the ranks can exchange them: NCCL takes tensors on its GPU only."""
    on_gpu = dist.get_backend() == "nccl"
    return values.to(torch.device("cuda", torch.cuda.current_device())) if on_gpu else values.cpu()


def launch(command: Sequence[str], count: int, keep: Sequence[int] = ()) -> int:
    """Run a command as `count` ranks on this machine and wait for all of them.

    Rank 0 has this terminal; the others' errors are shown only if they fail. Signals go to all ranks; where one fails,
    the others are killed; where this process dies, they end.

    Args:
        command: what each rank runs, in torchrun's environment.
        count: number of ranks.
        keep: open files that the ranks inherit, such as the lock of a folder, which then holds until the last one ends.

    Returns:
        0, or the exit code of the first rank that failed, 128 + n after signal n.
    """
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(hours=1)
    )
    with contextlib.ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        ranks = [_start(command, rank, count, store.port, errors[rank], keep) for rank in range(count)]
        stack.callback(_end, ranks)
        signals = stack.enter_context(_signals_reach(ranks))
        failed = _watch(ranks, signals)
        if failed is None:
            return 128 + signals[0] if signals and any(r.returncode != 0 for r in ranks) else 0
        code = ranks[failed].poll()
        own_error = code is not None and code > 0 and code != EXIT_LOST
        if not (own_error and ranks[0].poll() == code):  # else rank 0 has printed the same here
            errors[failed].seek(0)
            text = errors[failed].read().decode(errors="replace").strip()
            end = f"error: rank {failed} of {count} {_describe(code)}; the other ranks were stopped"
            print(*filter(None, (text, end)), sep="\n", file=sys.stderr, flush=True)
        return 1 if code is None else 128 - code if code < 0 else code


def end_with_parent() -> None:
    """End this rank when the launcher dies, since its end of our standard input then closes."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1):
                pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """Environment of a rank: this process's, and the variables that torchrun sets."""
    package = str(Path(__file__).parents[2])
    here = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "diffbench",
        "TORCHELASTIC_USE_AGENT_STORE": True,  # the store is the launcher's, and outlives any rank
        "TORCHELASTIC_RESTART_COUNT": 0,
    }
    threads = {"OMP_NUM_THREADS": str(threads_each(count))}
    path = {"PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))}
    return threads | os.environ | path | {name: str(value) for name, value in here.items()}


def threads_each(processes: int) -> int:
    """CPU threads of each of some processes that share the cores of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS
    return max(1, cores // processes)


def _describe(code: int | None) -> str:
    if code is None:
        return "did not end"
    if code == EXIT_LOST:
        return "lost its connection to the others"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _start(
    command: Sequence[str], rank: int, count: int, port: int, errors: IO[bytes], keep: Sequence[int]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env=environment(rank, count, port),
        stdin=subprocess.PIPE,
        stdout=None if rank == 0 else subprocess.DEVNULL,
        stderr=None if rank == 0 else errors,
        pass_fds=keep,
        process_group=0,  # so that Ctrl-C at a terminal reaches a rank once, from the launcher
    )


def _watch(ranks: Sequence[subprocess.Popen[bytes]], signals: Sequence[int]) -> int | None:
    """Wait for the end of all; return the first rank that failed, once the others have had a moment to end."""
    deadlines: dict[str, float] = {}
    failed: int | None = None
    while True:
        codes = [rank.poll() for rank in ranks]
        expected = {None, 0, *(code for number in signals for code in (-number, 128 + number))}
        if failed is None:
            failed = next((rank for rank, code in enumerate(codes) if code not in expected | {EXIT_LOST}), None)
        if None not in codes:
            return failed if failed is not None else codes.index(EXIT_LOST) if EXIT_LOST in codes else None
        if failed is not None or len(signals) > 1:
            deadlines.setdefault("failed", time.monotonic() + GRACE)
        elif any(codes):
            deadlines.setdefault("stopping", time.monotonic() + STOPPING)
        if deadlines and time.monotonic() > min(deadlines.values()):
            if failed is None and signals:
                return None
            return failed if failed is not None else codes.index(EXIT_LOST if EXIT_LOST in codes else None)
        time.sleep(0.05)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        rank.kill()  # does nothing to one that has ended
    for rank in ranks:
        rank.wait()
        assert rank.stdin is not None
        rank.stdin.close()


@contextlib.contextmanager
def _signals_reach(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Forward SIGTERM and SIGINT to all ranks, and collect them in the list; after the second, ranks have `GRACE`."""
    signals: list[int] = []
    last = -math.inf

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last < AGAIN:
            return
        last = time.monotonic()
        signals.append(number)
        for rank in ranks:
            rank.send_signal(number)

    before: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # signals reach the main thread only
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, forward)
    try:
        yield signals
    finally:
        for given, handler in before.items():
            signal.signal(given, handler)
