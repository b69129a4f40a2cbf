"""`python -m benchmarks key=value ...`: speed and memory here, beside the machine's limits."""

import sys

from benchmarks.bench import bench
from diffbench.cli import exit_code


def main(words: list[str]) -> int:
    """Runs the benchmark; returns the exit code."""

    def work() -> int:
        bench(words)
        return 0

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
