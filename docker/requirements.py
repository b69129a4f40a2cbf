"""Prints the dependencies of a pyproject.toml, a line each, so that an image can install them before the code."""

import sys
import tomllib
from pathlib import Path

print(*tomllib.loads(Path(sys.argv[1]).read_text())["project"]["dependencies"], sep="\n")
