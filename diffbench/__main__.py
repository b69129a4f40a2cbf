"""`python -m diffbench`, and the `diffbench` command."""

import sys

from diffbench.cli import main


def run() -> None:
    """Runs the command line and exits with its code."""
    sys.exit(main())


if __name__ == "__main__":
    run()
