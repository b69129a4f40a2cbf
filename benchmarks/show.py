"""A report as tables on the terminal, as JSON, and as plots."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures import changes, key_of
from diffbench.core.errors import UserError
from diffbench.core.files import atomic, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = 1
Row = Mapping[str, Any]


def save(report: Mapping[str, Any], path: Path) -> None:
    """Writes a report."""
    write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def load(path: Path) -> dict[str, Any]:
    """An older report.

    Raises:
        UserError: if there is none, or the file is something else.
    """
    try:
        report = json.loads(path.read_text())
        if report["format"] != FORMAT or not isinstance(report["rows"], list):
            raise ValueError("another format")
    except (OSError, ValueError, KeyError, TypeError) as e:
        why = e.strerror if isinstance(e, OSError) else "no report of diffbench bench"
        raise UserError(f"baseline: {path}: {why}; name a JSON that it wrote") from None
    return report


def headline(machine: Mapping[str, Any]) -> str:
    """The machine in a line."""
    where = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"
    load = f"load {machine['load_average']}"
    return f"{where}; torch {machine['versions']['torch']}; {load}; commit {machine['commit'] or 'unknown'}"


def line(row: Row, change: float | None = None) -> str:
    """A row for the terminal."""
    title = " ".join(str(row[k]) for k in ("name", "variant", "work") if row.get(k) not in (None, "default", "piece"))
    said = [f"{row['part']:<9}{title:<52}"]
    if "skipped" in row:
        return f"{said[0]} skipped: {row['skipped']}"
    if "bytes_per_s" in row and "ms" not in row:
        said.append(f"{row['bytes_per_s'] / 1e9:10.1f} GB/s")
    if "ms" in row:
        around = f"({row['ms_low']:.2f} to {row['ms_high']:.2f})" if "ms_low" in row else ""
        said.append(f"{row['ms']:10.2f} ms {around:<22}")
    if "images_per_s" in row:
        said.append(f"{row['images_per_s']:10,.1f} img/s")
    if "share" in row:
        said.append(f"{row['flops_per_s'] / 1e9:9,.0f} GFLOP/s {100 * row['share']:5.1f}%")
        if row.get("mm_share", row["share"]) != row["share"]:
            said.append(f"({100 * row['mm_share']:.0f}% of mm)")
    if "memory_bytes" in row:
        said.append(f"{row['memory_bytes'] / 2**20:8,.1f} MiB")
    if "compiled" in row.get("variant", "") and "first_s" in row:
        said.append(f"first {row['first_s']:.0f} s")
    if "ratio" in row:
        said.append(f"x{row['ratio']['median']:.3f} of default")
    if "roofline_share" in row:
        said.append(f"{100 * row['roofline_share']:.0f}% of the roofline")
    if "overhead_ms" in row:
        said.append(
            f"bare {row['bare_ms']:.2f} ms, Lightning {row['overhead_ms']:+.2f} ms"
            f" ({row['overhead_low']:+.2f} to {row['overhead_high']:+.2f}), data {100 * row['data_wait_share']:.2f}%"
        )
    if row.get("idle_share") is not None:
        said.append(
            f"idle {100 * row['idle_share']:.1f}%, {row['synchronizations_per_step']:g} synchronizations a step"
        )
    if "time_slope" in row:
        memory = "-" if row["memory_slope"] is None else f"{row['memory_slope']:.2f}"
        said.append(f"time ~ size^{row['time_slope']:.2f}, memory ~ size^{memory}")
    elif "size" in row:
        said[0] = f"{said[0][:-8]}{row['size']:>8}"
    if change is not None:
        said.append(f"x{change:.3f} of the baseline")
    return " ".join(said).rstrip()


def compared(rows: Sequence[Row], before: Sequence[Row]) -> list[str]:
    """A line for each measurement that an older report holds too, the largest change first."""
    found = changes(rows, before)
    now = {key_of(row): row for row in rows if row.get("ms")}
    order = sorted(found, key=lambda key: -abs(found[key] - 1))
    return [line(now[key], found[key]) for key in order]


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Shares of the product peak, and variants as ratios, as a PNG."""
    steps = [row for row in rows if "share" in row and row.get("variant", "default") == "default"]
    others = [row for row in rows if "ratio" in row]
    if not steps:
        return
    from matplotlib.figure import Figure

    tall = max(3.0, 0.22 * max(len(steps), len(others)) + 1.5)
    figure = Figure(figsize=(14, tall), layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, steps, [100 * row["share"] for row in steps], "% of the matrix-product peak of the same run")
    _bars(right, others, [row["ratio"]["median"] for row in others], "time, as a multiple of the default's")
    right.axvline(1, color="black", linewidth=0.8)
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def plot_growth(rows: Sequence[Row], title: str, path: Path) -> None:
    """Time and memory against size, both axes logarithmic, with the fitted slopes."""
    sized = [row for row in rows if "size" in row and row["part"] == "growth"]
    if not sized:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    for axes, value, unit, fitted in zip(
        figure.subplots(1, 2),
        ("ms", "memory_bytes"),
        ("time of the smallest size", "memory of the smallest size"),
        ("time_slope", "memory_slope"),
        strict=True,
    ):
        for name, axis in dict.fromkeys((row["name"], row["variant"]) for row in sized):
            points = [row for row in sized if (row["name"], row["variant"]) == (name, axis) and (row[value] or 0) > 0]
            slopes = [
                row[fitted] for row in rows if (row["name"], row.get("variant")) == (name, axis) and fitted in row
            ]
            if not points or not slopes or slopes[0] is None:
                continue
            first = points[0]
            axes.loglog(
                [row["size"] / first["size"] for row in points],
                [row[value] / first[value] for row in points],
                marker="o",
                label=f"{name}, {axis}: slope {slopes[0]:.2f}",
            )
        axes.set_xlabel("size, as a multiple of the smallest")
        axes.set_ylabel(f"as a multiple of the {unit}")
        axes.grid(True, which="both", linewidth=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def _bars(axes: "Axes", rows: Sequence[Row], values: list[float], label: str) -> None:
    names = [f"{row['name'].removeprefix('experiments/')} {row['work']}" for row in rows]
    names = [f"{n} ({r['variant']})" if "ratio" in r else n for n, r in zip(names, rows, strict=True)]
    axes.barh(range(len(values)), values, color="tab:blue")
    axes.set_yticks(range(len(values)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)


def _save(figure: Any, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    with atomic(path) as file:
        file.write(drawn.getvalue())
