"""`diffbench encode`: encode an experiment's data into latents ahead of training."""

import argparse

from diffbench.runs.lifecycle import encode


def run(arguments: argparse.Namespace) -> None:
    """Encode the data of the experiment `arguments.config`."""
    encode(arguments.config, arguments.overrides)
