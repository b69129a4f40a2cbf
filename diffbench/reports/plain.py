"""A conclusion as plain values, for scripts."""

from dataclasses import asdict
from typing import Any

from diffbench.reports.conclusions import Conclusion


def plain(c: Conclusion) -> dict[str, Any]:
    """What `compare --json` prints: the answer, every variant's means, the tests between them, the trials."""
    return {
        "title": c.comparison.title,
        "outcome": c.outcome,
        "answer": c.answer,
        "primary": c.name,
        "variants": {v: {name: asdict(found) for name, found in c.summaries[v].items()} for v in c.variants},
        "tests": [
            {"first": x.first, "second": x.second, "winner": x.winner, "verdict": x.verdict, **asdict(x.paired)}
            for x in c.tests
        ],
        "trials": [
            {"variant": t.variant, "seed": t.seed, "status": t.status, "run": t.run and str(t.run.folder), **t.values}
            for t in c.trials
        ],
        "notes": [*c.comparison.notes, *c.notes],
    }
