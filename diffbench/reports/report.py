"""A comparison's report: text for the terminal, one HTML page that opens offline, a CSV, and plots."""

from collections.abc import Sequence
from pathlib import Path

from diffbench.core.files import write_text
from diffbench.reports import html, tables
from diffbench.reports.conclusions import conclude
from diffbench.reports.plots import draw
from diffbench.reports.results import Comparison
from diffbench.runs.seen import Seen


def write(comparison: Comparison, folder: Path, known: Sequence[Seen] = ()) -> str:
    """Writes report.html, report.csv and plots/*.png into a folder; earlier ones of the same names are replaced.

    Works on a study that is not finished, and on runs without evaluations.

    Args:
        comparison: what is compared.
        folder: where the report goes.
        known: run folders that were read already.

    Returns:
        The same in short, for the terminal.

    Raises:
        UserError: if results were measured differently, or a file is damaged.
    """
    conclusion = conclude(comparison, known)
    pictures = draw(conclusion, folder / "plots")
    write_text(folder / "report.csv", tables.as_csv(conclusion))
    write_text(folder / "report.html", html.render(conclusion, pictures))
    return tables.for_terminal(conclusion)
