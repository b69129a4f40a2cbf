"""The look of figures: colours that are safe for colour-blind readers, and a dash and a marker for each line."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from diffbench.core.files import write_bytes
from diffbench.metrics.registry import metric_of
from diffbench.reports.statistics import Summary
from diffbench.runs.base import Run
from diffbench.sampling.images import save_image

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
"""Colours of Okabe and Ito (2008), without the yellow, which is hard to see on white."""
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT = "#1f2933", "#9aa5b1"


@dataclass(frozen=True)
class Plot:
    """A figure on disk, with its heading and caption in the report."""

    path: Path
    heading: str
    caption: str


class Style(NamedTuple):
    """The look of one variant in every figure."""

    colour: str
    dash: str
    marker: str


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Assign a style to each name by its position."""
    return {
        name: Style(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(names)
    }


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure of a size in inches, independent of pyplot's global state."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def legend(figure: Figure, panel: Axes) -> None:
    """Put the legend of a panel's lines above the figure."""
    handles = panel.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)


def label(axis: Axes, xlabel: str, ylabel: str = "") -> None:
    """Label both axes, add a faint grid, and remove the box."""
    axis.set_xlabel(escape_dollars(xlabel), color=INK)
    axis.set_ylabel(escape_dollars(ylabel), color=INK)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(FAINT)
    axis.tick_params(colors=INK, labelsize=8.5)


def axis_label(name: str, unit: str = "") -> str:
    """Return the label of a metric's axis: its title, the better direction and the unit."""
    facts = ", ".join(text for text in (metric_of(name).better(), unit or metric_of(name).unit) if text)
    return f"{metric_of(name).title} ({facts})" if facts else metric_of(name).title


def mean_line(
    axis: Axes,
    style: Style,
    x: Sequence[float] | np.ndarray,
    found: Sequence[Summary],
    name: str | None,
    unit: float = 1.0,
    **look: Any,
) -> np.ndarray:
    """Draw means with a band of 95% intervals, or without a band below three seeds, and return the means."""
    mean = unit * np.array([s.mean for s in found])
    half = unit * np.array([s.half or 0.0 for s in found])
    legend_name = {} if name is None else {"label": escape_dollars(name)}
    axis.plot(x, mean, **{"linestyle": style.dash, "color": style.colour} | legend_name | look)
    axis.fill_between(x, mean - half, mean + half, color=style.colour, alpha=0.16, linewidth=0)
    return mean


def name_row(axis: Axes, name: str, size: float = 9) -> None:
    """Turn a panel into a row of images, with its name on the left and no ticks or box."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=size, color=INK)


def log_scale(axis: Axes, which: str = "y") -> None:
    """Make an axis logarithmic with plain numbers at its ticks, even if it spans less than a decade."""
    axis.set(**{f"{which}scale": "log"})
    chosen = axis.yaxis if which == "y" else axis.xaxis
    low, high = chosen.get_view_interval()
    span = high / low if low > 0 else 1.0
    subs = (1.0,) if span > 300 else (1.0, 3.0) if span > 20 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    chosen.set_major_locator(LogLocator(subs=subs, numticks=12))
    chosen.set_major_formatter(FuncFormatter(_short))
    chosen.set_minor_formatter(NullFormatter())


def short_numbers(axis: Axes) -> None:
    """Abbreviate the numbers of the x axis: 50, 20k, 1.5M, 2e12."""
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(FuncFormatter(_short))


def _short(value: float, _: int) -> str:
    if abs(value) >= 1e9:
        return f"{value:g}".replace("e+", "e")
    size, unit = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k") if abs(value) >= 1e3 else (1.0, "")
    return f"{value / size:g}{unit}"


def escape_dollars(text: str) -> str:
    """Escape dollar signs in a name, between which matplotlib would typeset a formula."""
    return text.replace("$", r"\$")


def save_with_tensorboard(figure: Figure, path: Path, runs: Sequence[Run[Any]], what: str) -> None:
    """Write a figure to a file, in the format of its suffix, and to TensorBoard in the folder `what` of each run."""
    pixels = np.asarray(Image.open(io.BytesIO(_png(figure))).convert("RGB"))
    save_image(pixels, path)
    for run in runs:
        with SummaryWriter(str(run.folder / what)) as writer:
            writer.add_image(f"{what}/{path.stem}", pixels, run.images_seen, dataformats="HWC")


def save(figure: Figure, path: Path, heading: str = "", caption: str = "") -> Plot:
    """Write a figure as PNG and return it with its heading and caption."""
    write_bytes(path, _png(figure))
    return Plot(path, heading, caption)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
