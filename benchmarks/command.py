"""CPU seconds of whole commands by stage, each command in its own process."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.config import BenchConfig, Row, shared

EXPERIMENT = "experiments/digits/diffit.yaml"
IMAGES = 64_000
"""Images to train on, unless `full` uses the experiment's own number."""


def plan(config: BenchConfig, runs: Path) -> dict[str, list[str]]:
    """Return {name: arguments} of the commands in the order they run; later ones use the caches of earlier ones."""
    length = [] if config.full else ["debug=smoke"] if config.tiny else [f"trainer.max_images={IMAGES}"]
    train = ["train", EXPERIMENT, f"runs_dir={runs}", *length]
    return {
        "--help": ["--help"],
        "list --models": ["list", "--models"],
        "train, a wrong value": ["train", EXPERIMENT, "trainer.compile=false"],
        "train, an empty cache": train,
        "train, another seed": [*train, "seed=1"],
        "train, complete": train,
        "list of runs": ["list", str(runs)],
        "compare": ["compare", str(runs / "digits"), f"out={runs / 'report'}"],
    }


def measure(config: BenchConfig, device: torch.device, deadline: float) -> Iterator[Row]:
    """Yield a row for each command as a whole and for each of its stages, the longest stage first."""
    with tempfile.TemporaryDirectory() as folder:
        for (name, args), until in shared(list(plan(config, Path(folder, "runs")).items()), deadline):
            row: Row = {"part": "command", "name": name}
            if until is None:
                yield row | {"skipped": "the time is up"}
            else:
                yield from (row | found for found in _command(args, Path(folder)))


def _command(args: list[str], folder: Path) -> Iterator[Row]:
    out = folder / "watched.json"
    out.unlink(missing_ok=True)
    began = time.perf_counter()
    environment = os.environ | {"DIFFBENCH_CACHE": str(folder / "cache")}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.watch", str(out), *args], env=environment, stdout=log, stderr=log
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # wait4 bypassed Popen, which would think it still runs
    found = json.loads(out.read_text())
    total, spent = used.ru_utime + used.ru_stime, found["spent"]
    stages = spent | {"shutdown": max(0.0, total - sum(spent.values()))}
    row: Row = {"work": "all of it", "cpu_s": total, "wall_s": time.perf_counter() - began}
    yield row | ({"first_step_s": found["first_step"]} if found["first_step"] else {})
    for stage, seconds in sorted(stages.items(), key=lambda pair: -pair[1]):
        yield {"work": stage, "cpu_s": seconds, "cpu_share": seconds / total}
