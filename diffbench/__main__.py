"""Entry point of `python -m diffbench` and of the `diffbench` command."""

import atexit
import gc
import os
import sys

from diffbench.cli import main

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that set how OpenMP threads wait for each other."""


def wait_briefly() -> None:
    """Let waiting OpenMP threads sleep soon, unless the user has set how they wait; call it before importing torch.

    The count is a thirtieth of GNU OpenMP's default. It still outlasts the gaps between a network's layers, so an idle
    machine loses nothing, and on a busy one a thread no longer burns its time slice waiting for an unscheduled one.
    """
    if not set(WAITING) & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "10000"


def run() -> None:
    """Run the command line and exit with its code."""
    wait_briefly()
    # Importing torch and Lightning triggers a hundred garbage collections, and exiting triggers a full one: two seconds
    # of CPU time that free nothing.
    gc.set_threshold(20_000)
    atexit.register(gc.freeze)
    sys.exit(main())


if __name__ == "__main__":
    run()
