"""The terminal that a command prints on: its width, and red on a terminal alone."""

import os
import shutil
import sys
import textwrap
from typing import TextIO


def width() -> int | None:
    """Columns of the terminal that standard output is; None for a pipe or a file, which take lines of any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def red(text: str, stream: TextIO) -> str:
    """Text in red where the stream is a terminal and NO_COLOR is not set."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\033[31m{text}\033[0m"


def beside(left: str, text: str) -> str:
    """A line of two parts; on a terminal that is too narrow, the second one is wrapped beside or below the first."""
    room = width()
    if room is None or len(left) + 1 + len(text) <= room:
        return f"{left} {text}"
    if len(left) > room // 2:
        return f"{left.rstrip()}\n{textwrap.fill(text, room, initial_indent='    ', subsequent_indent='    ')}"
    return textwrap.fill(text, room, initial_indent=f"{left} ", subsequent_indent=" " * (len(left) + 1))
