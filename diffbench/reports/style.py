"""How plots look: colours that colour-blind readers tell apart, a line style and a marker of its own for each line."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffbench.core.files import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
"""Of Okabe and Ito (2008), without the yellow that white swallows."""
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST_LINES = 8
"""Lines in one plot."""
INK, FAINT = "#1f2933", "#9aa5b1"


@dataclass(frozen=True)
class Picture:
    """A plot on disk, with what a reader needs beside it."""

    path: Path
    heading: str
    caption: str


@dataclass(frozen=True)
class Style:
    """How one variant is drawn, in every plot."""

    colour: str
    dash: str
    marker: str


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A style for each name, by its place."""
    return {
        name: Style(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(names)
    }


def figure(width: float, height: float) -> "Figure":
    """An empty figure in inches, apart from pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def tidy(axis: "Axes", xlabel: str, ylabel: str) -> None:
    """Labels, a faint grid, no box."""
    axis.set_xlabel(plain(xlabel), color=INK)
    axis.set_ylabel(plain(ylabel), color=INK)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(FAINT)
    axis.tick_params(colors=INK, labelsize=8.5)


def few_numbers(axis: "Axes", which: str = "y") -> None:
    """A logarithmic axis with plain numbers at its ticks, also where it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    chosen = axis.yaxis if which == "y" else axis.xaxis
    low, high = axis.get_ylim() if which == "y" else axis.get_xlim()
    wide = low > 0 and high / low > 30
    chosen.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), numticks=12))
    chosen.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    chosen.set_minor_formatter(NullFormatter())


def short_numbers(axis: "Axes") -> None:
    """Numbers of the x axis as 50, 20k, 1.5M, 2e12."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def told(value: float, _: int) -> str:
        for size, unit in ((1e9, ""), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:g}{unit}" if unit else f"{value:g}".replace("e+", "e")
        return f"{value:g}"

    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(FuncFormatter(told))


def plain(text: str) -> str:
    """A name as it is written: matplotlib would read formulas between dollar signs."""
    return text.replace("$", r"\$")


def save(drawn: "Figure", path: Path, heading: str, caption: str) -> Picture:
    """Writes a figure as PNG."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png")
    with atomic(path) as file:
        file.write(buffer.getvalue())
    return Picture(path, heading, caption)
