"""`diffbench findings`: check published claims against the shipped results, or against studies run here."""

import argparse
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffbench.commands.arguments import build_keys
from diffbench.config.layers import COMMAND_LINE, parse_overrides
from diffbench.core.errors import UserError
from diffbench.core.files import write_text
from diffbench.metrics.registry import metric_of
from diffbench.reports.conclusions import Conclusion, conclude
from diffbench.reports.results import Comparison, full_name
from diffbench.reports.tables import agreement
from diffbench.reports.text import counted, markdown
from diffbench.studies.comparison import comparison_of_study, shipped
from diffbench.studies.findings import Claim, Finding, findings, load_claims
from diffbench.studies.runner import run_study

SMALL = "seeds=[0,1,2]"
"""Default seeds of studies that are run to check claims."""
WIDTH = 80
AGREEING = ("fd", "kid", "label_accuracy", "coverage")
"""Metrics of samples whose agreement with the validation bound is reported."""
PAGE = re.compile(r"(<!-- findings -->\n).*?(<!-- end of findings -->)", re.DOTALL)
"""The part of results/README.md that is rewritten."""


@dataclass
class FindingsConfig:
    """Keys of `diffbench findings`."""

    run: bool = False
    """Run the variants that the claims name, with three seeds, and check the claims against these results."""
    experiments: str = "experiments"
    """Folder with findings.yaml (the claims), studies/, and results/ (for each study a folder with report.csv)."""


def run(arguments: argparse.Namespace) -> None:
    """Print the table of claims; with the shipped results, also write it and their answers into results/README.md."""
    own = [o for o in arguments.overrides if o.partition("=")[0] in vars(FindingsConfig())]
    rest, config = [o for o in arguments.overrides if o not in own], build_keys(FindingsConfig, parse_overrides(own))
    if rest and not config.run:
        raise UserError(f"{COMMAND_LINE}: {rest[0]}: belongs to a study; write run=true to run the claims' studies")
    root = Path(config.experiments)
    claims = load_claims(root / "findings.yaml", root / "studies")
    if config.run:
        print(as_text(findings(claims, _run(claims, root / "studies", [SMALL, *rest]))))
        return
    results = shipped(root / "results", root / "studies")
    found = findings(claims, results)
    print(as_text(found))
    if (page := root / "results" / "README.md").is_file():  # `diffbench init` does not copy results
        write_page(page, {name: conclude(comparison) for name, comparison in results.items()}, found)
        print(f"\nwith the answers of the shipped studies: {page}")


def _run(claims: Sequence[Claim], studies: Path, overrides: Sequence[str]) -> dict[str, Comparison]:
    """Run the variants that claims name; return study -> its results."""
    needed: dict[str, list[str]] = {}
    for claim in claims:
        needed.setdefault(claim.study, []).extend(claim.variants)
    folders = {s: run_study(studies / f"{s}.yaml", overrides, only=variants) for s, variants in needed.items()}
    return {study: comparison_of_study(folder) for study, folder in folders.items()}


def as_text(found: Sequence[Finding]) -> str:
    """Format each finding as its verdict, the claim with its source, and what was measured, in 80 columns."""
    lines = ["verdict    published claim; what was measured, with its own 95% interval", "-" * WIDTH]
    for finding in found:
        parts = (f"{finding.claim.claim} [{finding.claim.source}]", f"{finding.claim.study}: {finding.evidence}")
        wrapped = [line for part in parts for line in textwrap.wrap(part, WIDTH - 11)]
        lines += [
            f"{head:10} {line}" for head, line in zip([finding.verdict, *[""] * len(wrapped)], wrapped, strict=False)
        ]
    return "\n".join(lines)


def write_page(page: Path, conclusions: Mapping[str, Conclusion], found: Sequence[Finding]) -> None:
    """Write the tables of a results page, and a figure in the folder of each study's results."""
    from diffbench.reports.figures import styles
    from diffbench.reports.plots import answer

    for name, c in conclusions.items():
        if c.ranked():
            answer(c, styles(list(c.variants)), page.parent / name / "answer.png")
    text = page.read_text()
    if not PAGE.search(text):
        raise UserError(f"{page}: lines <!-- findings --> and <!-- end of findings --> are missing; add them")
    write_text(page, PAGE.sub(lambda m: f"{m[1]}{page_text(conclusions, found)}{m[2]}", text))


def page_text(conclusions: Mapping[str, Conclusion], found: Sequence[Finding]) -> str:
    """Format Markdown tables: each study's question and answer, the published claims, and how well metrics agree."""
    answers = [["question", "answer", "holds for", "figure"]]
    for name, c in conclusions.items():
        against = [f for f in found if f.claim.study == name and f.verdict == "refuted"]
        contrary = [f"**Contradicts {f.claim.source}**: {f.claim.claim} ({f.evidence})" for f in against]
        links = [f"[plot]({name}/answer.png)", f"[report]({name}/report.html)"]
        answers.append(
            [f"`{name}`: {c.comparison.question}", " ".join([c.answer, *contrary]), _holds_for(c), ", ".join(links)]
        )
    claims = [["published claim", "source", "verdict", "measured, with its own 95% interval", "study"]]
    claims += [[f.claim.claim, f.claim.source, f.verdict, f.evidence, f.claim.study] for f in found]
    ranks = [["study", "runs", *(metric_of(name).title for name in AGREEING)]]
    ranks += [[f"`{name}`", *row] for name, c in conclusions.items() if (row := _ranks(c))]
    agreed = "Spearman's rank correlation of the validation bound with other measures, over all runs; 1: they agree."
    return f"{markdown(answers)}\n{markdown(claims)}\n{agreed}\n\n{markdown(ranks)}"


def _ranks(c: Conclusion) -> list[str]:
    """Return the number of runs and the rank correlation of their bound with each of `AGREEING`, or []."""
    bounds = [c.by_seed(variant, "val/bound") for variant in c.variants]
    rows: dict[str | None, str] = {row["measure"]: row.get("val/bound", "-") for row in agreement(c)}
    if not rows or all(bound == bounds[0] for bound in bounds):  # samples of the same networks
        return []
    return [str(sum(map(len, bounds))), *(rows.get(full_name(c.trials, name), "-") for name in AGREEING)]


def _holds_for(c: Conclusion) -> str:
    trials = [t for t in c.trials if t.complete]
    data = dict.fromkeys(str((t.record or {}).get("data", "")) for t in trials)
    images = sorted({t.images for t in trials}) or [0]
    ends = " to ".join(f"{n:,}" for n in dict.fromkeys((images[0], images[-1])))
    parts = [*data, f"{ends} images", *(["budgets " + ", ".join(c.rungs)] if c.rungs else [])]
    return "; ".join([*parts, counted(len({t.seed for t in trials}), "seed")])
