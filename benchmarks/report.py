"""Facts about the machine, and the report as terminal lines, JSON and plots."""

import io
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diffbench.core.errors import UserError
from diffbench.core.files import atomic, write_text

FORMAT = 1
BUSY = 0.25
"""Share of busy cores above which times mean little: with one other process on two cores, 0.3 ms become 20 to 32."""
KEY = ("part", "name", "variant", "work", "batch", "size")
"""Fields that identify a measurement across reports."""
Row = Mapping[str, Any]


def check_quiet(force: bool) -> None:
    """Raise UserError if more than `BUSY` of the cores are busy, unless `force` is set."""
    busy = 0.0 if force else busy_share()
    if busy > BUSY:
        raise UserError(
            f"force: {busy:.0%} of the cores are busy, more than {BUSY:.0%}: other processes would distort the times;"
            " wait, or set force=true, which the report will record"
        )


def busy_share(seconds: float = 1.0) -> float:
    """Return the share of busy cores over `seconds`, or by the load average if the system has no /proc/stat."""
    readings = []
    for pause in (seconds, 0.0):
        try:
            ticks = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        except OSError:
            return os.getloadavg()[0] / (os.cpu_count() or 1)
        readings.append((sum(ticks), ticks[3] + ticks[4]))  # all ticks, and those idle or waiting for a disk
        time.sleep(pause)
    (before, idle_before), (after, idle) = readings
    return 1 - (idle - idle_before) / max(1, after - before)


def machine(device: torch.device) -> dict[str, Any]:
    """Return the facts about the machine that are needed to interpret the numbers."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": round(os.getloadavg()[0], 2),
        "device": device.type,
        "versions": {name: version(name) for name in ("torch", "lightning", "numpy")},
        "commit": _commit(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {"gpu": card.name, "gpu_memory_bytes": card.total_memory, "cuda": torch.version.cuda}
    return facts


def _commit() -> str | None:
    """Return the commit of this code, with "-dirty" if files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def save(report: Mapping[str, Any], path: Path) -> None:
    """Write a report as JSON."""
    write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def load(path: Path) -> dict[str, Any]:
    """Load an older report.

    Raises:
        UserError: if the file is missing or is not a report.
    """
    try:
        report = json.loads(path.read_text())
        if report["format"] != FORMAT or not isinstance(report["rows"], list):
            raise ValueError("another format")
    except (OSError, ValueError, KeyError, TypeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not a benchmark report"
        raise UserError(f"baseline: {path}: {reason}; give the JSON of an earlier benchmark") from None
    return report


def headline(facts: Mapping[str, Any]) -> str:
    """Return a one-line description of the machine."""
    where = facts.get("gpu") or f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads"
    load = f"load {facts['load_average']}"
    return f"{where}; torch {facts['versions']['torch']}; {load}; commit {facts['commit'] or 'unknown'}"


def line(row: Row, change: float | None = None) -> str:
    """Format a row for the terminal, with its change since a baseline if given."""
    title = " ".join(str(row[k]) for k in ("name", "variant", "work") if row.get(k) not in (None, "default"))
    size = f"{row['size']:>8}" if "size" in row else ""
    parts = [f"{row['part']:<9}{title:<{52 - len(size)}}{size}"]
    if "skipped" in row:
        return f"{parts[0]} skipped: {row['skipped']}"
    if "ms" in row:
        bounds = f"({row['ms_low']:.2f} to {row['ms_high']:.2f})" if "ms_low" in row else ""
        parts.append(f"{row['ms']:10.2f} ms {bounds:<22}")
    if "cpu_s" in row:
        parts.append(f"{row['cpu_s']:8.2f} s CPU time")
        parts.append(f"{100 * row['cpu_share']:5.1f}%" if "cpu_share" in row else f"{row['wall_s']:.2f} s wall time")
    if "first_step_s" in row:
        parts.append(f"first step after {row['first_step_s']:.2f} s CPU time")
    if "images_per_s" in row:
        parts.append(f"{row['images_per_s']:10,.1f} img/s")
    if "share" in row:
        parts.append(f"{row['flops_per_s'] / 1e9:9,.0f} GFLOP/s {100 * row['share']:5.1f}%")
        if row.get("mm_share", row["share"]) != row["share"]:
            parts.append(f"({100 * row['mm_share']:.0f}% of mm)")
    if "memory_bytes" in row:
        parts.append(f"{row['memory_bytes'] / 2**20:8,.1f} MiB")
    if row.get("variant", "").startswith("compiled") and "first_s" in row:
        parts.append(f"first {row['first_s']:.0f} s")
    if "ratio" in row:
        parts.append(f"x{row['ratio']['median']:.3f} of default")
    if "overhead_ms" in row:
        parts.append(
            f"bare {row['bare_ms']:.2f} ms, Lightning {row['overhead_ms']:+.2f} ms"
            f" ({row['overhead_low']:+.2f} to {row['overhead_high']:+.2f}), data {100 * row['data_wait_share']:.2f}%"
        )
    if "time_slope" in row:
        memory = "-" if row["memory_slope"] is None else f"{row['memory_slope']:.2f}"
        parts.append(f"time ~ size^{row['time_slope']:.2f}, memory ~ size^{memory}")
    if change is not None:
        parts.append(f"x{change:.3f} of the baseline")
    return " ".join(parts).rstrip()


def compared(rows: Sequence[Row], before: Sequence[Row]) -> list[str]:
    """Return a line for each measurement that an older report has too, the largest change first."""
    old = {_key(row): cost for row in before if (cost := _cost(row))}
    found = [(row, cost / old[key]) for row in rows if (cost := _cost(row)) and (key := _key(row)) in old]
    return [line(row, change) for row, change in sorted(found, key=lambda pair: -abs(pair[1] - 1))]


def _cost(row: Row) -> float | None:
    return row.get("ms") or row.get("cpu_s") or (1 / row["images_per_s"] if "images_per_s" in row else None)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def plot(rows: Sequence[Row], title: str, path: Path) -> bool:
    """Plot shares of the matrix-product peak and ratios of variants as a PNG; return whether there was any to plot."""
    steps = [row for row in rows if "share" in row and row.get("variant", "default") == "default"]
    others = [row for row in rows if "ratio" in row]
    if not steps:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, max(3.0, 0.22 * max(len(steps), len(others)) + 1.5)), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, some, values, label in (
        (left, steps, [100 * row["share"] for row in steps], "% of the matrix-product peak of the same run"),
        (right, others, [row["ratio"]["median"] for row in others], "time, as a multiple of the default's"),
    ):
        names = [f"{row['name'].removeprefix('experiments/')} {row['work']}" for row in some]
        names = [f"{n} ({r['variant']})" if "ratio" in r else n for n, r in zip(names, some, strict=True)]
        axes.barh(range(len(values)), values, color="tab:blue")
        axes.set_yticks(range(len(values)), names, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(label)
    right.axvline(1, color="black", linewidth=0.8)
    _save(figure, title, path)
    return True


def plot_growth(rows: Sequence[Row], title: str, path: Path) -> bool:
    """Plot time and memory against size, relative to the smallest size; return whether there was anything to plot."""
    curves: dict[str, list[Row]] = {}
    for row in rows:
        if row["part"] == "growth" and "ms" in row:
            curves.setdefault(f"{row['name']} by {row['variant']}", []).append(row)
    if not curves:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("ms", "memory_bytes"), ("time", "memory"), strict=True):
        for name, points in curves.items():
            if points[0][key] > 0:
                sizes = [row["size"] / points[0]["size"] for row in points]
                axes.loglog(sizes, [row[key] / points[0][key] for row in points], marker="o", label=name)
        axes.loglog([1, 64], [1, 64], color="grey", linestyle=":", label="proportional")
        axes.set_xlabel("size, as a multiple of the smallest")
        axes.set_ylabel(f"{label}, as a multiple of the smallest's")
        axes.legend(fontsize=7)
    _save(figure, title, path)
    return True


def _save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    with atomic(path) as file:
        file.write(png.getvalue())
