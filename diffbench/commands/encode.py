"""`diffbench encode`: encode an experiment's data into latents ahead of training."""

import argparse

from diffbench.runs.lifecycle import encode


def run(arguments: argparse.Namespace) -> None:
    """Encodes the data of the experiment of `arguments.config`."""
    encode(arguments.config, arguments.overrides)
