"""The results of a study as the comparison of its report, from its folder or from a shipped report.csv alone."""

import json
from pathlib import Path

import pandas as pd

from diffbench.config.layers import read_yaml
from diffbench.core.errors import UserError
from diffbench.reports.results import VALIDATION, Comparison, Trial
from diffbench.studies.config import load_study
from diffbench.studies.trials import FOLDER, TrialFile


def comparison_of_study(folder: Path) -> Comparison:
    """Return the results of a study so far, as the comparison of its report; nothing is built or trained.

    Raises:
        UserError: if the folder contains no study, or a study without trials.
    """
    if not (folder / "study.yaml").is_file():
        raise UserError(f"{folder}: no study here (study.yaml is missing); run diffbench study on its YAML first")
    study = read_yaml(folder / "study.yaml")
    every = [TrialFile(path) for path in sorted((folder / FOLDER).glob("*.yaml"))]
    every.sort(key=lambda file: file.values["order"])
    files = [file for file in every if file.values["tuning"] is None]
    if not files:
        raise UserError(f"{folder}: no trials yet; run diffbench study on its YAML first")
    budgets = [text for _, text in files[0].values["rungs"]] or [""]
    rungs: list[list[Trial]] = [[] for _ in budgets]
    for file in files:
        found, each = file.trials(), len(file.values["evaluations"])
        for i, rung in enumerate(rungs):
            rung += found[i * each : (i + 1) * each]
    order = list(dict.fromkeys(t.variant for t in rungs[-1]))
    for rung in rungs:
        rung.sort(key=lambda t: (order.index(t.variant), t.seed))
    notes = folder / "notes.json"
    return Comparison(
        title=study["title"] or folder.name,
        question=study["question"],
        trials=rungs[-1],
        rungs=dict(zip(budgets, rungs, strict=True)) if len(rungs) > 1 else {},
        primary=study["primary"],
        baseline=study["baseline"],
        command=study.get("command", ""),
        like_for_like=study["like_for_like"],
        notes=json.loads(notes.read_text()) if notes.exists() else [],
        tried=[point for file in every if file.values["tuning"] is not None for point in file.points(study["primary"])],
    )


def shipped(results: Path, studies: Path) -> dict[str, Comparison]:
    """Return study name -> comparison for every folder in `results` with a report.csv; `studies` has their YAMLs.

    Raises:
        UserError: if a folder is not named after a study, or a table lacks a column.
    """
    found = {}
    for path in sorted(results.glob("*/report.csv")):
        name = path.parent.name
        if not (studies / f"{name}.yaml").is_file():
            raise UserError(f"{path}: no study {studies / name}.yaml; name the folder of results after its study")
        found[name] = comparison_of_csv(path, studies / f"{name}.yaml")
    return found


def comparison_of_csv(path: Path, study: Path) -> Comparison:
    """Return the comparison stored in a report.csv, with all budgets of a ladder."""
    config = load_study(study)
    try:
        table = pd.read_csv(path, dtype={"variant": str, "budget": str}, keep_default_na=False, na_values=[""])
    except ValueError as e:
        raise UserError(f"{path}: not a table ({e}); copy the report.csv of a study's folder") from None
    if missing := {"variant", "seed", "status", "images"} - {*table}:
        raise UserError(f"{path}: no column {min(missing)}; copy the report.csv of a study's folder")
    if table.empty:
        raise UserError(f"{path}: no rows; copy the report.csv of a study's folder")
    rungs: dict[str, list[Trial]] = {}
    for row in table.to_dict("records"):
        known = {str(key): value for key, value in row.items() if not pd.isna(value)}
        values = {k: float(v) for k, v in known.items() if "@" in k or k.startswith(VALIDATION)}
        record = {**values, "data": known.get("data", "")} if values else None
        variant, seed, rung = known["variant"], int(known["seed"]), rungs.setdefault(known.get("budget", ""), [])
        first = next((t for t in rung if (t.variant, t.seed) == (variant, seed)), None)
        if first is not None and record is not None:  # another sampling seed of this trial
            first.more.append(record)
        else:
            rung.append(Trial(variant, seed, known["status"], None, record, at=int(known.get("images", 0))))
    trials = rungs[list(rungs)[-1]]
    variants = {t.variant for t in trials}
    return Comparison(
        title=config.title,
        question=config.question,
        trials=trials,
        primary=config.primary,
        baseline=config.baseline if config.baseline in variants else None,
        like_for_like=config.like_for_like,
        rungs=rungs if len(rungs) > 1 else {},
    )
