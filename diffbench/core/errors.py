"""The one error type for what a user can mend, and how any error is reported."""

import difflib
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

from diffbench.core.terminal import red


class UserError(Exception):
    """One line that names the key or file, says what is allowed, and suggests the nearest; exit code 2."""


def suggest(word: str, choices: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the choice nearest to `word`, or nothing where none is near."""
    known = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f"; did you mean {known[near[0]]!r}?" if near else ""


def check(config: Any, section: str, wanted: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raise ValueError with what is wanted of the first named value for which `holds` is false; null always holds."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise ValueError(f"{section}.{name}: must {wanted}, got {value}")


def check_least(config: Any, section: str, **least: float) -> None:
    """Raise ValueError for the first named value that is below its least; null always holds."""
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise ValueError(f"{section}.{name}: must be at least {low}, got {value}")


class LostError(UserError):
    """Another process of this job has ended, or answers no more; it knows why."""


def report(error: Exception) -> int:
    """Print an error as one line, whatever characters it holds; return the exit code: 2, or 1 for a bug."""
    text, code = _explained(error)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    print(red("error:", sys.stderr), shown, file=sys.stderr, flush=True)
    return code


def _explained(error: Exception) -> tuple[str, int]:
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, OSError) and error.filename is not None and error.strerror:  # a name too long, or no rights
        return f"{str(error.filename)[:300]}: {error.strerror}", 2
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        return "out of memory; lower trainer.batch_size, sample.batch_size or the network's sizes", 2
    if isinstance(error, OSError):
        return f"{text}; the trace is in {_saved_trace(error)}", 2
    return f"this is a bug in diffbench: {kind}: {text[:500]}; the trace to report is in {_saved_trace(error)}", 1


def _saved_trace(error: Exception) -> str:
    """Write an error's trace to a new file; return its path."""
    try:
        number, path = tempfile.mkstemp(".txt", "diffbench-")
    except OSError:
        return "no file: the folder for temporary files cannot be written"
    with open(number, "w", errors="backslashreplace") as file:
        trace = "".join(traceback.format_exception(error))
        file.write(f"diffbench {version('diffbench')}, python {sys.version}\n{' '.join(sys.argv)}\n{trace}")
    return path
