"""Runs side by side: their newest comparable records, and facts about them in a table."""

import math
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from diffbench.evaluation.records import difference, settings_of, values
from diffbench.metrics.memorisation import Share, share_of_copies
from diffbench.metrics.registry import metric_of
from diffbench.reports.results import measured_differently
from diffbench.reports.text import columns
from diffbench.runs.base import Run


def settings(record: dict[str, Any]) -> str:
    """Describe how a record was sampled: its guidance and departures from the run's config; may be empty."""
    return ", ".join(settings_of(record))


def guidance(record: dict[str, Any]) -> str:
    """Describe the guidance of a record's samples: "guidance 1.5", or an empty string."""
    return settings(record | {"departures": {}})


def scores(run: Run[Any]) -> list[dict[str, Any]]:
    """Return the records of the run's current weights, oldest first."""
    current = (run.images_seen, run.ema, run.snapshot)
    return [r for r in run.results if (r["images_seen"], r["ema"], r.get("snapshot", "last")) == current]


def newest_scores(run: Run[Any]) -> list[dict[str, Any]]:
    """Return the newest record of each guidance for the run's current weights, unguided first."""
    chosen = {guidance(r): r for r in scores(run)}
    return [chosen[guided] for guided in sorted(chosen)]


def comparable_scores(runs: Sequence[Run[Any]]) -> list[list[dict[str, Any]]]:
    """Return for each run the newest record of each guidance that was measured the same way in all runs of its kind.

    Raises:
        UserError: if runs have records of a guidance but none by the same protocol; the message says how they differ.
    """
    found = [[(run.kind, guidance(r), r) for r in reversed(scores(run))] for run in runs]
    chosen: list[list[dict[str, Any]]] = [[] for _ in runs]
    for what in sorted({(kind, guided) for records in found for kind, guided, _ in records}):
        groups = [[r for kind, guided, r in records if (kind, guided) == what] for records in found]
        first = next(i for i, group in enumerate(groups) if group)
        for candidate in groups[first]:
            alike = [next((r for r in group if difference(candidate, r) is None), None) for group in groups]
            if all(a is not None for a, group in zip(alike, groups, strict=True) if group):
                break
        else:
            newest = groups[first][0]
            differing = ((i, difference(newest, group[0])) for i, group in enumerate(groups) if group)
            other, text = next((i, text) for i, text in differing if text)
            raise measured_differently(runs[first].folder, runs[other].folder, text, f" ({what[1]})" if what[1] else "")
        for records, record in zip(chosen, alike, strict=True):
            if record is not None:
                records.append(record)
    return chosen


def run_table(runs: Sequence[tuple[str, dict[str, str]]]) -> str:
    """Format facts about runs, a line for each fact and a column for each run; a missing fact is a dash."""
    names = dict.fromkeys(name for _, facts in runs for name in facts)
    head = ["", *(title for title, _ in runs)]  # a run may be named twice
    return columns([head, *([name, *(facts.get(name, "-") for _, facts in runs)] for name in names)])


def run_facts(
    run: Run[Any], scored: Sequence[dict[str, Any]] | None = None, label: Callable[[dict[str, Any]], str] = settings
) -> dict[str, str]:
    """Return facts about a run for a table: size, length, speed, the last validation, scores of the `scored` records.

    By default, these are the newest of each guidance; `label` returns what follows a score's name in brackets.
    """
    scored = newest_scores(run) if scored is None else scored
    seconds = run.seconds
    facts = {
        "parameters": f"{run.cost.parameters:,}",
        "GMACs": f"{run.cost.gmacs:.4f}",
        "images seen": f"{run.images_seen:,}",
        "seconds": f"{seconds:,.0f}" if seconds else "-",
        "images/s": f"{run.images_seen / seconds:,.0f}" if seconds else "-",
    }
    if run.kind == "denoiser":
        for part, name in (("val", "validation bound"), ("train", "bound on training images")):
            bound = run.last(f"{part}/bound")
            facts[f"{name} (nats/dim)"] = "-" if bound is None else f"{bound:.4f}"
        if run.flat.get("trainer.time_sampling") == "loss_aware":
            facts["pairing"] = "none: its noise levels depend on its losses"
    elif run.kind == "classifier":
        last: dict[str, Any] = next((m for m in reversed(run.metrics) if any(k.startswith("val/") for k in m)), {})
        facts |= {name.removeprefix("val/"): f"{v:.4f}" for name, v in last.items() if name.startswith("val/")}
    for record in scored:
        if "numbers" in record:
            facts["numbers per image"] = f"{record['numbers']:,} for {math.prod(run.facts.shape):,}"
        how = label(record)
        for name, value in values(record).items():
            metric, real = metric_of(name), real_score(record, name)
            if metric.shown:
                of = f" of {n:,}" if (n := real_count(record, name)) else ""
                extra = "" if real is None or not metric.floor else f" (real {metric.text(real)}{of})"
                if metric.name == "copies" and (share := copies([record])):
                    extra = f" ({metric.text(share.low)} to {metric.text(share.high)})"
                facts[f"{name} ({how})" if how else name] = metric.text(value) + extra
    samplers = [f"{r['sample']['sampler']} {r['sample']['steps']} steps" for r in scored if r.get("sample")]
    return facts | ({"sampler": ", ".join(dict.fromkeys(samplers))} if samplers else {})


def real_score(record: dict[str, Any], name: str) -> float | None:
    """Return the score of real images, or a judge's accuracy on held-out ones; None if the record has neither."""
    metric = metric_of(name)
    if "/judge@" in name:
        return float(record["judge"]["accuracy"]) if "judge" in record else None
    found = record.get(f"{metric.name}_held_out", (record.get("floor") or {}).get(metric.computed or metric.name))
    return found if isinstance(found, int | float) else None


def real_count(record: dict[str, Any], name: str) -> int | None:
    """Return the number of real images of a floor if it differs from the metric's N, since distances depend on it."""
    metric, found = metric_of(name), record.get("floor") or {}
    if "/judge@" in name or (metric.computed or metric.name) not in found or name.endswith(f"@{found['count']}"):
        return None
    return int(found["count"])


def copies(records: Sequence[dict[str, Any] | None]) -> Share | None:
    """Return the share of copies in the samples of all records, with its interval; None if no record has looked.

    Records judged the same way share the real images from which the false-alarm rate is estimated.
    """
    found = [r["memorisation"] for r in records if r and "memorisation" in r]
    flagged, count = (sum(one[key] for one in found) for key in ("flagged", "count"))
    return share_of_copies(flagged, count, found[0]["false_alarms"], found[0]["real"]) if found else None


def run_values(run: Run[Any]) -> dict[str, Any]:
    """Return a run as values for scripts: progress, last validation, newest scores without and with guidance."""
    validation = {name: value for line in run.metrics for name, value in line.items() if name.startswith("val/")}
    return {
        "run": str(run.folder),
        "kind": run.kind,
        "seed": run.values["seed"],
        "images_seen": run.images_seen,
        "complete": run.complete,
        "seconds": run.seconds,
        "validation": validation,
        "scores": [{"settings": settings(record), **values(record)} for record in newest_scores(run)],
    }


def run_row(run: Run[Any]) -> dict[str, str]:
    """Return a run's row in a list of runs."""
    trainer, bound = run.values["trainer"], run.last("val/bound")
    batch = int(trainer["batch_size"])
    scored = [
        f"{name} {value:.4g}" + (f" ({how})" if (how := settings(record)) else "")
        for record in newest_scores(run)
        for name, value in values(record).items()
        if metric_of(name).listed
    ]
    changed = max(p.stat().st_mtime for p in (*run.folder.glob("*.jsonl"), run.folder / "config.yaml"))
    return {
        "run": str(run.folder),
        "images": f"{run.images_seen:,}",
        "of": f"{-(-int(trainer['max_images']) // batch) * batch:,}",
        "validation bound": "-" if bound is None else f"{bound:.4f}",
        "newest score": next(iter(scored), "-"),
        "last change": f"{datetime.fromtimestamp(changed):%Y-%m-%d %H:%M}",
    }
