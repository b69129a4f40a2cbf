"""A study's folder as the comparison that its report shows."""

import json
from pathlib import Path

from diffbench.config.layers import read_yaml
from diffbench.core.errors import UserError
from diffbench.reports.results import Comparison
from diffbench.studies.cells import trials_of


def is_study(folder: Path) -> bool:
    """Whether a folder is a study's."""
    return (folder / "study.yaml").is_file()


def comparison_of_study(folder: Path) -> Comparison:
    """What a study has brought so far; nothing is built or trained.

    Raises:
        UserError: if the folder holds no study, or one without cells.
    """
    if not is_study(folder):
        raise UserError(f"{folder}: no study here (study.yaml is missing); run diffbench study on its YAML first")
    study = read_yaml(folder / "study.yaml")
    cells = [(read_yaml(path), path) for path in sorted((folder / "cells").glob("*.yaml"))]
    reported = sorted(((cell["order"], path) for cell, path in cells if not cell["tuning"]), key=lambda item: item[0])
    if not reported:
        raise UserError(f"{folder}: no cells yet; run diffbench study on its YAML first")
    trials = [trial for _, path in reported for trial in trials_of(path)]
    order = list(dict.fromkeys(t.variant for t in trials))
    trials.sort(key=lambda t: (order.index(t.variant), t.seed))
    notes = folder / "notes.json"
    return Comparison(
        title=study["title"] or folder.name,
        question=study["question"],
        trials=trials,
        primary=study["primary"],
        baseline=study["baseline"],
        like_for_like=study["like_for_like"],
        notes=json.loads(notes.read_text()) if notes.exists() else [],
    )
