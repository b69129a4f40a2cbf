"""Numbers, lists and tables as text; tables fit the terminal by dropping columns, wrapping cells or splitting."""

import math
import re
import textwrap
from collections.abc import Sequence

from diffbench.core import terminal
from diffbench.metrics.registry import metric_of
from diffbench.reports.statistics import Paired, Summary

GAP = "  "
WRAPPED = 14
"""Longest cell that is never wrapped, so that numbers stay whole."""

Rows = list[dict[str, str]]
"""Rows of a table, each as column head -> cell."""
Table = Sequence[Sequence[str]]
"""Rows of cells; the first one is the head."""


def number(value: float, name: str = "", scale: float | None = None) -> str:
    """Format a metric's value with the digits that its uncertainty `scale` supports, else four significant digits."""
    percent = metric_of(name).percent
    factor = 100 if percent else 1
    value, scale = value * factor, None if scale is None else scale * factor
    if not math.isfinite(value):
        return "-"
    scale = None if scale is None or scale <= 1e-9 * abs(value) else scale
    # Two digits of an uncertainty whose first digit is 1, 2 or 3, else one.
    size = scale / (10 if float(f"{scale:e}"[:3]) < 4 else 1) if scale else abs(value) / 1000
    decimals = min(8, max(0, -math.floor(math.log10(size)))) if size else 1 if percent else 4
    return f"{value:,.{decimals}f}{'%' if percent else ''}"


def mean_text(found: Summary, name: str) -> str:
    """Format mean ± half of the 95% interval, or the mean alone without an interval."""
    if found.half is None:
        return number(found.mean, name)
    unit = "%" if metric_of(name).percent else ""
    if found.half <= 1e-9 * abs(found.mean):
        return f"{number(found.mean, name).removesuffix('%')} ± 0{unit}"
    parts = [number(v, name, found.half).removesuffix("%") for v in (found.mean, found.half)]
    return f"{' ± '.join(parts)}{unit}"


def title_and_unit(name: str) -> str:
    """Return the title and unit of a metric: "validation bound, nats/dim"."""
    metric = metric_of(name)
    return ", ".join(text for text in (metric.title, metric.unit) if text)


def interval_text(pair: Paired, name: str) -> str:
    """Format the interval of a difference, "-0.0071 to -0.0045", or say why there is none."""
    if pair.interval is None:
        return f"none: {counted(pair.n, 'shared seed') if pair.finite else 'a value is not finite'}"
    return " to ".join(number(end, name, pair.half) for end in pair.interval)


def percent(share: float) -> str:
    """Format a share as a percentage: 95%, 97.5%, 99.17%."""
    return f"{100 * share:.4g}%"


def listed(names: Sequence[str]) -> str:
    """Join names as "a, b and c", with semicolons if names contain commas; of more than eight, list the first six."""
    names = names if len(names) <= 8 else [*names[:6], f"{len(names) - 6} more"]
    between = "; " if any("," in name for name in names) else ", "
    return names[0] if len(names) == 1 else f"{between.join(names[:-1])} and {names[-1]}" if names else ""


def counted(n: int, what: str) -> str:
    """Format a count with its noun: 1 seed, 3 seeds."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def as_text(rows: Sequence[dict[str, str]], optional: Sequence[str] = (), rule: bool = True) -> str:
    """Format rows as a table, with their keys as heads and a dash for a missing cell; see `columns`."""
    return columns(table_of(rows), optional, rule)


def table_of(rows: Sequence[dict[str, str]]) -> list[list[str]]:
    """Convert rows to lists of cells below a list of heads; a missing cell is a dash."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [names, *([row.get(name, "-") for name in names] for row in rows)]


def markdown(table: Table, numbers: bool = False) -> str:
    """Format a table in Markdown; with `numbers`, all columns but the first are aligned right."""
    table = [[" ".join(cell.split()).replace("|", r"\|") for cell in line] for line in table]
    head, *body = (f"| {' | '.join(line)} |" for line in table)
    rule = "|".join(["", "---", *["---:" if numbers else "---"] * (len(table[0]) - 1), ""])
    return "\n".join([head, rule, *body]) + "\n"


def transposed(rows: Sequence[dict[str, str]], corner: str = "") -> Rows:
    """Swap rows and columns; `corner` heads the first column, in brackets if a column already has that name."""
    first = next(iter(rows[0]))
    while any(row[first] == corner for row in rows):
        corner = f"({corner})"
    names = dict.fromkeys(name for row in rows for name in row if name != first)
    return [{corner: name} | {row[first]: row[name] for row in rows if name in row} for name in names]


def columns(table: Table, optional: Sequence[str] = (), rule: bool = True) -> str:
    """Format a table as text, with the first column aligned left and the others right.

    On a terminal that is too narrow, optional columns are dropped, then long cells are wrapped, then the table is split
    into blocks of columns, one below the other.

    Args:
        table: rows of cells, the head first.
        optional: heads of columns that may be dropped, in the order of dropping.
        rule: whether to draw a line below the head.
    """
    available = terminal.width()
    if available is None:
        return _block(table, _widths(table), rule)
    for head in optional:
        if _total(_widths(table)) > available and head in table[0]:
            place = table[0].index(head)
            table = [[*row[:place], *row[place + 1 :]] for row in table]
    blocks, count = [], len(table[0])
    chosen = [0]
    for i in range(1, count):
        if len(chosen) > 1 and _total(_shrunk(_only(table, [*chosen, i]), available)) > available:
            blocks.append(chosen)
            chosen = [0]
        chosen.append(i)
    parts = [_only(table, block) for block in (*blocks, chosen)]
    return "\n\n".join(_block(part, _shrunk(part, available), rule) for part in parts)


def filled(text: str) -> str:
    """Wrap a paragraph if standard output is a terminal."""
    available = terminal.width()
    return text if available is None else textwrap.fill(text, available, break_long_words=False, break_on_hyphens=False)


def _only(table: Table, places: Sequence[int]) -> Table:
    return [[row[i] for i in places] for row in table]


def _widths(table: Table) -> list[int]:
    return [max(map(len, cells)) for cells in zip(*table, strict=True)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _shrunk(table: Table, available: int) -> list[int]:
    """Return the widths of columns, narrowing the widest until all fit, or as far as their words allow."""
    widths = _widths(table)
    least = [max(map(_least, cells[1:]), default=0) for cells in zip(*table, strict=True)]
    least = [max(n, *map(len, _words(head))) for n, head in zip(least, table[0], strict=True)]
    while _total(widths) > available and (wide := [i for i, w in enumerate(widths) if w > least[i]]):
        widths[max(wide, key=lambda i: widths[i])] -= 1
    return widths


def _least(cell: str) -> int:
    """Return the smallest width to which a cell may be wrapped."""
    return len(cell) if len(cell) <= WRAPPED else max(WRAPPED, *map(len, _words(cell)))


def _words(cell: str) -> list[str]:
    return [word.rstrip() for word in re.split(r"(?<=[ /,=@-])", cell)]


def _block(table: Table, widths: Sequence[int], rule: bool) -> str:
    lines: list[str] = []
    for number, row in enumerate(table):
        cells = [_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
        for i in range(max(map(len, cells))):
            texts = [cell[i] if i < len(cell) else "" for cell in cells]
            first, *rest = [t.rjust(w) if n else t.ljust(w) for n, (t, w) in enumerate(zip(texts, widths, strict=True))]
            lines.append(GAP.join([first, *rest]).rstrip())
        if rule and not number:
            lines.append("-" * _total(widths))
    return "\n".join(lines)


def _wrapped(cell: str, width: int) -> list[str]:
    lines = [""]
    for part in re.split(r"(?<=[ /,=@-])", cell) if len(cell) > width else [cell]:
        if lines[-1] and len((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return [line.rstrip() for line in lines]
