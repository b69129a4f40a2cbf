"""Ranks as forks of the test process: the launcher's code path without the seconds each rank needs to import torch."""

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
    """A stand-in for `subprocess.Popen` that runs `main(*arguments)` in a fork."""

    def __init__(self, main: Callable[..., int], arguments: Sequence[str], env: dict[str, str], errors: Any) -> None:
        reader, writer = os.pipe()
        self.stdin, self.returncode = os.fdopen(writer, "wb"), None
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about threads: those of a store, which the fork does not use
            self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                code = _child(main, arguments, env, reader, errors)
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


def _child(main: Callable[..., int], arguments: Sequence[str], env: dict[str, str], reader: int, errors: Any) -> int:
    os.setpgid(0, 0)
    os.dup2(reader, 0)
    if errors is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(errors.fileno(), 2)
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
    """Make `launch` fork its ranks within the context; each runs `main` on the arguments after the module's name.

    Everything runs with one thread. A fork would wait forever for its parent's OpenMP threads, and ranks with another
    number of threads than a single process would not compute the same bits.
    """

    def start(command: Sequence[str], rank: int, count: int, port: int, errors: IO[bytes], keep: Sequence[int]) -> Any:
        env = distributed.environment(rank, count, port)
        return Fork(main, command[3:], env, errors if rank else None)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "_start", start)
            yield
    finally:
        torch.set_num_threads(threads)
