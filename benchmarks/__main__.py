"""`python -m benchmarks key=value ...`: measure, print a table, and write JSON and a plot."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import busy, command, growth, loop, networks, pieces, report, steps
from benchmarks.config import BenchConfig, Row, read
from diffbench.cli import exit_code
from diffbench.core.errors import UserError

MEASURES: dict[str, Callable[[BenchConfig, torch.device, float], Iterator[Row]]] = {
    "loop": loop.measure,
    "models": steps.measure,
    "data": pieces.data,
    "growth": growth.measure,
    "sampling": pieces.sampling,
    "command": command.measure,
    "busy": busy.measure,
}


def bench(overrides: Sequence[str]) -> dict[str, Any]:
    """Measure, print, and write JSON and a plot.

    Args:
        overrides: key=value arguments, the keys of `BenchConfig`.

    Returns:
        The report, as the JSON holds it.

    Raises:
        UserError: naming the key that is wrong; if the machine is busy; or if the report is there already.
    """
    config = read(overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.gpu and device.type == "cpu" and not config.tiny:
        raise UserError("gpu: this machine has no CUDA GPU; leave it out")
    networks.chosen(config)
    path = Path(config.out or time.strftime("runs/bench/%Y%m%d-%H%M%S.json"))
    if path.exists():
        raise UserError(f"out: {path} exists already; choose another name")
    before = report.load(Path(config.baseline)) if config.baseline else None
    report.check_quiet(config.force)
    machine, rows, began = report.machine(device), [], time.monotonic()
    print(report.headline(machine), flush=True)
    made: dict[str, Any] = {"format": report.FORMAT, "settings": vars(config), "machine": machine}
    for row in measured(config, device):
        rows.append(row)
        print(report.line(row), flush=True)
        made |= {"seconds": time.monotonic() - began, "rows": rows}
        report.save(made, path)  # what is measured stays, whatever ends the run
    print(f"\n{path} after {made['seconds']:.0f} s")
    for draw, suffix in ((report.plot, ".png"), (report.plot_growth, ".growth.png")):
        if draw(rows, report.headline(machine), path.with_suffix(suffix)):
            print(path.with_suffix(suffix))
    if before is not None:
        print(f"\nAgainst {config.baseline} ({report.headline(before['machine'])}):")
        print("\n".join(report.compared(rows, before["rows"])) or "nothing measured in both")
    return made


def measured(config: BenchConfig, device: torch.device) -> Iterator[Row]:
    """The rows of all parts; each part has its share of the time, and what earlier ones left of theirs."""
    began, passed, total = time.monotonic(), 0.0, sum(config.shares.values())
    for part, share in config.shares.items():
        passed += share / total
        try:
            yield from MEASURES[part](config, device, began + passed * config.budget)
        except RuntimeError as e:  # out of memory, no such kernel: the other parts go on
            yield {"part": part, "name": part, "skipped": " ".join(str(e).split())[:120]}


def main(words: list[str]) -> int:
    """Run the benchmark; return the exit code."""

    def work() -> int:
        bench(words)
        return 0

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
