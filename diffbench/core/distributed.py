"""Processes that train or sample together ("ranks"): this process's rank, collectives, and a single-machine launcher.

torchrun and srun can start ranks too, on one machine or several; `rank_and_world` reads the variables that they set.

The launcher is our own because the ranks of `torch.distributed.launcher.api.elastic_launch` inherit no open files, so
they would not hold the lock of a run folder, and because they outlive a launcher that is killed.
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

EXIT_LOST_RANK = 75
"""Exit code of a rank that failed only because it lost another rank, whose own error is the one to show."""
FAILURE_GRACE_S = 3.0
"""Seconds that the other ranks get to exit on their own once one has failed."""
STOP_GRACE_S = 50.0
"""Seconds that the other ranks get once one has exited after a signal, or because it lost a rank that still runs."""


SIGNAL_DEBOUNCE_S = 1.0
"""Seconds within which repeated signals count as one: `timeout`, scancel and Ctrl-C during a study send two."""


def rank_and_world() -> tuple[int, int]:
    """Return (rank, number of ranks) in the whole job; (0, 1) for a process that was started on its own."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:  # set by `launch` and by torchrun, which may run inside a SLURM job
        return int(env["RANK"]), int(env["WORLD_SIZE"])
    if started_by_srun():
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
    return 0, 1


def local_rank() -> int:
    """Return the rank among those on this machine."""
    return int(os.environ["SLURM_LOCALID" if started_by_srun() else "LOCAL_RANK"]) if rank_and_world()[1] > 1 else 0


def started_by_srun() -> bool:
    """Return whether srun started this process as one of several tasks; batch scripts and shells do not count."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "TORCHELASTIC_RUN_ID" not in os.environ


def world_size() -> int:
    """Return the number of ranks in the process group, or 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank in the process group, or 0 without a group; only rank 0 writes the files of a run."""
    return dist.get_rank() if world_size() > 1 else 0


def rank_slice(count: int) -> Tensor:
    """Return this rank's share of the indices 0 to count - 1; shares differ by at most one, without padding."""
    return torch.arange(count).tensor_split(world_size())[rank()]


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum `values` over all ranks in place and return them; every rank gets the same result."""
    if world_size() > 1:
        exchanged = _on_group_device(values)
        dist.all_reduce(exchanged)
        values.copy_(exchanged)
    return values


def all_reduce_max(values: list[float]) -> list[float]:
    """Return the maximum of each value over all ranks."""
    if world_size() == 1:
        return values
    exchanged = _on_group_device(torch.tensor(values, dtype=torch.float64))
    dist.all_reduce(exchanged, dist.ReduceOp.MAX)
    return exchanged.tolist()


def all_gather_rows(mine: Tensor) -> Tensor:
    """Concatenate the rows (n, ...) of all ranks in rank order; n may differ between ranks."""
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
    """Wait until all ranks have reached this point."""
    all_reduce_sum(torch.zeros(1))


def leave_group() -> None:
    """Wait for all ranks one last time, then destroy the process group."""
    if world_size() > 1:
        barrier()
        dist.destroy_process_group()


def _on_group_device(values: Tensor) -> Tensor:
    """Move a tensor to the device on which ranks communicate: the current GPU for NCCL, else the CPU."""
    on_gpu = dist.get_backend() == "nccl"
    return values.to(torch.device("cuda", torch.cuda.current_device())) if on_gpu else values.cpu()


def launch(command: Sequence[str], count: int, keep: Sequence[int] = ()) -> int:
    """Run a command as `count` ranks on this machine and wait for all of them.

    Rank 0 writes to this terminal; of the others, only the errors of the first to fail are shown. Signals are forwarded
    to all ranks. If one rank fails, the others are killed; if this process dies, all ranks exit.

    Args:
        command: what each rank runs, with torchrun's environment variables.
        count: number of ranks.
        keep: file descriptors that the ranks inherit, such as a folder's lock, which then lasts until all have exited.

    Returns:
        0, or the exit code of the first rank that failed; 128 + n after signal n.
    """
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(hours=1)
    )
    with contextlib.ExitStack() as stack:
        error_files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        ranks = [_start(command, rank, count, store.port, error_files[rank], keep) for rank in range(count)]
        stack.callback(_kill, ranks)
        signals = stack.enter_context(_forward_signals(ranks))
        failed = _watch(ranks, signals)
        if failed is None:
            return 128 + signals[0] if signals and any(r.returncode != 0 for r in ranks) else 0
        code = ranks[failed].poll()
        own_error = code is not None and code > 0 and code != EXIT_LOST_RANK
        if not (own_error and ranks[0].poll() == code):  # else rank 0 has printed the same error
            error_files[failed].seek(0)
            output = error_files[failed].read().decode(errors="replace").strip()
            message = f"error: rank {failed} of {count} {_describe(code)}; the other ranks were stopped"
            print(*filter(None, (output, message)), sep="\n", file=sys.stderr, flush=True)
        return 1 if code is None else 128 - code if code < 0 else code


def end_with_parent() -> None:
    """Start a thread that exits this process when its standard input, a pipe from the launcher, closes."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1):
                pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """Return a rank's environment: this process's own, plus the variables that torchrun sets."""
    package = str(Path(__file__).parents[2])
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "diffbench",
        "TORCHELASTIC_USE_AGENT_STORE": True,  # the launcher hosts the store, which outlives every rank
        "TORCHELASTIC_RESTART_COUNT": 0,
    }
    threads = {"OMP_NUM_THREADS": str(threads_each(count))}
    path = {"PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))}
    return threads | os.environ | path | {name: str(value) for name, value in variables.items()}


def threads_each(processes: int) -> int:
    """Return the number of CPU threads per process when `processes` of them share this machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS
    return max(1, cores // processes)


def _describe(code: int | None) -> str:
    if code is None:
        return "did not exit"
    if code == EXIT_LOST_RANK:
        return "lost its connection to the others"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


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
        process_group=0,  # Ctrl-C at a terminal then reaches a rank only once, through the launcher
    )


def _watch(ranks: Sequence[subprocess.Popen[bytes]], signals: Sequence[int]) -> int | None:
    """Wait for all ranks to exit, with a deadline once one has failed; return the first that failed, or None."""
    deadlines: dict[str, float] = {}
    failed: int | None = None
    while True:
        codes = [rank.poll() for rank in ranks]
        expected = {None, 0, *(code for number in signals for code in (-number, 128 + number))}
        if failed is None:
            failed = next((rank for rank, code in enumerate(codes) if code not in expected | {EXIT_LOST_RANK}), None)
        if None not in codes:
            return failed if failed is not None else codes.index(EXIT_LOST_RANK) if EXIT_LOST_RANK in codes else None
        if failed is not None or len(signals) > 1:
            deadlines.setdefault("failed", time.monotonic() + FAILURE_GRACE_S)
        elif any(codes):
            deadlines.setdefault("stopping", time.monotonic() + STOP_GRACE_S)
        if deadlines and time.monotonic() > min(deadlines.values()):
            if failed is None and signals:
                return None
            return failed if failed is not None else codes.index(EXIT_LOST_RANK if EXIT_LOST_RANK in codes else None)
        time.sleep(0.05)


def _kill(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        rank.kill()  # a no-op for a rank that has exited
    for rank in ranks:
        rank.wait()
        assert rank.stdin is not None
        rank.stdin.close()


@contextlib.contextmanager
def _forward_signals(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Forward SIGTERM and SIGINT to all ranks, and yield a list of them; a second one leaves `FAILURE_GRACE_S`."""
    signals: list[int] = []
    last = -math.inf

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last < SIGNAL_DEBOUNCE_S:
            return
        last = time.monotonic()
        signals.append(number)
        for rank in ranks:
            rank.send_signal(number)

    previous: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # only the main thread can set signal handlers
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, forward)
    try:
        yield signals
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
