"""Runs side by side: the table that a run ends with, and the one that `compare` prints."""

from collections.abc import Sequence
from typing import Any

from diffbench.autoencoding import AutoencoderRun
from diffbench.run import Run
from diffbench.scoring import metrics, results
from diffbench.trained import Trained


def facts(run: Trained[Any]) -> dict[str, str]:
    """What a table says of a run: size, length, speed, and what its kind is judged by."""
    if isinstance(run, AutoencoderRun):
        return _common(run) | _reconstruction(run)
    return _denoising(run) if isinstance(run, Run) else _common(run) | _validation(run)


def _denoising(run: Run) -> dict[str, str]:
    """Validation error, and the newest scores of each guidance."""
    error = next((m["val/error"] for m in reversed(metrics(run.folder)) if "val/error" in m), None)
    row = _common(run) | {"validation error": "-" if error is None else f"{error:.4f}"}
    if run.config.trainer.time_sampling == "loss_aware":
        row["pairing"] = "none: its times follow its losses"
    scored = newest_scores(run)
    for record in scored:
        guided = "" if record["guidance"] == 1 else f" (guidance {record['guidance']:g})"
        for name, value in record.items():
            if name.startswith("reconstruction_fd"):
                row[f"floor: {name.removeprefix('reconstruction_')} of reconstructions"] = f"{value:.3f}"
            elif "@" in name and not name.startswith("nearest"):
                row[name + guided] = f"{100 * value:.1f}%" if name.startswith("label_accuracy") else f"{value:.3f}"
        nearest = next(v for k, v in record.items() if k.startswith("nearest_train@"))
        held_out = record["nearest_train_held_out"]
        row[f"nearest training image{guided}"] = f"{nearest:.3f} (held-out digits {held_out:.3f})"
    if scored:
        how = [f"{r['sample']['sampler']} {r['sample']['steps']} steps" for r in scored]
        row["sampler"] = ", ".join(dict.fromkeys(how))
    return row


def _reconstruction(run: AutoencoderRun) -> dict[str, str]:
    """What an autoencoder's newest record says, PCA with as many numbers beside it."""
    scored = newest_scores(run)
    if not scored:
        return {}
    record = {name.split("@")[0]: value for name, value in scored[-1].items()}
    count = next(name.split("@")[1] for name in scored[-1] if "@" in name)
    numbers, pixels = record["numbers"], run.train_set.images[0].numel()
    row = {"numbers a picture": f"{numbers:,} for {pixels:,}"}
    for name, title, form in (("psnr", "PSNR", ".2f"), ("ssim", "SSIM", ".4f")):
        row[f"{title}@{count} (PCA with as many numbers)"] = f"{record[name]:{form}} ({record[name + '_pca']:{form}})"
    for name, value in record.items():
        if name.startswith("reconstruction_fd"):
            row[f"{name.removeprefix('reconstruction_')}@{count} of reconstructions"] = f"{value:.3f}"
        if name.startswith("label_accuracy"):
            row[f"{name}@{count} of reconstructions"] = f"{100 * value:.1f}%"
    return row


def _common(run: Trained[Any]) -> dict[str, str]:
    """Size, length and speed."""
    images, cost = run.images_seen, run.cost
    # The series holds images and images/s of each interval: their quotients sum to the seconds of training.
    seconds = _training_seconds(metrics(run.folder))
    return {
        "parameters": f"{cost.parameters:,}",
        "GMACs": f"{cost.gmacs:.4f}",
        "images seen": f"{images:,}",
        "seconds": f"{seconds:,.0f}" if seconds else "-",
        "images/s": f"{images / seconds:,.0f}" if seconds else "-",
    }


def _validation(run: Trained[Any]) -> dict[str, str]:
    """The last validation numbers."""
    last: dict[str, Any] = next((m for m in reversed(metrics(run.folder)) if any(k.startswith("val/") for k in m)), {})
    return {name.removeprefix("val/"): f"{v:.4f}" for name, v in last.items() if name.startswith("val/")}


def newest_scores(run: Trained[Any]) -> list[dict[str, Any]]:
    """The newest record of each guidance weight for the weights that the run holds, unguided first."""
    held = [r for r in results(run.folder) if (r["images_seen"], r["ema"]) == (run.images_seen, run.ema)]
    chosen = {r.get("guidance", 1.0): r for r in held}
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
