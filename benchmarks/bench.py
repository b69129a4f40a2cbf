"""What `python -m benchmarks` does: the parts one after the other, every line as it is measured, then the report."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, machine, settings, show
from benchmarks.settings import BenchConfig
from diffbench.core.errors import UserError

MODELS = 0.65
"""The part of the time after which no further network begins, so that the rest has some too."""

Row = dict[str, Any]


def bench(overrides: Sequence[str]) -> dict[str, Any]:
    """Measures, prints, writes JSON and plots.

    Args:
        overrides: key=value arguments, the keys of `BenchConfig`.

    Returns:
        The report, as the JSON holds it.

    Raises:
        UserError: naming the key that is wrong; if the machine is busy; or if the report is there already.
    """
    config = settings.read(overrides)
    device = _device(config)
    cases.models(config)
    path = Path(config.out or time.strftime("runs/bench/%Y%m%d-%H%M%S.json"))
    if path.exists():
        raise UserError(f"out: {path} exists already; choose another name")
    before = show.load(Path(config.baseline)) if config.baseline else None
    machine.check_quiet(config.force)
    began = time.monotonic()
    told = machine.facts(device)
    print(show.headline(told), flush=True)
    rows: list[Row] = []
    for row in _rows(config, device, began):
        rows.append(row)
        print(show.line(row), flush=True)
    report = {"format": show.FORMAT, "settings": vars(config), "machine": told, "seconds": time.monotonic() - began}
    report["rows"] = rows
    show.save(report, path)
    print(f"\n{path} after {report['seconds']:.0f} s")
    for draw, name in ((show.plot, path.with_suffix(".png")), (show.plot_growth, path.with_suffix(".growth.png"))):
        draw(rows, show.headline(told), name)
        if name.exists():
            print(name)
    if before is not None:
        print(f"\nAgainst {config.baseline} ({show.headline(before['machine'])}):")
        print("\n".join(show.compared(rows, before["rows"])) or "nothing measured in both")
    return report


def _rows(config: BenchConfig, device: torch.device, began: float) -> Iterator[Row]:
    """The rows of all parts, in the order of `settings.PARTS`; what fails in one does not end the others."""
    from benchmarks import drawn, growth, loop, models, pieces

    measures: dict[str, Callable[..., Iterator[Row]]] = {
        "loop": loop.measure,  # first: in a fresh process, as a training is
        "models": models.measure,
        "pieces": pieces.measure,
        "growth": growth.measure,
        "sampling": drawn.measure,
    }
    order = ("models", "sampling", "loop", "pieces", "growth") if config.gpu else tuple(measures)
    asked = {*config.chosen_parts} | ({"models"} if "variants" in config.chosen_parts else set())
    for part in order:
        if part not in asked:
            continue
        try:
            ends = time.monotonic() + MODELS * config.budget if part == "models" else began + config.budget
            yield from measures[part](config, device, ends)
        except torch.OutOfMemoryError:
            yield {"part": part, "name": part, "skipped": "out of memory"}


def _device(config: BenchConfig) -> torch.device:
    there = torch.cuda.is_available()
    if config.device == "gpu" and not there:
        raise UserError("device: this machine has no CUDA GPU; choose from auto, cpu")
    return torch.device("cuda" if there and config.device != "cpu" else "cpu")
