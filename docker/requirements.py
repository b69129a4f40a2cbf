"""Print the dependencies of a pyproject.toml, one per line, so that an image can install them before the code."""

import sys
import tomllib
from pathlib import Path

print(*tomllib.loads(Path(sys.argv[1]).read_text())["project"]["dependencies"], sep="\n")
