"""Start the ranks of a job of `diffbench.runs.worker`."""

import sys
from collections.abc import Sequence

from diffbench.core.distributed import launch, rank_and_world


def run_ranks(count: int, job: str, *arguments: str, keep: Sequence[int] = ()) -> bool:
    """Run a job of `runs.worker` in `count` processes on this machine and wait for them; see `launch`.

    Returns:
        False if nothing was started: for a single process, or if torchrun or srun started this one.

    Raises:
        SystemExit: with the exit code of a process that failed, after that process printed its error.
    """
    if count == 1 or rank_and_world()[1] > 1:
        return False
    if code := launch([sys.executable, "-m", "diffbench.runs.worker", job, *arguments], count, keep):
        raise SystemExit(code)
    return True
