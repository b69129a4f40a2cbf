"""The main tables of a report, for use in a paper: LaTeX (needs booktabs) or Markdown."""

import re
from pathlib import Path

from diffbench.core.errors import UserError
from diffbench.evaluation.images import refuse_to_overwrite
from diffbench.metrics.registry import metric_of
from diffbench.reports.conclusions import Conclusion
from diffbench.reports.tables import WIDEST, pairs, quality, shown
from diffbench.reports.text import Rows, Table, markdown, table_of, transposed

SUFFIXES = (".tex", ".md")
_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "<": "$<$",
    ">": "$>$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def check_export(path: Path) -> None:
    """Refuse an export file that exists or has no suffix of `SUFFIXES`, before anything is computed."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"export: must end in {' or '.join(SUFFIXES)}, got {path}")
    refuse_to_overwrite(path)


def exported(c: Conclusion, suffix: str) -> str:
    """Format the tables of variants and pairs; the best means are bold, † marks variants not shown to be worse."""
    title = c.comparison.title
    note = (
        f"{title}. Mean over seeds ± half of its 95% interval; bold: the best mean;"
        f" †: not shown to be worse than the best by {c.metric.title}."
    )
    tables = [(note, table_of(_marked(c)))]
    if c.tests:
        note = f"{title}. First minus second by {c.metric.title}, paired by seed; Holm's correction."
        tables.append((note, table_of(pairs(c))))
    if suffix == ".tex":
        return "\n".join(_latex(table, note) for note, table in tables)
    return "\n".join(f"{note}\n\n{markdown(table, numbers=True)}" for note, table in tables)


def _marked(c: Conclusion) -> Rows:
    """Return the table of variants with the best in **bold** and an arrow towards better values in each head."""
    best = {}
    for name in (n for n in shown(c) if metric_of(n).direction):
        means = {v: c.summaries[v][name].mean for v in c.ranked(name)}
        best[name] = [v for v, mean in means.items() if mean == next(iter(means.values()))]
    first, *others = c.ranked() or [""]
    tests = c.tests_of(first)
    unbeaten = [v for v in others if v not in tests or tests[v].winner != first]
    rows = []
    for row in quality(c):
        cells = {"variant": row["variant"], "seeds": row["seeds"] or "-"}
        for name in shown(c):
            text = row.get(name, "-") + "†" * (name == c.name and row["variant"] in unbeaten)
            arrow = {"lower": " ↓", "higher": " ↑", None: ""}[metric_of(name).direction]
            cells[f"{name}{arrow}"] = f"**{text}**" if row["variant"] in best.get(name, []) else text
        rows.append(cells)
    return rows if len(c.variants) > WIDEST else transposed(rows, " ")


def _latex(table: Table, note: str) -> str:
    def escaped(text: str) -> str:
        text = "".join(_LATEX.get(c, c) for c in text)
        text = re.sub(r"^-(?=[\d.])|(?<= )-(?=[\d.])", "$-$", text)
        return re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", text)

    head, *body = (f"{' & '.join(map(escaped, line))} \\\\" for line in table)
    lines = [r"\begin{table}[t]", r"\centering", f"\\caption{{{escaped(note)}}}"]
    lines += [f"\\begin{{tabular}}{{l{'r' * (len(table[0]) - 1)}}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"
