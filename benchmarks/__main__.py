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
from diffbench.config.keys import key_lines, read_keys
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
    """Measure, print a table, write a JSON report and plots, and return the report.

    Args:
        overrides: key=value arguments for `BenchConfig`.

    Raises:
        UserError: if a key or value is wrong, the machine is busy, or the report already exists.
    """
    config = read(overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.gpu and device.type == "cpu" and not config.tiny:
        raise UserError("gpu: this machine has no CUDA GPU; leave it out")
    networks.selected_models(config)
    path = Path(config.out or time.strftime("runs/bench/%Y%m%d-%H%M%S.json"))
    if path.exists():
        raise UserError(f"out: {path} already exists; choose another name")
    before = report.load(Path(config.baseline)) if config.baseline else None
    report.check_quiet(config.force)
    machine, rows, began = report.machine(device), [], time.monotonic()
    print(report.headline(machine), flush=True)
    results: dict[str, Any] = {"format": report.FORMAT, "settings": vars(config), "machine": machine}
    for row in measured(config, device):
        rows.append(row)
        print(report.line(row), flush=True)
        results |= {"seconds": time.monotonic() - began, "rows": rows}
        report.save(results, path)  # after every row, so that an interrupted run keeps its results
    print(f"\n{path} after {results['seconds']:.0f} s")
    for draw, suffix in ((report.plot, ".png"), (report.plot_growth, ".growth.png")):
        if draw(rows, report.headline(machine), path.with_suffix(suffix)):
            print(path.with_suffix(suffix))
    if before is not None:
        print(f"\nAgainst {config.baseline} ({report.headline(before['machine'])}):")
        print("\n".join(report.compared(rows, before["rows"])) or "no measurement is in both")
    return results


def measured(config: BenchConfig, device: torch.device) -> Iterator[Row]:
    """Yield the rows of all parts; each part gets its share of the time and what earlier parts left over."""
    began, passed, total = time.monotonic(), 0.0, sum(config.shares.values())
    for part, share in config.shares.items():
        passed += share / total
        try:
            yield from MEASURES[part](config, device, began + passed * config.budget)
        except RuntimeError as e:  # out of memory, no such kernel: continue with the other parts
            yield {"part": part, "name": part, "skipped": " ".join(str(e).split())[:120]}


def main(args: list[str]) -> int:
    """Run the benchmark, or print its keys after --help; return the exit code."""

    def work() -> int:
        if {"-h", "--help"} & {*args}:
            keys = read_keys("../benchmarks/config.py:BenchConfig")
            print("\n".join([str(__doc__), "keys, with their defaults:", *key_lines(keys, 120)]))
        else:
            bench(args)
        return 0

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
