"""A study's results as shipped, without its runs: what its report.csv says, as the comparison of its report."""

from pathlib import Path

import pandas as pd

from diffbench.core.errors import UserError
from diffbench.reports.results import VALIDATION, Comparison, Trial
from diffbench.studies.config import load_study


def shipped(results: Path, studies: Path) -> dict[str, Comparison]:
    """The comparison of every study whose folder in `results` holds a report.csv, by its name, that of a YAML.

    Raises:
        UserError: if a folder is named after no study, or a table lacks a column.
    """
    found = {}
    for path in sorted(results.glob("*/report.csv")):
        name = path.parent.name
        if not (studies / f"{name}.yaml").is_file():
            raise UserError(f"{path}: no study {studies / name}.yaml; name the folder of results as its study")
        found[name] = comparison_of_csv(path, studies / f"{name}.yaml")
    return found


def comparison_of_csv(path: Path, study: Path) -> Comparison:
    """The comparison that a report.csv holds; of a ladder, with all its budgets."""
    asked, table = load_study(study), pd.read_csv(path, dtype={"variant": str, "budget": str})
    if missing := {"variant", "seed", "status", "images"} - {*table}:
        raise UserError(f"{path}: no column {min(missing)}; copy the report.csv of a study's folder")
    rungs: dict[str, list[Trial]] = {}
    for row in table.to_dict("records"):
        known = {str(key): value for key, value in row.items() if not pd.isna(value)}
        values = {k: float(v) for k, v in known.items() if "@" in k or k.startswith(VALIDATION)}
        record = {**values, "data": known.get("data", "")} if values else None
        variant, seed, rung = known["variant"], int(known["seed"]), rungs.setdefault(known.get("budget", ""), [])
        first = next((t for t in rung if (t.variant, t.seed) == (variant, seed)), None)
        if first is not None and record is not None:  # another sampling seed of it
            first.more.append(record)
        else:
            rung.append(Trial(variant, seed, known["status"], None, record, at=int(known.get("images", 0))))
    trials = rungs[list(rungs)[-1]]
    variants = {t.variant for t in trials}
    return Comparison(
        title=asked.title,
        question=asked.question,
        trials=trials,
        primary=asked.primary,
        baseline=asked.baseline if asked.baseline in variants else None,
        like_for_like=asked.like_for_like,
        rungs=rungs if len(rungs) > 1 else {},
    )
