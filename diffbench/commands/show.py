"""`diffbench show`: print an experiment's resolved config; runs nothing."""

import argparse

from diffbench.config.load import load, to_yaml


def run(arguments: argparse.Namespace) -> None:
    """Prints the config of `arguments.config`."""
    print(to_yaml(load(arguments.config, arguments.overrides)), end="")
