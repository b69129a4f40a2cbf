"""The error type for everything that a user can fix, and the report of any error as one line."""

import difflib
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

from diffbench.core.terminal import red


class UserError(Exception):
    """An error the user can fix: one line with the key or file, what is allowed and the nearest name; exit code 2."""


def suggest(word: str, choices: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the choice closest to `word`, or "" if none is close."""
    known = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f"; did you mean {known[near[0]]!r}?" if near else ""


def check(config: Any, section: str, wanted: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raise ValueError ("must {wanted}, got ...") for the first named value for which `holds` is false; null passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise ValueError(f"{section}.{name}: must {wanted}, got {value}")


def check_at_least(config: Any, section: str, **least: float) -> None:
    """Raise ValueError for the first named value below its minimum; null passes."""
    for name, minimum in least.items():
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"{section}.{name}: must be at least {minimum}, got {value}")


class LostError(UserError):
    """Loss of another process of this job, which has exited or stopped responding; its own error says why."""


def report(error: Exception) -> int:
    """Print an error as one line, unprintable characters escaped; return the exit code: 2, or 1 for a bug."""
    text, code = _explain(error)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    print(red("error:", sys.stderr), shown, file=sys.stderr, flush=True)
    return code


def _explain(error: Exception) -> tuple[str, int]:
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, OSError) and error.filename is not None and error.strerror:  # e.g. permission denied
        return f"{str(error.filename)[:300]}: {error.strerror}", 2
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        return "out of memory; lower trainer.batch_size, sample.batch_size or the size of the network", 2
    if isinstance(error, OSError):
        return f"{text}; the trace is in {_save_trace(error)}", 2
    return f"this is a bug in diffbench: {kind}: {text[:500]}; the trace to report is in {_save_trace(error)}", 1


def _save_trace(error: Exception) -> str:
    """Write an error's trace to a new temporary file and return its path."""
    try:
        number, path = tempfile.mkstemp(".txt", "diffbench-")
    except OSError:
        return "no file: the folder for temporary files is not writable"
    with open(number, "w", errors="backslashreplace") as file:
        trace = "".join(traceback.format_exception(error))
        file.write(f"diffbench {version('diffbench')}, python {sys.version}\n{' '.join(sys.argv)}\n{trace}")
    return path
