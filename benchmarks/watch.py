"""`python -m benchmarks.watch OUT.json VERB ...`: run a diffbench command, and write its CPU seconds by stage.

A profiling timer samples the stack every few ms of CPU time, and adds the time since to the innermost stage on it.
"""

import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType

STAGES = {
    "_find_and_load": "imports",
    "read_layers": "config",
    "from_layers": "config",
    "load_data": "data",
    "DenoiserRun.check": "checks",
    "cost_of": "checks",
    "timed": "time estimates",
    "_TrainingEpochLoop.advance": "training",
    "ValidationError.act": "validation",
    "FrechetDistance.run": "distances in training",
    "SampleGrid.act": "grids in training",
    "SaveState.save": "checkpoints",
    "newest": "checkpoints",
    "export": "averages",
    "Run.use_average": "averages",
    "cached_network": "feature extractor",
    "run_scorer": "statistics of real images",
    "Samples.fill": "samples",
    "Scorer.scores": "scores",
    "DenoiserRun.sample_tensor": "final grid",
    "save_grid": "final grid",
    "show_scores": "records",
    "run_table": "table",
    "run_facts": "table",
}
"""Qualified name of a function -> its stage."""
INTERVAL = 0.01
"""CPU seconds between two samples."""


class Watch:
    """The CPU seconds of this process by stage, from its start on; `first_step` is the CPU time when training began."""

    def __init__(self) -> None:
        self.spent, self.first_step = dict[str, float](), 0.0
        self.last = time.process_time()
        self.spent["interpreter"] = self.last
        signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, INTERVAL, INTERVAL)

    def stop(self) -> None:
        """Stop the timer, after a last sample."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        self._sample(0, None)

    def _sample(self, number: int, frame: FrameType | None) -> None:
        stage = None
        while frame is not None and stage is None:
            code = frame.f_code
            if "diffbench" in code.co_filename or "lightning" in code.co_filename or code.co_name == "_find_and_load":
                stage = STAGES.get(code.co_qualname)
            frame = frame.f_back
        now = time.process_time()
        if stage == "training" and not self.first_step:
            self.first_step = now
        self.spent[stage or "rest"] = self.spent.get(stage or "rest", 0.0) + now - self.last
        self.last = now


def main(out: str, args: list[str]) -> None:
    """Run the command with `args`, write the CPU seconds of each stage to `out`, and exit with the command's code."""
    watch = Watch()
    from diffbench.__main__ import run

    sys.argv[1:] = args
    try:
        run()
    finally:  # run always ends with SystemExit
        watch.stop()
        Path(out).write_text(json.dumps({"first_step": watch.first_step, "spent": watch.spent}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
