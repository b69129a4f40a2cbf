"""Runs side by side: the table that a run ends with, and the one that `compare` prints."""

from collections.abc import Sequence
from typing import Any

from diffbench.config.load import from_dict
from diffbench.core.errors import UserError
from diffbench.evaluation.records import difference, values
from diffbench.runs.build import load_data
from diffbench.runs.seen import Seen, seen

SHOWN = {"fd", "fid", "sfid", "fd_gap", "fid_gap", "fd_infinity", "fid_infinity", "kid", "label_accuracy", "precision"}
SHOWN |= {"recall", "coverage"}
"""What a table shows; the records hold more. Density and precision can rise for bad samples: neither stands alone."""


def facts(run: Seen, scored: Sequence[dict[str, Any]] | None = None) -> dict[str, str]:
    """What a table says of a run: size, length, speed, and what its kind is judged by.

    Args:
        run: a run, loaded or seen.
        scored: its records; by default the newest of each guidance.
    """
    run = seen(run)
    scored = newest_scores(run) if scored is None else scored
    if run.kind == "autoencoder":
        return _common(run) | _reconstruction(run, scored)
    return _denoising(run, scored) if run.kind == "denoiser" else _common(run) | _validation(run)


def _denoising(run: Seen, scored: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Validation error, and the scores of each guidance."""
    error = run.last("val/error")
    row = _common(run) | {"validation error": "-" if error is None else f"{error:.4f}"}
    if run.flat.get("trainer.time_sampling") == "loss_aware":
        row["pairing"] = "none: its times follow its losses"
    for record in scored:
        row |= _scores(record)
    if scored:
        how = [f"{r['sample']['sampler']} {r['sample']['steps']} steps" for r in scored]
        row["sampler"] = ", ".join(dict.fromkeys(how))
    return row


def _scores(record: dict[str, Any]) -> dict[str, str]:
    """A record's values as a table shows them, the Fréchet and kernel distance beside what real images score."""
    row, guided, floor = {}, guidance_of(record), record.get("floor") or {}
    for name, value in values(record).items():
        short = name.split("/")[0]
        if short == "reconstruction_fd":
            row[f"floor: {name.removeprefix('reconstruction_')} of reconstructions"] = f"{value:.3f}"
        elif short in SHOWN:
            real = floor.get(short.replace("fid", "fd")) if short in ("fd", "fid", "kid") else None
            beside = "" if real is None else f" (real {real:.3f})"
            row[name + guided] = f"{100 * value:.1f}%" if short == "label_accuracy" else f"{value:.3f}{beside}"
    nearest = next((v for k, v in record.items() if k.startswith("nearest_train@")), None)
    if nearest is not None:
        held_out = record["nearest_train_held_out"]
        row[f"nearest training image{guided}"] = f"{nearest:.3f} (held-out {held_out:.3f})"
    return row


def _reconstruction(run: Seen, scored: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What an autoencoder's newest record says."""
    if not scored:
        return {}
    record = {name.split("@")[0]: value for name, value in scored[-1].items()}
    count = next(name.split("@")[1] for name in scored[-1] if "@" in name)
    train_set, _ = load_data(from_dict(run.values, str(run.folder)))
    numbers, pixels = record["numbers"], train_set.images[0].numel()
    row = {"numbers a picture": f"{numbers:,} for {pixels:,}"}
    for name, title, form in (("psnr", "PSNR", ".2f"), ("ssim", "SSIM", ".4f")):
        row[f"{title}@{count}"] = f"{record[name]:{form}}"
    for name, value in record.items():
        if name.startswith("reconstruction_fd"):
            row[f"{name.removeprefix('reconstruction_')}@{count} of reconstructions"] = f"{value:.3f}"
        if name.startswith("label_accuracy"):
            row[f"{name}@{count} of reconstructions"] = f"{100 * value:.1f}%"
    return row


def _common(run: Seen) -> dict[str, str]:
    """Size, length and speed."""
    images, cost, seconds = run.images_seen, run.cost, run.seconds
    return {
        "parameters": f"{cost.parameters:,}",
        "GMACs": f"{cost.gmacs:.4f}",
        "images seen": f"{images:,}",
        "seconds": f"{seconds:,.0f}" if seconds else "-",
        "images/s": f"{images / seconds:,.0f}" if seconds else "-",
    }


def _validation(run: Seen) -> dict[str, str]:
    """The last validation numbers."""
    last: dict[str, Any] = next((m for m in reversed(run.metrics) if any(k.startswith("val/") for k in m)), {})
    return {name.removeprefix("val/"): f"{v:.4f}" for name, v in last.items() if name.startswith("val/")}


def guidance_of(record: dict[str, Any]) -> str:
    """How a record's samples were guided, as a table says it: " (guidance 1.5)", or nothing."""
    sample = record.get("sample") or {}
    told = [] if record.get("guidance", 1) == 1 else [f"guidance {record['guidance']:g}"]
    if sample.get("classifier") and sample.get("classifier_scale"):
        told.append(f"classifier {sample['classifier_scale']:g}")
    return f" ({', '.join(told)})" if told else ""


def held_scores(run: Seen) -> list[dict[str, Any]]:
    """The records of the weights that the run holds, oldest first."""
    run = seen(run)
    held = (run.images_seen, run.ema, run.snapshot)
    return [r for r in run.results if (r["images_seen"], r["ema"], r.get("snapshot", "last")) == held]


def newest_scores(run: Seen) -> list[dict[str, Any]]:
    """The newest record of each guidance for the weights that the run holds, unguided first."""
    chosen = {guidance_of(r): r for r in held_scores(run)}
    return [chosen[w] for w in sorted(chosen)]


def comparable_scores(runs: Sequence[Seen]) -> list[list[dict[str, Any]]]:
    """For each run the newest records of each guidance that were measured alike in all runs of its kind.

    Raises:
        UserError: where runs have records of a guidance but none by the same protocol, saying how they differ.
    """
    held = [[(run.kind, guidance_of(r), r) for r in reversed(held_scores(run))] for run in runs]
    chosen: list[list[dict[str, Any]]] = [[] for _ in runs]
    for what in sorted({(kind, guided) for records in held for kind, guided, _ in records}):
        groups = [[r for kind, guided, r in records if (kind, guided) == what] for records in held]
        first = next(i for i, group in enumerate(groups) if group)
        for candidate in groups[first]:
            alike = [next((r for r in group if difference(candidate, r) is None), None) for group in groups]
            if all(a is not None for a, group in zip(alike, groups, strict=True) if group):
                break
        else:
            newest = groups[first][0]
            other, told = next(
                (i, d) for i, group in enumerate(groups) if group and (d := difference(newest, group[0]))
            )
            raise UserError(
                f"{runs[first].folder} and {runs[other].folder}: measured differently{what[1]}: {told}; evaluate both"
                " with the same keys to compare them"
            )
        for records, record in zip(chosen, alike, strict=True):
            if record is not None:
                records.append(record)
    return chosen


def table(rows: Sequence[tuple[str, dict[str, str]]]) -> str:
    """Facts as lines, runs as columns; a missing fact is a dash."""
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    cells = [["", *(title for title, _ in rows)]]
    cells += [[name, *(row.get(name, "-") for _, row in rows)] for name in names]
    return ruled(cells)


def ruled(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns, the first of them a headline over a rule."""
    head, *rest = aligned(rows, left={0})
    return "\n".join([head, "-" * max(map(len, (head, *rest))), *rest])


def aligned(rows: Sequence[Sequence[str]], left: set[int]) -> list[str]:
    """Rows in columns as wide as their widest cell. A row may end early; such rows widen no column.

    Args:
        rows: the first of them has every column.
        left: columns set to the left; the others are set to the right.
    """
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in full) for i in range(len(rows[0]))]
    cells = [
        [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=False))]
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in cells]
