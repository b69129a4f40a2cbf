"""`diffbench reference`: compute statistics of real images, for `evaluate --against` or the ADM evaluator."""

import argparse
from pathlib import Path

from diffbench.runs.evaluate_images import build_reference


def run(arguments: argparse.Namespace) -> None:
    """Compute the statistics of `arguments.what`."""
    print(build_reference(Path(arguments.what), arguments.overrides))
