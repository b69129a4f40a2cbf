"""Several ranks on this machine: started, watched, and brought down together when one of them falls.

torchrun and srun do the same for jobs over several machines.
"""

import contextlib
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

from torch.distributed import TCPStore  # type: ignore[attr-defined]

LOST = 75
"""Exit code of a rank that fell only because it lost another one, whose error is the one to show."""
GRACE = 3.0
"""Seconds that the other ranks have to end by themselves once one has fallen."""
STOPPING = 50.0
"""The same once one has ended after a signal to all, or has lost another one that seems to be alive."""


def launch(command: Sequence[str], count: int, keep: Sequence[int] = ()) -> int:
    """Runs a command as `count` ranks and waits for all of them.

    Rank 0 has this terminal; the others are heard only if they fail. Signals go to all ranks; where one falls, the
    others are killed; where this process dies, they end.

    Args:
        command: what each rank runs, in torchrun's environment.
        count: how many.
        keep: open files that the ranks inherit, as the lock of a folder, which so holds until the last one has gone.

    Returns:
        0, or the exit code of the first rank that failed, 128 + n after signal n.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(hours=1))
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        ranks = [_start(command, rank, count, store.port, said[rank], keep) for rank in range(count)]
        stack.callback(_end, ranks)
        asked = stack.enter_context(_signals_reach(ranks))
        fallen = _watch(ranks, asked)
        if fallen is None:
            return 128 + asked[0] if asked and any(r.returncode for r in ranks) else 0
        code = ranks[fallen].poll()
        spoke = code is not None and code > 0 and code != LOST  # of its own error
        if not (spoke and ranks[0].poll() == code):  # else rank 0 has said so here
            said[fallen].seek(0)
            text = said[fallen].read().decode(errors="replace").strip()
            end = f"error: rank {fallen} of {count} {_how(code)}; the other ranks were stopped"
            print(*filter(None, (text, end)), sep="\n", file=sys.stderr, flush=True)
        return 1 if code is None else 128 - code if code < 0 else code


def end_with_parent() -> None:
    """Ends this rank when the launcher dies, whose end of our standard input then closes."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1):
                pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _how(code: int | None) -> str:
    if code is None:
        return "did not end"
    if code == LOST:
        return "heard no more of the others"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """That of a rank: ours, and what torchrun would say."""
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
        "TORCHELASTIC_USE_AGENT_STORE": True,  # the store is ours, and outlives any rank
        "TORCHELASTIC_RESTART_COUNT": 0,
    }
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count))}
    path = {"PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))}
    return threads | os.environ | path | {name: str(value) for name, value in here.items()}


def _start(
    command: Sequence[str], rank: int, count: int, port: int, said: IO[bytes], keep: Sequence[int]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env=environment(rank, count, port),
        stdin=subprocess.PIPE,
        stdout=None if rank == 0 else subprocess.DEVNULL,
        stderr=None if rank == 0 else said,
        pass_fds=keep,
        process_group=0,  # Ctrl-C at a terminal comes from us, once
    )


def _watch(ranks: Sequence[subprocess.Popen[bytes]], asked: Sequence[int]) -> int | None:
    """Waits for the end of all; returns the first rank that fell, the others having had a moment to end."""
    began: dict[str, float] = {}  # what happened, and when
    fallen: int | None = None
    while True:
        codes = [rank.poll() for rank in ranks]
        well = {None, 0, *(code for number in asked for code in (-number, 128 + number))}
        if fallen is None:
            fallen = next((rank for rank, code in enumerate(codes) if code not in well | {LOST}), None)
        if None not in codes:
            return fallen if fallen is not None else codes.index(LOST) if LOST in codes else None
        if fallen is not None:
            began.setdefault("fallen", time.monotonic() + GRACE)
        elif any(codes):
            began.setdefault("stopping", time.monotonic() + STOPPING)
        if began and time.monotonic() > min(began.values()):
            if fallen is None and asked:
                return None
            return fallen if fallen is not None else codes.index(LOST if LOST in codes else None)
        time.sleep(0.05)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        rank.kill()  # nothing to one that has ended
    for rank in ranks:
        rank.wait()
        assert rank.stdin is not None
        rank.stdin.close()


@contextlib.contextmanager
def _signals_reach(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """SIGTERM and SIGINT go to all ranks, and into the list; a third one kills."""
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for rank in ranks:
            rank.send_signal(number if len(asked) < 3 else signal.SIGKILL)

    before: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # signals reach the main thread only
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, forward)
    try:
        yield asked
    finally:
        for given, handler in before.items():
            signal.signal(given, handler)
