"""`python -m diffbench`, and the `diffbench` command."""

import atexit
import gc
import os
import sys

from diffbench.cli import main


def run() -> None:
    """Runs the command line and exits with its code."""
    # Threads that wait for each other let others run: a busy machine is faster so, and an idle one hardly slower. To be
    # set before torch is imported; whatever the user chose holds.
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    # Python looks for garbage a hundred times while torch and Lightning are imported, and through all of it at the end:
    # two seconds of CPU in which there is nothing to find.
    gc.set_threshold(20_000)
    atexit.register(gc.freeze)
    sys.exit(main())


if __name__ == "__main__":
    run()
