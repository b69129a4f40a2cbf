"""Ranks as forks of the test's process: the launcher's own path without the seconds in which each imports torch."""

import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import pytest
import torch

from diffbench.core import distributed
from diffbench.runs import worker


class Fork:
    """What `subprocess.Popen` would be: `main(*arguments)` in a fork."""

    def __init__(self, main: Callable[..., int], arguments: Sequence[str], env: dict[str, str], said: Any) -> None:
        reader, writer = os.pipe()
        self.stdin, self.returncode = os.fdopen(writer, "wb"), None
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads: those of a store, which the fork does not use
            self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                code = _child(main, arguments, env, reader, said)
            finally:
                os._exit(code)
        os.close(reader)

    def poll(self) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _child(main: Callable[..., int], arguments: Sequence[str], env: dict[str, str], reader: int, said: Any) -> int:
    os.setpgid(0, 0)
    os.dup2(reader, 0)
    if said is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(said.fileno(), 2)
    sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115 (the fork ends with them)
    os.environ.update(env)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.resetwarnings()
    try:
        return main(*arguments)
    except SystemExit as e:
        return int(e.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


@contextlib.contextmanager
def forked(main: Callable[..., int] = worker.main) -> Iterator[None]:
    """While it lasts, `launch` forks ranks that run `main` on what follows the module's name in the command.

    All with one thread: a fork waits forever for the threads of OpenMP that its parent had; and ranks that compute with
    other threads than a process alone would not be compared to the bit.
    """

    def start(command: Sequence[str], rank: int, count: int, port: int, said: IO[bytes], keep: Sequence[int]) -> Any:
        env = distributed.environment(rank, count, port)
        return Fork(main, command[3:], env, said if rank else None)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "_start", start)
            yield
    finally:
        torch.set_num_threads(threads)
