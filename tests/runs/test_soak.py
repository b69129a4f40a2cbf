"""Soak test: memory, open files and threads stay flat while one process trains, saves, draws and scores for long."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from diffbench.cli import main

MINUTES = float(os.environ.get("DIFFBENCH_SOAK_MINUTES", "20"))
WARM = 30
"""Rounds before anything is compared, in which imports, caches and the allocator's pools fill up."""
MOST_GROWTH = 0.1
"""Largest slope, in MiB per round, of the line through resident memory after the warm-up rounds."""


def usage() -> tuple[float, int, int]:
    """Return the resident MiB, open files and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.timeout(60 * MINUTES + 900)
def test_memory_files_and_threads_stay_flat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds, ends = [], time.monotonic() + 60 * MINUTES
    while time.monotonic() < ends or len(rounds) < 2 * WARM:
        runs = tmp_path / "runs"
        args = [f"runs_dir={runs}", "trainer.max_images=64", "debug=smoke"]  # eight steps, four states, scores
        assert main(["train", "experiments/digits/dit.yaml", *args]) == 0
        shutil.rmtree(runs)
        rounds.append(usage())
    memory, files, threads = (np.array(column) for column in zip(*rounds[WARM:], strict=True))
    growth = float(np.polyfit(np.arange(len(memory)), memory, 1)[0])
    summary = (
        f"{len(rounds)} rounds: {memory[0]:.0f} MiB, then {memory[-1]:.0f} ({growth:+.3f} MiB a round),"
        f" {files[0]} to {files[-1]} open files, {threads[0]} to {threads[-1]} threads"
    )
    with capsys.disabled():
        print(summary)
    assert growth < MOST_GROWTH, summary
    assert len(set(files)) == 1 and len(set(threads)) == 1, summary
