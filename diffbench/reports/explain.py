"""An explanation of a class as a table, and as a figure: its coefficients and the effect of each on the images."""

from collections.abc import Mapping

from matplotlib.figure import Figure, FigureBase
from torch import Tensor

from diffbench.evaluation.explain import Explanation
from diffbench.reports.figures import COLOURS, FAINT, INK, escape_dollars, label, name_row, new_figure
from diffbench.sampling.images import grid

MOST = 12
"""Largest number of elements in a table or a figure."""


def explanation_table(explanation: Explanation) -> str:
    """Format the largest coefficients in order, those of the reconstruction first, followed by its losses."""
    width = max(len("class"), *(len(e.name) for e in explanation.elements[:MOST]))
    lines = [f"{'':>4} {'class':<{width}} {'coefficient':>12} {'cosine':>8} {'least squares':>14}"]
    for place, e in enumerate(explanation.elements[:MOST], start=1):
        number = f"{place}." if place <= explanation.n else ""
        lines.append(f"{number:>4} {e.name:<{width}} {e.coefficient:>12.3f} {e.cosine:>8.2f} {e.nearest:>14.3f}")
    total = sum(e.coefficient for e in explanation.elements)
    more = f" of {len(explanation.elements)} classes" if len(explanation.elements) > MOST else ""
    lines.append(f"{'':>4} {'sum':<{width}} {total:>12.3f}{more}")
    lines.append("loss: " + ", ".join(f"{name} {value:.3g}" for name, value in explanation.losses.items()))
    lines += [f"{a} and {b} are interchangeable: their cosine is {c:.2f}" for a, b, c in explanation.twins]
    return "\n".join([*lines, explanation.verdict])


def changes(images: Mapping[str, Tensor]) -> dict[str, float]:
    """Return title -> RMS difference between a row's images and the first row's, in grey levels of 255."""
    first = next(iter(images.values()), None)
    if first is None:
        return {}
    return {title: float((x.double() - first.double()).square().mean().sqrt()) for title, x in images.items()}


def explanation_figure(explanation: Explanation, images: Mapping[str, Tensor]) -> Figure:
    """Draw the coefficients as bars, largest first, next to rows of images from the same noise if there are any."""
    rows = dict(list(images.items())[: MOST + 2])
    elements = explanation.elements[:MOST]
    figure = new_figure(9.5 if rows else 5, max(2.6, 0.34 * len(elements) + 1.2, 0.62 * len(rows) + 0.8))
    panels = figure.subfigures(1, 2, width_ratios=[1, 1.25], squeeze=False)[0] if rows else [figure]
    bars = panels[0].subplots()
    colours = [COLOURS[0] if place < explanation.n else FAINT for place in range(len(elements))]
    bars.barh(range(len(elements)), [e.coefficient for e in elements], color=colours)
    bars.set_yticks(range(len(elements)), [escape_dollars(e.name) for e in elements])
    bars.invert_yaxis()
    label(bars, "coefficient (blue: in the reconstruction)")
    bars.set_title(escape_dollars(f"what {explanation.name} is made of"), fontsize=10, color=INK)
    if rows:
        _draw_rows(panels[1], rows)
    return figure


def _draw_rows(panel: FigureBase, rows: Mapping[str, Tensor]) -> None:
    differences = changes(rows)
    for place, (axis, (title, x)) in enumerate(
        zip(panel.subplots(len(rows), 1, squeeze=False)[:, 0], rows.items(), strict=True)
    ):
        axis.imshow(grid(x, len(x), scale=max(1, 40 // x.shape[-1])), interpolation="nearest")
        name_row(axis, escape_dollars(title) + (f"\nmoved by {differences[title]:.0f}" if place else ""), 8)
    panel.supxlabel("same noise in every row; moved: RMS from the first row, of 255 levels", fontsize=8, color=INK)
