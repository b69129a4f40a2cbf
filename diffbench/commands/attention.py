"""`diffbench attention`: draw where a run's tokens look along sampling."""

import argparse
import re

from diffbench.config.layers import COMMAND_LINE, located, parse_overrides
from diffbench.config.load import build
from diffbench.core.errors import UserError
from diffbench.reports.attention import AttentionConfig, attention, draw, save
from diffbench.runs.lifecycle import load
from diffbench.sampling.images import new_files


def run(arguments: argparse.Namespace) -> None:
    """Draws the attention of `arguments.runs`."""
    folders = [word for word in arguments.runs if not re.match(r"[A-Za-z_]\w*=", word)]
    values = parse_overrides([word for word in arguments.runs if word not in folders])
    if not folders:
        raise UserError(f"{COMMAND_LINE}: name a run folder, as runs/digits/diffit-s0; see diffbench attention --help")
    with located([(COMMAND_LINE, values)]):
        config = build(AttentionConfig, values)
        runs = [load(folder) for folder in folders]
        default = runs[0].folder / "samples" / f"attention-{runs[0].images_seen:09d}.png"
        (path,) = new_files(config.out, default)
        levels, found = attention(runs, config)
    save(draw(levels, found), path, runs)
    print(path)
