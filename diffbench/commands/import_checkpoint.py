"""`diffbench import`: turn a published checkpoint into a run folder."""

import argparse
from pathlib import Path

from diffbench.commands.train import python
from diffbench.runs.importing import import_reference


def run(arguments: argparse.Namespace) -> None:
    """Import `arguments.checkpoint`."""
    out = Path(arguments.out)
    config, weights = import_reference(arguments.source, Path(arguments.checkpoint), out, arguments.overrides)
    d, p, s = config.data, config.process, config.sample
    shape = f"{d.channels}x{d.image_size}x{d.image_size}, {d.num_classes} classes" if d.name == "none" else d.name
    details = f" ({p.schedule} schedule, {p.variance} variance)" if p.name == "vp" else ""
    print(f"{out}: {config.denoiser.name} for {shape}; process {p.name}{details}")
    print(f"weights: {weights}")
    print(f"samples by {s.sampler} in {s.steps} steps, guidance {s.guidance:g}: {python()} -m diffbench sample {out}")
