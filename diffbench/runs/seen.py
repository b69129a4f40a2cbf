"""Run folders as tables and reports see them."""

from pathlib import Path
from typing import Any

from diffbench.core.errors import UserError
from diffbench.runs import lifecycle
from diffbench.runs.base import Run

Seen = Run[Any]


def seen(run: Run[Any]) -> Run[Any]:
    """A loaded run as tables see it."""
    return run


def look(folder: str | Path) -> Run[Any]:
    """A run folder with weights.

    Raises:
        UserError: if it holds no run, no weights yet, or a damaged export of them.
    """
    found = lifecycle.look(folder)
    if not found.has_weights:
        raise UserError(f"{folder}: no weights yet; train the run first")
    return found


def begun(folder: str | Path) -> Run[Any] | None:
    """A run folder that may have no weights yet; None where there is no run."""
    return lifecycle.look(folder) if (Path(folder) / "config.yaml").is_file() else None
