"""The terminal that a command prints to: its width, and red text."""

import os
import shutil
import sys
import textwrap
from typing import TextIO


def width() -> int | None:
    """Return the number of terminal columns, or None if stdout is a pipe or a file, where lines may have any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def red(text: str, stream: TextIO) -> str:
    """Return the text in red if the stream is a terminal and NO_COLOR is not set."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\033[31m{text}\033[0m"


def two_columns(left: str, text: str) -> str:
    """Join two parts to a line; on a terminal too narrow for it, wrap the second part next to or below the first."""
    columns = width()
    if columns is None or len(left) + 1 + len(text) <= columns:
        return f"{left} {text}"
    if len(left) > columns // 2:
        return f"{left.rstrip()}\n{textwrap.fill(text, columns, initial_indent='    ', subsequent_indent='    ')}"
    return textwrap.fill(text, columns, initial_indent=f"{left} ", subsequent_indent=" " * (len(left) + 1))
