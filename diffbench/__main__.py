"""`python -m diffbench`, and the `diffbench` command."""

import atexit
import gc
import os
import sys

from diffbench.cli import main

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables that say how OpenMP's threads wait for each other."""


def wait_briefly() -> None:
    """Lets OpenMP's waiting threads sleep soon, unless the user chose how they wait; call it before torch is imported.

    A thirtieth of GNU OpenMP's own count outlasts the gaps between a network's layers, so an idle machine loses
    nothing, while on a busy one a thread no longer burns its time slice waiting for one that is not scheduled.
    """
    if not set(WAITING) & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "10000"


def run() -> None:
    """Runs the command line and exits with its code."""
    wait_briefly()
    # Python looks for garbage a hundred times while torch and Lightning are imported, and through all of it at the end:
    # two seconds of CPU in which there is nothing to find.
    gc.set_threshold(20_000)
    atexit.register(gc.freeze)
    sys.exit(main())


if __name__ == "__main__":
    run()
