"""`diffbench init`: copy the shipped experiments into a folder."""

import argparse
import shutil
from pathlib import Path

from diffbench.config.layers import COMMAND_LINE, SHIPPED
from diffbench.core.errors import UserError


def run(arguments: argparse.Namespace) -> None:
    """Copy the experiments into `arguments.folder`, without overwriting anything."""
    out = Path(arguments.folder) / "experiments"
    if out.exists():
        raise UserError(f"{COMMAND_LINE}: {out} already exists; name another FOLDER")
    shutil.copytree(SHIPPED, out, ignore=shutil.ignore_patterns("results"))
    enter = "" if Path(arguments.folder).resolve() == Path.cwd() else f"cd {arguments.folder} && "
    print(
        f"{out}: {sum(1 for _ in out.rglob('*.yaml'))} files; try: {enter}diffbench train experiments/digits/dit.yaml"
    )
