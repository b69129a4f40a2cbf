"""`diffbench attention`: plot what a run's tokens attend to during sampling."""

import argparse

from diffbench.commands.arguments import split_arguments
from diffbench.config.layers import COMMAND_LINE, located
from diffbench.reports.attention import AttentionConfig, attention, attention_figure
from diffbench.reports.figures import save_with_tensorboard
from diffbench.runs.lifecycle import load
from diffbench.sampling.images import new_files


def run(arguments: argparse.Namespace) -> None:
    """Plot the attention of `arguments.runs`."""
    folders, config = split_arguments(arguments.runs, AttentionConfig, "attention")
    with located([(COMMAND_LINE, vars(config))]):
        runs = [load(folder) for folder in folders]
        default = runs[0].folder / "samples" / f"attention-{runs[0].images_seen:09d}.png"
        (path,) = new_files(config.out, default)
        levels, found = attention(runs, config)
    save_with_tensorboard(attention_figure(levels, found), path, runs, "attention")
    print(path)
