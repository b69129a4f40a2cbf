"""Tables as text, and how they fit a terminal: by fewer columns, wrapped cells, or columns below each other."""

import re
import textwrap
from collections.abc import Sequence

from diffbench.core import terminal

GAP = "  "
WRAPPED = 14
"""Characters below which no cell is wrapped: numbers stay whole."""

Table = Sequence[Sequence[str]]
"""Lines of cells; the first one is the head."""


def columns(table: Table, optional: Sequence[str] = (), rule: bool = True) -> str:
    """A table as text; the first column is set to the left, the others to the right.

    On a terminal that is too narrow, optional columns are left out, then long cells are wrapped, then columns are set
    below each other.

    Args:
        table: its cells.
        optional: heads of columns that may be left out, the first one first.
        rule: whether a line stands below the head.
    """
    room = terminal.width()
    if room is None:
        return _block(table, _widths(table), rule)
    for head in optional:
        if _total(_widths(table)) > room and head in table[0]:
            place = table[0].index(head)
            table = [[*row[:place], *row[place + 1 :]] for row in table]
    blocks, count = [], len(table[0])
    chosen = [0]
    for i in range(1, count):
        if len(chosen) > 1 and _total(_shrunk(_only(table, [*chosen, i]), room)) > room:
            blocks.append(chosen)
            chosen = [0]
        chosen.append(i)
    parts = [_only(table, block) for block in (*blocks, chosen)]
    return "\n\n".join(_block(part, _shrunk(part, room), rule) for part in parts)


def filled(text: str) -> str:
    """A paragraph, wrapped where standard output is a terminal."""
    room = terminal.width()
    return text if room is None else textwrap.fill(text, room, break_long_words=False, break_on_hyphens=False)


def _only(table: Table, places: Sequence[int]) -> Table:
    return [[row[i] for i in places] for row in table]


def _widths(table: Table) -> list[int]:
    return [max(map(len, cells)) for cells in zip(*table, strict=True)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _shrunk(table: Table, room: int) -> list[int]:
    """The widths of columns, the widest ones narrowed until all fit, or as far as words allow."""
    widths = _widths(table)
    least = [max(map(_least, cells[1:]), default=0) for cells in zip(*table, strict=True)]
    least = [max(n, *map(len, _words(head))) for n, head in zip(least, table[0], strict=True)]
    while _total(widths) > room and (wide := [i for i, w in enumerate(widths) if w > least[i]]):
        widths[max(wide, key=lambda i: widths[i])] -= 1
    return widths


def _least(cell: str) -> int:
    """The width to which a cell may be wrapped."""
    return len(cell) if len(cell) <= WRAPPED else max(WRAPPED, *map(len, _words(cell)))


def _words(cell: str) -> list[str]:
    """A cell cut where a line may end."""
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
