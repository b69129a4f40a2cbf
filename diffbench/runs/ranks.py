"""Start the ranks of a job that `diffbench.runs.worker` carries out."""

import sys
from collections.abc import Sequence

from diffbench.core.distributed import launch, place


def in_ranks(count: int, what: str, *words: str, keep: Sequence[int] = ()) -> bool:
    """Run a job of `runs.worker` in `count` processes on this machine and wait for them; see `launch`.

    Returns:
        Whether it did: not for one process, nor in one of several that torchrun or srun has started.

    Raises:
        SystemExit: with the code of a process that failed, which has said why.
    """
    if count == 1 or place()[1] > 1:
        return False
    if code := launch([sys.executable, "-m", "diffbench.runs.worker", what, *words], count, keep):
        raise SystemExit(code)
    return True
