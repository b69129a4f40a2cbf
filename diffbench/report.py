"""Runs side by side: the table that a run ends with, and the one that `compare` prints."""

from collections.abc import Sequence
from typing import Any

from diffbench.run import Run
from diffbench.scoring import metrics, results
from diffbench.trained import Trained


def facts(run: Run) -> dict[str, str]:
    """What a table says of a run: size, length, speed, validation error, and the newest scores of each guidance."""
    lines = metrics(run.folder)
    error = next((m["val/error"] for m in reversed(lines) if "val/error" in m), None)
    rates = [m["perf/images_per_s"] for m in lines if "perf/images_per_s" in m]
    images = run.images_seen
    cost = run.cost
    # The series holds images and images/s of each interval: their quotients sum to the seconds of training.
    seconds = _training_seconds(lines)
    row = {
        "parameters": f"{cost.parameters:,}",
        "GMACs": f"{cost.gmacs:.4f}",
        "images seen": f"{images:,}",
        "seconds": f"{seconds:,.0f}" if rates else "-",
        "images/s": f"{images / seconds:,.0f}" if seconds else "-",
        "validation error": "-" if error is None else f"{error:.4f}",
    }
    if run.config.trainer.time_sampling == "loss_aware":
        row["pairing"] = "none: its times follow its losses"
    scored = newest_scores(run)
    for record in scored:
        guided = "" if record["guidance"] == 1 else f" (guidance {record['guidance']:g})"
        for name, value in record.items():
            if "@" in name and not name.startswith("nearest"):
                row[name + guided] = f"{100 * value:.1f}%" if name.startswith("label_accuracy") else f"{value:.3f}"
        nearest = next(v for k, v in record.items() if k.startswith("nearest_train@"))
        held_out = record["nearest_train_held_out"]
        row[f"nearest training image{guided}"] = f"{nearest:.3f} (held-out digits {held_out:.3f})"
    if scored:
        how = [f"{r['sample']['sampler']} {r['sample']['steps']} steps" for r in scored]
        row["sampler"] = ", ".join(dict.fromkeys(how))
    return row


def trained_facts(run: Trained[Any]) -> dict[str, str]:
    """What a table says of a run of another kind than a denoiser: size, length and its last validation numbers."""
    lines = metrics(run.folder)
    last: dict[str, Any] = next((m for m in reversed(lines) if any(k.startswith("val/") for k in m)), {})
    return {
        "parameters": f"{run.cost.parameters:,}",
        "GMACs": f"{run.cost.gmacs:.4f}",
        "images seen": f"{run.images_seen:,}",
        "seconds": f"{_training_seconds(lines):,.0f}",
        **{name.removeprefix("val/"): f"{value:.4f}" for name, value in last.items() if name.startswith("val/")},
    }


def newest_scores(run: Run) -> list[dict[str, Any]]:
    """The newest record of each guidance weight for the weights that the run holds, unguided first."""
    held = [r for r in results(run.folder) if (r["images_seen"], r["ema"]) == (run.images_seen, run.ema)]
    chosen = {r["guidance"]: r for r in held}
    return [chosen[w] for w in sorted(chosen)]


def table(rows: Sequence[tuple[str, dict[str, str]]]) -> str:
    """Facts as lines, runs as columns; a missing fact is a dash."""
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    cells = [["", *(title for title, _ in rows)]]
    cells += [[name, *(row.get(name, "-") for _, row in rows)] for name in names]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    text = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    return "\n".join([text[0].rstrip(), rule, *(t.rstrip() for t in text[1:])])


def _training_seconds(lines: Sequence[dict[str, Any]]) -> float:
    total, before = 0.0, 0
    for m in lines:
        if "perf/images_per_s" in m:
            total += (m["images"] - before) / m["perf/images_per_s"]
            before = m["images"]
    return total
