"""What a comparison consists of: runs by variant and seed, and the question that they answer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["complete", "unfinished", "failed", "not begun"]


@dataclass(frozen=True)
class Result:
    """One variant with one seed.

    Attributes:
        variant: its name in tables, as "diffit" or "diffit, guidance=1.5".
        seed: of training.
        status: how far it came.
        folder: the run folder, which need not exist yet; variants that differ only in sampling share it.
        record: the evaluation that belongs to the variant, as results.jsonl holds it; None where there is none.
        why: of a failure, in one line.
    """

    variant: str
    seed: int
    status: Status
    folder: Path
    record: dict[str, Any] | None = None
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """Results that one report sets side by side.

    Attributes:
        title: the report's headline.
        question: what it asks, in a sentence or two.
        results: all variants and seeds, in the order of tables.
        primary: the metric that decides: "val/error", or a score's name up to its extractor or count, as "fd",
            "label_accuracy", "kid".
        baseline: the variant that all others are compared with; None for all pairs.
        like_for_like: False where variants differ in more than the question, which the title then says.
        notes: what a reader must know: budgets, residuals of matching, costs of tuning, failures.
    """

    title: str
    question: str
    results: list[Result]
    primary: str = "val/error"
    baseline: str | None = None
    like_for_like: bool = True
    notes: list[str] = field(default_factory=list)
