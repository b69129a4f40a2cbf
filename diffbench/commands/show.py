"""`diffbench show`: print an experiment's resolved config and the origin of each value, without training."""

import argparse

from diffbench.config.load import annotated, from_layers, read_layers


def run(arguments: argparse.Namespace) -> None:
    """Print the config of `arguments.config` as YAML, with origins in comments."""
    stack = read_layers(arguments.config, arguments.overrides)
    print(annotated(from_layers(stack), stack), end="")
